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

from rewrite import NotApplicableError
from tests.models.architectures import IMAGE_TOKEN, TEXT_TOKENS, rewritten
from tests.models.oracles import Survivors, attention_replaced_by, best
from tests.models.test_llava import GREEDY, visual_of
from tests.models.test_pictures import budgets

SIDE, PATCH = 56, 14
PATCHES = (SIDE // PATCH) ** 2
# Height and width of a picture: as large as its two crops, cut at the sides, cut above and below; as large as its four crops.
WHOLE, NARROW, FLAT, SQUARE = (56, 112), (56, 84), (28, 112), (112, 112)


# Two attentions of the tower, whose features are what the first layer gives, and two of the text.
TEXT = (2, 3)


def llava_next(implementation: str = "sdpa") -> Any:
    """A LLaVA-NeXT of the real architecture at a width that a CPU test affords; pictures are a thumbnail and two or four crops."""
    torch.manual_seed(0)
    text = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=200,
        max_position_embeddings=2048, bos_token_id=1, eos_token_id=2, pad_token_id=0, initializer_range=0.15,
    )  # fmt: skip
    vision = transformers.CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, image_size=SIDE, patch_size=PATCH,
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
        score = weights[0][:, :, 0, 1:].mean(1)
        return best(score, torch.ones_like(score, dtype=torch.bool), count)

    return kept


def by_budget(rate: float, crops: tuple[int, int]) -> Any:
    """HiRED's choice, as its text says, of one image; the early layer and the late one are the same."""

    def kept(weights: dict[int, torch.Tensor]) -> torch.Tensor:
        score = weights[0][:, :, 0, 1:].sum(1)
        stays = torch.zeros_like(score, dtype=torch.bool)
        for picture, count in enumerate(budgets(score[0].tolist(), rate, 0.5, crops, SIDE // PATCH, False)):
            stays[picture, score[picture].topk(count).indices] = True
        return stays

    return kept


def same(actual: Any, expected: Any, alive: torch.Tensor, inputs: dict[str, torch.Tensor]) -> None:
    real = alive & inputs["attention_mask"].bool()
    scale = expected.logits[real].abs().max()
    assert (actual.logits - expected.logits)[real].abs().max() <= 1e3 * torch.finfo(torch.float32).eps * scale
    assert torch.count_nonzero(actual.logits[~alive]) == 0


@pytest.fixture(scope="module")
def halved() -> nn.Module:
    plain = llava_next()
    return rewritten(llava_next("eager"), ["cls_prune(keep=0.5)"], prompts(plain, [WHOLE, WHOLE]))


@pytest.mark.parametrize("sizes", [[WHOLE, WHOLE], [NARROW, SQUARE, NARROW]], ids=["whole", "different"])
def test_forward(halved: nn.Module, sizes: list[tuple[int, int]]) -> None:
    plain = llava_next()
    inputs = prompts(plain, sizes)
    oracle = oracle_of(plain, inputs, by_cls(PATCHES // 2))
    with torch.no_grad():
        with attention_replaced_by(oracle):
            expected = plain(**inputs)
        assert oracle.alive is not None
        assert not oracle.alive.all()
        for _ in range(2):
            same(halved(**inputs), expected, oracle.alive, inputs)


@pytest.mark.parametrize("sizes", [[FLAT], [NARROW, SQUARE]], ids=["flat", "different"])
def test_token_for_token_in_generate(halved: nn.Module, sizes: list[tuple[int, int]]) -> None:
    plain = llava_next()
    inputs = prompts(plain, sizes)
    with attention_replaced_by(oracle_of(plain, inputs, by_cls(PATCHES // 2))):
        expected = plain.generate(**inputs, **GREEDY)
    assert torch.equal(halved.generate(**inputs, **GREEDY), expected)
    assert not torch.equal(plain.generate(**inputs, **GREEDY), expected)


def test_budgets_of_crops_and_a_copy() -> None:
    plain = llava_next()
    inputs = prompts(plain, [NARROW])
    changed = rewritten(llava_next(), ["hired(keep=0.4, crops=(1, 2))"], inputs)
    oracle = oracle_of(plain, inputs, by_budget(0.4, (1, 2)))
    with torch.no_grad():
        with attention_replaced_by(oracle):
            expected = plain(**inputs)
        assert oracle.alive is not None
        same(copy.deepcopy(changed)(**inputs), expected, oracle.alive, inputs)


def test_new_features_have_no_place() -> None:
    told = "patches of model.vision_tower.* are laid out anew before they are visual tokens, and it makes new features of them"
    with pytest.raises(NotApplicableError, match=told):
        rewritten(llava_next(), ["matryoshka(tokens=4)"], prompts(llava_next(), [WHOLE]))


def test_what_is_computed_of_patches_between_two_graphs_is_told() -> None:
    model = llava_next()
    packing = model.model.pack_image_features

    @torch._dynamo.disable  # type: ignore[untyped-decorator]
    def centred(features: list[torch.Tensor]) -> list[torch.Tensor]:
        return [one - one.mean(0) for one in features]

    def pack(*arguments: Any, **keywords: Any) -> Any:
        features, lengths = packing(*arguments, **keywords)
        return centred(features), lengths

    model.model.pack_image_features = pack
    with pytest.raises(NotApplicableError, match=r"one by one and in order: aten\.mean computes over them between two graphs"):
        rewritten(model, ["cls_prune(keep=0.5)"], prompts(llava_next(), [WHOLE]))
