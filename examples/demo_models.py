"""The demo's models: real architectures from transformers, built from their configs with random weights, and their inputs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from skimage import transform
from torch import nn

from .torchvision_or_not import let_transformers_import

VOCABULARY = 1000
IMAGE_TOKEN = 999
CLIP_PATCH, DEIT_PATCH = 14, 16
# The prompt: some text, the image, some text.
TEXT_BEFORE, TEXT_AFTER = 8, 24


@dataclass(frozen=True)
class Shapes:
    """Sizes of the models, parameters of the passes, and how often to run."""

    deit_image: int
    deit_layers: int
    llava_image: int
    llava_layers: int
    llava_hidden: int
    agents: int
    window: int
    runs: int
    new_tokens: int

    @property
    def deit_grid(self) -> int:
        return self.deit_image // DEIT_PATCH

    @property
    def llava_grid(self) -> int:
        return self.llava_image // CLIP_PATCH


FULL = Shapes(deit_image=384, deit_layers=12, llava_image=336, llava_layers=8, llava_hidden=512, agents=49, window=7, runs=5, new_tokens=16)
SMALL = Shapes(deit_image=96, deit_layers=2, llava_image=84, llava_layers=4, llava_hidden=64, agents=9, window=3, runs=1, new_tokens=4)


def deit(shapes: Shapes) -> nn.Module:
    """DeiT-S: hidden size 384, 6 heads."""
    let_transformers_import()
    from transformers import DeiTConfig, DeiTForImageClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
    return DeiTForImageClassification(DeiTConfig(image_size=shapes.deit_image, num_hidden_layers=shapes.deit_layers, **sizes)).eval()


def llava(shapes: Shapes) -> nn.Module:
    """A LLaVA (CLIP vision tower, projector, Llama with grouped heads), narrower and shallower than the published ones."""
    let_transformers_import()
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    hidden, heads = shapes.llava_hidden, max(2, shapes.llava_hidden // 64)
    text = LlamaConfig(
        hidden_size=hidden, intermediate_size=8 * hidden // 3, num_hidden_layers=shapes.llava_layers, num_attention_heads=heads,
        num_key_value_heads=heads // 2, vocab_size=VOCABULARY, max_position_embeddings=2048, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=hidden // 2, intermediate_size=2 * hidden, num_hidden_layers=shapes.llava_layers // 2,
        num_attention_heads=heads // 2, image_size=shapes.llava_image, patch_size=CLIP_PATCH,
    )  # fmt: skip
    config = LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE_TOKEN,
        image_seq_length=shapes.llava_grid**2,
        # The default, -2, leaves the tower's last layer unused: a rewritten graph drops it, which would be counted as a gain of the pass.
        vision_feature_layer=-1,
    )
    return LlavaForConditionalGeneration(config).eval()


def pixels(photo: np.ndarray, size: int) -> torch.Tensor:
    """The photograph [H, W, 3] in 0 .. 1 as a model's input [1, 3, size, size] in -1 .. 1."""
    resized = transform.resize(photo, (size, size), anti_aliasing=True)
    return torch.from_numpy(resized).to(torch.float32).permute(2, 0, 1)[None].contiguous() * 2 - 1


def prompt(shapes: Shapes) -> dict[str, torch.Tensor]:
    """Random words around as many image tokens as the image has patches."""
    ids = torch.randint(3, IMAGE_TOKEN, (1, TEXT_BEFORE + shapes.llava_grid**2 + TEXT_AFTER), generator=torch.Generator().manual_seed(0))
    ids[:, TEXT_BEFORE : TEXT_BEFORE + shapes.llava_grid**2] = IMAGE_TOKEN
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
