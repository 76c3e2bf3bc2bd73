"""How the rows of transformers are built and fed: models from configs with seeded random weights, pictures and prompts for any batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from tests.models.corpus.entry import Sites
from tests.models.corpus.weights import stir

PICTURE = 199  # the token of an image in every vocabulary of the table; text tokens are 3 .. 189
# Larger than the default 0.02, so that a random layer's output depends on what was attended to.
SPREAD = {"initializer_range": 0.1}
SPECIAL: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
# A decoder with two query heads of 32 dimensions to a key head; also Mistral's, Qwen's and Gemma's.
LLAMA: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 200, "max_position_embeddings": 256, **SPECIAL, **SPREAD,
}  # fmt: skip
EAGER = ("eager",)

Inputs = Callable[[int], Mapping[str, Any]]


def made(model: str, config: str, /, **options: Any) -> Callable[[str], nn.Module]:
    """Builder of `model` from `config`; sub-configs are dicts, their attention implementation follows the model's."""

    def build(implementation: str) -> nn.Module:
        import transformers

        torch.manual_seed(0)
        settings = getattr(transformers, config)(**options)
        # SDPA is what the library takes by itself; asked for by name, it refuses a model that has a convolutional backbone inside.
        if implementation != "sdpa":
            settings._attn_implementation = implementation
        return stir(getattr(transformers, model)(settings)).eval()

    return build


def seeded(batch: int, *shape: int, seed: int = 1) -> torch.Tensor:
    """Normal numbers; a row is the same in every batch."""
    return torch.stack([torch.randn(*shape, generator=torch.Generator().manual_seed(seed + row)) for row in range(batch)])


def images(size: int, name: str = "pixel_values", **more: Any) -> Inputs:
    return lambda batch: {name: seeded(batch, 3, size, size), **more}


def video(frames: int, size: int, name: str = "pixel_values") -> Inputs:
    return lambda batch: {name: seeded(batch, frames, 3, size, size)}


def tokens(batch: int, length: int, padding: int = 0, left: bool = False, end: int = 0) -> dict[str, torch.Tensor]:
    """Token ids and their mask; all rows but the first are padded. end: the token that closes a row, for models that pool there."""
    ids = torch.stack([torch.randint(3, 190, (length,), generator=torch.Generator().manual_seed(5 + row)) for row in range(batch)])
    mask = torch.ones_like(ids)
    if end:
        ids[0, -1] = end
        ids[1:, length - 1 - padding] = end
    padded = slice(None, padding) if left else slice(length - padding, None)
    ids[1:, padded] = 0
    mask[1:, padded] = 0
    return {"input_ids": ids, "attention_mask": mask}


def texts(length: int, padding: int = 4, left: bool = False, **more: Any) -> Inputs:
    return lambda batch: {**tokens(batch, length, padding, left), **more}


def prompts(batch: int, visual: int, text: int = 14, padding: int = 3, picture: int = PICTURE) -> dict[str, torch.Tensor]:
    """Prompts `5 text tokens, picture, rest of the text`; all rows but the first are padded on the left."""
    made = tokens(batch, text + visual, padding, left=True)
    for row in range(batch):
        start = 5 + (padding if row else 0)
        made["input_ids"][row, start : start + visual] = picture
    return made


def windows(module: str, side: int, window: int, counts: tuple[int, ...]) -> tuple[Sites, ...]:
    """The stages of a Swin: each halves the side of the grid and doubles the heads."""
    return tuple(
        Sites(count, module, window**2, window**2, 2**stage, grid=(side >> stage, side >> stage), window=(window, window))
        for stage, count in enumerate(counts)
    )
