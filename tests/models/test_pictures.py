"""Budgets of crops, and pictures pooled on their grid: a LLaVA against the original with tokens masked or features replaced by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rewrite import ModelCallError
from rewrite.ir import Count, Crops, Received
from rewrite.tokens.crops import patches_by_crop
from tests.models.architectures import IMAGE_TOKEN, llava, llava_inputs, rewritten
from tests.models.oracles import Survivors, attention_replaced_by
from tests.models.test_llava import GREEDY, visual_of
from tests.models.test_selection import TEXT


def five_pictures_a_row() -> dict[str, torch.Tensor]:
    """Two rows, the second padded on the left, each with a thumbnail and four crops of 16 patches."""
    inputs = llava_inputs(batch=2)
    ids = torch.cat([inputs["input_ids"]] + [inputs["input_ids"][:, 5:]] * 4, dim=1)
    mask = torch.cat([inputs["attention_mask"]] + [torch.ones_like(inputs["attention_mask"][:, 5:])] * 4, dim=1)
    ids[1, 30:][ids[1, 30:] == 0] = 7
    pictures = torch.randn(10, 3, 56, 56, generator=torch.Generator().manual_seed(5))
    assert (ids == IMAGE_TOKEN).sum(1).tolist() == [80, 80]
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pictures}


def budgets(early: list[float], rate: float, alpha: float, crops: tuple[int, int], side: int, bands: bool) -> list[int]:
    """How many patches the thumbnail and each crop keep, as the method's text says; early: the thumbnail's scores."""
    patches, number = side * side, crops[0] * crops[1]
    budget = int((number + 1) * patches * rate)
    full = min(int(budget * alpha), patches)
    rest = min(budget - full, number * patches)
    busy = sorted(range(patches), key=lambda patch: -early[patch])[: int(patches * (1 - alpha))]
    marks = [0] * number
    for patch in busy:
        row, column = divmod(patch, side)
        marks[patch // (patches // number) if bands else row * crops[0] // side * crops[1] + column * crops[1] // side] += 1
    owed = [rest * mark / len(busy) for mark in marks]
    kept = [min(int(one), patches) for one in owed]
    while sum(kept) < rest:
        open_ = [crop for crop in range(number) if kept[crop] < patches]
        kept[max(open_, key=lambda crop: owed[crop] - kept[crop])] += 1
    return [full, *kept]


@pytest.mark.parametrize(("rate", "alpha", "bands"), [(0.2, 0.5, False), (0.2, 0.5, True), (0.6, 0.25, False), (0.9, 0.9, True)])
def test_budgets_go_where_the_thumbnail_is_busy(rate: float, alpha: float, bands: bool) -> None:
    random = torch.Generator().manual_seed(int(100 * rate))
    early, late = torch.rand(10, 17, generator=random), torch.rand(10, 17, generator=random)
    # All that is busy lies in the first crop: more is owed to it than it has patches.
    early[0, 1:] = torch.arange(16).flip(0)
    numbers = Crops(Received(("early",), (0, 1)), 2, 2, alpha, bands).numbers(Count(rate, "floor"), 16)
    stay = patches_by_crop(early, late, 1, (4, 4), (2, 2), *numbers, bands)
    for image in range(2):
        expected = budgets(early[5 * image, 1:].tolist(), rate, alpha, (2, 2), 4, bands)
        assert stay[5 * image : 5 * image + 5].sum(1).tolist() == expected
        for picture, count in enumerate(expected, 5 * image):
            best = late[picture, 1:].topk(count).indices
            assert stay[picture].nonzero().flatten().tolist() == sorted(best.tolist())


def test_pictures_that_are_no_whole_images() -> None:
    with pytest.raises(ModelCallError, match="6 pictures are no whole images of 5"):
        patches_by_crop(torch.rand(6, 17), torch.rand(6, 17), 1, (4, 4), (2, 2), 8, 8, 8, False)


def test_hired_token_for_token_in_generate() -> None:
    inputs = five_pictures_a_row()
    visual, plain, oracle = visual_of(inputs), llava("sdpa"), Survivors(TEXT)
    changed = rewritten(llava("eager"), ["hired(keep=0.3, crops=(2, 2))"], inputs)

    def keep(weights: torch.Tensor, alive: torch.Tensor) -> torch.Tensor:
        early, late = (oracle.weights[layer][:, :, 0, 1:].sum(1) for layer in (0, 1))
        stays = torch.zeros(10, 16, dtype=torch.bool)
        for image in range(2):
            for picture, count in enumerate(budgets(early[5 * image].tolist(), 0.3, 0.5, (2, 2), 4, False), 5 * image):
                stays[picture, late[picture].topk(count).indices] = True
        return alive & ~visual.masked_scatter(visual, ~stays)

    oracle.before[0] = keep
    with attention_replaced_by(oracle):
        expected = plain.generate(**inputs, **GREEDY)
    assert oracle.alive is not None
    assert (oracle.alive & visual).sum(1).tolist() == [24, 24]
    assert torch.equal(changed.generate(**inputs, **GREEDY), expected)
    assert not torch.equal(plain.generate(**inputs, **GREEDY), expected)


def test_pooled_pictures_in_generate_with_beams() -> None:
    inputs, options = llava_inputs(), {"num_beams": 2}
    visual, plain, oracle = visual_of(inputs), llava("sdpa"), Survivors(TEXT)
    changed = rewritten(llava("eager"), ["matryoshka(tokens=4)"], inputs)

    def pool(module: Any, given: Any, output: torch.Tensor) -> torch.Tensor:
        pooled = torch.nn.functional.avg_pool2d(output.mT.unflatten(-1, (4, 4)), 2)
        made = output.clone()
        for cell, patch in enumerate((0, 2, 8, 10)):
            made[:, patch] = pooled.flatten(2)[..., cell]
        return made

    first = torch.tensor([patch in (0, 2, 8, 10) for patch in range(16)]).expand(2, -1)
    beams = visual.repeat_interleave(options["num_beams"], dim=0)

    def leave(weights: torch.Tensor, alive: torch.Tensor) -> torch.Tensor:
        return alive & ~beams.masked_scatter(beams, ~first.repeat_interleave(options["num_beams"], dim=0))

    oracle.before[0] = leave
    handle = plain.model.multi_modal_projector.register_forward_hook(pool)
    with attention_replaced_by(oracle):
        expected = plain.generate(**inputs, **GREEDY, **options)
    handle.remove()
    assert torch.equal(changed.generate(**inputs, **GREEDY, **options), expected)
    assert not torch.equal(plain.generate(**inputs, **GREEDY, **options), expected)
