"""The models that the whole-model tests run: real architectures built from their configs with random weights, in float32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

IMAGE_TOKEN = 199
TEXT_TOKENS = 190


@dataclass(frozen=True)
class Architecture:
    """One row: how a model is built for an attention implementation, its inputs, and what is true of it whoever looks.

    sites: number of attention sites. grid, prefix: of the vision sites. causal_sites: how many of the sites are causal.
    """

    name: str
    build: Callable[[str], nn.Module]
    inputs: Callable[[], dict[str, torch.Tensor]]
    sites: int
    heads: int
    grid: tuple[int, int] | None = None
    prefix: int = 0
    causal_sites: int = 0
    visual: bool = False


def images(size: int, batch: int = 2, name: str = "pixel_values") -> Callable[[], dict[str, torch.Tensor]]:
    def make() -> dict[str, torch.Tensor]:
        return {name: torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))}

    return make


def timm_model(name: str, **options: Any) -> Callable[[str], nn.Module]:
    def build(implementation: str) -> nn.Module:
        import timm

        torch.manual_seed(0)
        model = timm.create_model(name, **options).eval()
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = implementation == "sdpa"
        return model

    return build


def transformers_model(model: str, config: str, **options: Any) -> Callable[[str], nn.Module]:
    def build(implementation: str) -> nn.Module:
        import transformers

        torch.manual_seed(0)
        made = getattr(transformers, config)(**options)
        made._attn_implementation = implementation
        return getattr(transformers, model)(made).eval()

    return build


def llava(
    implementation: str, layers: int = 4, image_size: int = 56, hidden: int = 64, vision_hidden: int = 64, vision_layers: int = 3
) -> nn.Module:
    """A LLaVA (CLIP vision tower, projector, Llama with grouped heads) of the real architecture at a width that a CPU test affords."""
    import transformers

    torch.manual_seed(0)
    text = transformers.LlamaConfig(
        hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=200, max_position_embeddings=2048, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        # Larger than the default 0.02, so that random layers differ enough for greedy decoding to depend on what was attended to.
        initializer_range=0.15,
    )  # fmt: skip
    vision = transformers.CLIPVisionConfig(
        hidden_size=vision_hidden, intermediate_size=2 * vision_hidden, num_hidden_layers=vision_layers, num_attention_heads=4,
        image_size=image_size, patch_size=14, initializer_range=0.15,
    )  # fmt: skip
    config = transformers.LlavaConfig(
        text_config=text, vision_config=vision, image_token_id=IMAGE_TOKEN, image_seq_length=(image_size // 14) ** 2, initializer_range=0.15
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    model.set_attn_implementation(implementation)
    return model


def llava_inputs(image_size: int = 56, batch: int = 2, text: int = 14, padding: int = 3) -> dict[str, torch.Tensor]:
    """Prompts `5 text tokens, image, rest of the text`; all but the first row are padded on the left."""
    generator = torch.Generator().manual_seed(2)
    visual = (image_size // 14) ** 2
    ids = torch.randint(3, TEXT_TOKENS, (batch, text + visual), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(batch):
        pad = padding if row else 0
        ids[row, pad + 5 : pad + 5 + visual] = IMAGE_TOKEN
        ids[row, :pad] = 0
        mask[row, :pad] = 0
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": torch.randn(batch, 3, image_size, image_size, generator=generator),
    }


def two_pictures_a_row() -> dict[str, torch.Tensor]:
    """`llava_inputs` with a second image behind the text, in the second row three tokens later."""
    inputs = llava_inputs(batch=2)
    ids = torch.cat([inputs["input_ids"], inputs["input_ids"][:, 5:]], dim=1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(inputs["attention_mask"][:, 5:])], dim=1)
    ids[1, 30:33], ids[1, 33:49] = 7, IMAGE_TOKEN
    pictures = torch.randn(4, 3, 56, 56, generator=torch.Generator().manual_seed(5))
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pictures}


def clip_text_inputs() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0
    return {"input_ids": ids, "attention_mask": mask}


SMALL = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
# Real widths, heads and image sizes everywhere; one model of each library in full depth, the others cut to what a CPU run affords.
CUT = 3
ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture("timm-deit-s-224", timm_model("deit_small_patch16_224"), images(224, name="x"), 12, 6, (14, 14), 1),
    Architecture(
        "timm-deit-s-384", timm_model("deit_small_patch16_224", img_size=384, depth=CUT), images(384, 1, "x"), CUT, 6, (24, 24), 1
    ),
    Architecture("timm-vit-b-224", timm_model("vit_base_patch16_224", depth=CUT), images(224, name="x"), CUT, 12, (14, 14), 1),
    Architecture("timm-vit-b-384", timm_model("vit_base_patch16_384", depth=CUT), images(384, 1, "x"), CUT, 12, (24, 24), 1),
    Architecture("deit-s-224", transformers_model("DeiTModel", "DeiTConfig", **SMALL), images(224), 12, 6, (14, 14), 2),
    Architecture(
        "deit-s-384", transformers_model("DeiTModel", "DeiTConfig", image_size=384, num_hidden_layers=CUT, **SMALL),
        images(384, 1), CUT, 6, (24, 24), 2,
    ),
    Architecture(
        "vit-b-224", transformers_model("ViTForImageClassification", "ViTConfig", num_hidden_layers=CUT), images(224), CUT, 12, (14, 14), 1
    ),
    Architecture(
        "vit-b-384", transformers_model("ViTForImageClassification", "ViTConfig", image_size=384, num_hidden_layers=CUT),
        images(384, 1), CUT, 12, (24, 24), 1,
    ),
    Architecture(
        "clip-vision-224", transformers_model("CLIPVisionModel", "CLIPVisionConfig", patch_size=16, num_hidden_layers=CUT),
        images(224), CUT, 12, (14, 14), 1,
    ),
    Architecture(
        "clip-text",
        transformers_model(
            "CLIPTextModel", "CLIPTextConfig", vocab_size=320, bos_token_id=1, eos_token_id=2, pad_token_id=0, num_hidden_layers=CUT
        ),
        clip_text_inputs, CUT, 8, causal_sites=CUT,
    ),
    Architecture(
        "dinov2-s-224", transformers_model("Dinov2Model", "Dinov2Config", hidden_size=384, num_attention_heads=6, num_hidden_layers=CUT),
        images(224), CUT, 6, (16, 16), 1,
    ),
    Architecture("llava", llava, llava_inputs, 7, 4, (4, 4), 1, causal_sites=4, visual=True),
)  # fmt: skip

BY_NAME = {architecture.name: architecture for architecture in ARCHITECTURES}
IMPLEMENTATIONS = ("sdpa", "eager")


def outputs(result: Any) -> list[torch.Tensor]:
    """The floating tensors of a model's result, caches left out."""
    if isinstance(result, torch.Tensor):
        return [result]
    values = result.values() if hasattr(result, "values") else result
    return [value for value in values if isinstance(value, torch.Tensor) and value.is_floating_point()]


def call(model: nn.Module, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    with torch.no_grad():
        return outputs(model(**inputs))


def rewritten(model: nn.Module, passes: Any, inputs: dict[str, torch.Tensor], **options: Any) -> nn.Module:
    """The model rewritten for inference: captured without gradients, as it is then called."""
    from rewrite import rewrite

    with torch.no_grad():
        return rewrite(model, passes, example_inputs=inputs, **options)


def same_gradients(actual: nn.Module, expected: nn.Module) -> None:
    """Every parameter's gradient is the other model's, within what float32 sums over tokens and layers leave.

    The budget is set by the largest gradient of the model: some (a key projection's bias) are sums that cancel to zero.
    """
    theirs = {name: parameter.grad for name, parameter in expected.named_parameters()}
    largest = max(gradient.abs().max() for gradient in theirs.values() if gradient is not None)
    for name, parameter in actual.named_parameters():
        if theirs.get(name) is None:
            assert parameter.grad is None or name.startswith("rewrite_added."), name
            continue
        assert parameter.grad is not None, name
        assert (parameter.grad - theirs[name]).abs().max() <= 256 * torch.finfo(torch.float32).eps * largest, name
