"""Pictures whose patches are laid out anew between tower and text (LLaVA-NeXT): the original with the dropped tokens masked, in every call.

What stays of the packed tokens is computed by the model's own packing, of features that say for each patch whether it stays.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from rewrite import ModelCallError, NotApplicableError
from tests.models.architectures import IMAGE_TOKEN, TEXT_TOKENS, rewritten
from tests.models.oracles import Survivors, attention_replaced_by, best
from tests.models.test_llava import GREEDY, visual_of
from tests.models.test_selection import TEXT

SIDE, PATCH = 56, 14
PATCHES = (SIDE // PATCH) ** 2
# Height and width of a picture: as large as its two crops, cut at the sides, cut above and below; as large as its four crops.
WHOLE, NARROW, FLAT, SQUARE = (56, 112), (56, 84), (28, 112), (112, 112)


def llava_next(implementation: str = "sdpa") -> Any:
    """A LLaVA-NeXT of the real architecture at a width that a CPU test affords; pictures are a thumbnail and two or four crops."""
    torch.manual_seed(0)
    text = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, vocab_size=200,
        max_position_embeddings=2048, bos_token_id=1, eos_token_id=2, pad_token_id=0, initializer_range=0.15,
    )  # fmt: skip
    vision = transformers.CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, image_size=SIDE, patch_size=PATCH,
        initializer_range=0.15,
    )  # fmt: skip
    config = transformers.LlavaNextConfig(
        text_config=text, vision_config=vision, image_token_id=IMAGE_TOKEN, image_grid_pinpoints=[list(WHOLE), list(SQUARE)],
        initializer_range=0.15,
    )  # fmt: skip
    model = transformers.LlavaNextForConditionalGeneration(config).eval()
    model.set_attn_implementation(implementation)
    return model


def packed(model: Any, features: list[torch.Tensor], sizes: list[tuple[int, int]]) -> list[torch.Tensor]:
    """The model's own packing of features [pictures, P, C] of each image; what ends a line is all ones."""
    made, _ = model.pack_image_features(features, torch.tensor(sizes), "default", torch.ones(features[0].shape[-1]))
    return list(made)


def crops_of(size: tuple[int, int]) -> tuple[int, int]:
    return (2, 2) if size == SQUARE else (1, 2)


def prompts(model: Any, sizes: list[tuple[int, int]], padding: int = 3) -> dict[str, torch.Tensor]:
    """A row for each image, five text tokens in front of it and nine behind; all but the first are padded on the left."""
    generator = torch.Generator().manual_seed(7)
    pictures = [1 + crops_of(size)[0] * crops_of(size)[1] for size in sizes]
    places = [len(one) for one in packed(model, [torch.ones(count, PATCHES, 1) for count in pictures], sizes)]
    rows = [torch.randint(3, TEXT_TOKENS, (14 + count,), generator=generator) for count in places]
    for row, count in zip(rows, places, strict=True):
        row[5 : 5 + count] = IMAGE_TOKEN
    rows = [nn.functional.pad(row, (padding * (index > 0), 0)) for index, row in enumerate(rows)]
    length = max(map(len, rows))
    ids = torch.stack([nn.functional.pad(row, (length - len(row), 0)) for row in rows])
    pixels = torch.randn(len(sizes), max(pictures), 3, SIDE, SIDE, generator=generator)
    mask = (ids != 0).long()
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels, "image_sizes": torch.tensor(sizes)}


def oracle_of(model: Any, inputs: dict[str, torch.Tensor], kept: Any) -> Survivors:
    """The original with the packed tokens masked that are patches which `kept(weights of the tower by layer)` [pictures, P] lets leave."""
    oracle, visual = Survivors(TEXT), visual_of(inputs)
    sizes = [tuple(size) for size in inputs["image_sizes"].tolist()]
    counts = [1 + crops_of(size)[0] * crops_of(size)[1] for size in sizes]  # type: ignore[arg-type]

    def keep(weights: torch.Tensor, alive: torch.Tensor) -> torch.Tensor:
        marks = kept(oracle.weights).float()[..., None]
        stays = torch.cat(packed(model, list(marks.split(counts)), sizes)) > 0.5  # type: ignore[arg-type]
        return alive & ~visual.masked_scatter(visual, ~stays)

    oracle.before[0] = keep
    return oracle


def by_cls(count: int) -> Any:
    """Of each picture the `count` patches that CLS looks at most, in the layer that the features come from."""

    def kept(weights: dict[int, torch.Tensor]) -> torch.Tensor:
        score = weights[1][:, :, 0, 1:].mean(1)
        return best(score, torch.ones_like(score, dtype=torch.bool), count)

    return kept


def same(actual: Any, expected: Any, oracle: Survivors, inputs: dict[str, torch.Tensor]) -> None:
    assert oracle.alive is not None
    real = oracle.alive & inputs["attention_mask"].bool()
    assert real.sum() < inputs["attention_mask"].sum(), "no token left"
    scale = expected.logits[real].abs().max()
    assert (actual.logits - expected.logits)[real].abs().max() <= 1e3 * torch.finfo(torch.float32).eps * scale


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_forward_of_a_batch_and_then_of_other_sizes(implementation: str) -> None:
    plain = llava_next()
    inputs = prompts(plain, [WHOLE, WHOLE])
    changed = rewritten(llava_next(implementation), ["cls_prune(keep=0.5)"], inputs)
    for sizes in ([WHOLE, WHOLE], [NARROW], [FLAT], [SQUARE], [WHOLE], [NARROW], [SQUARE, SQUARE]):
        given = prompts(plain, sizes)
        oracle = oracle_of(plain, given, by_cls(PATCHES // 2))
        with torch.no_grad():
            with attention_replaced_by(oracle):
                expected = plain(**given)
            same(changed(**given), expected, oracle, given)


@pytest.mark.parametrize("sizes", [[WHOLE, WHOLE], [NARROW], [FLAT]], ids=["whole", "narrow", "flat"])
def test_token_for_token_in_generate(sizes: list[tuple[int, int]]) -> None:
    plain = llava_next()
    inputs = prompts(plain, sizes)
    changed = rewritten(llava_next(), ["cls_prune(keep=0.25)"], inputs)
    oracle = oracle_of(plain, inputs, by_cls(PATCHES // 4))
    with attention_replaced_by(oracle):
        expected = plain.generate(**inputs, **GREEDY)
    for model in (changed, changed, copy.deepcopy(changed)):
        assert torch.equal(model.generate(**inputs, **GREEDY), expected)
    assert not torch.equal(plain.generate(**inputs, **GREEDY), expected)
