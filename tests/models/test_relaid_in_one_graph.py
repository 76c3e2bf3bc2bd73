"""Patches laid out anew in the graph of their tower: which movement is followed, and what is refused with its reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from rewrite import NotApplicableError
from tests.models.architectures import llava, llava_inputs, rewritten
from tests.models.corpus.cases import EVERYTHING
from tests.models.oracles import Survivors, attention_replaced_by, best
from tests.models.test_llava import visual_of

SIDE, KEPT = 4, 6
# Two attentions of the tower, whose features are what the first layer gives, and two of the text.
TEXT = (2, 3)


def rows(x: torch.Tensor, newline: torch.Tensor) -> torch.Tensor:
    """Column by column, the first column cut off, and behind each of the others a token that ends it."""
    columns = x.unflatten(1, (SIDE, SIDE)).transpose(1, 2)[:, 1:].contiguous()
    ends = newline.expand(len(x), SIDE - 1, 1, -1).to(x)
    return nn.functional.pad(torch.cat((columns, ends), 2).flatten(1, 2), (0, 0, 0, 1))


def pictures_apart(x: torch.Tensor, newline: torch.Tensor) -> torch.Tensor:
    """Picture by picture the last patches first, without the first; channels in front meanwhile."""
    made = [torch.cat([part[8:].mT, part[1:8].mT, newline[:, None]], -1) for part in x.unbind()]
    return torch.stack(made).permute(0, 2, 1).float()


def twice(x: torch.Tensor, newline: torch.Tensor) -> torch.Tensor:
    """Some patches two times, behind an index, scaled."""
    return x[:, [3, 2, 1, 0, 15, 15, 8, 9, 10, 11, 3, 3, 0, 1, 12, 13]] * newline


def mixed(x: torch.Tensor, newline: torch.Tensor) -> torch.Tensor:
    made = rows(x, newline)
    return made + made.roll(1, 1)


def shuffled(x: torch.Tensor, newline: torch.Tensor) -> torch.Tensor:
    """Halves of two patches in one token."""
    return rows(x.unflatten(-1, (2, -1)).unflatten(1, (8, 2)).transpose(2, 3).flatten(-2).reshape(x.shape), newline)


def averaged(x: torch.Tensor, newline: torch.Tensor) -> torch.Tensor:
    made = rows(x, newline)
    return made - made.mean(1, keepdim=True)


class Packed(nn.Module):
    """A projector that lays the patches out anew behind it."""

    def __init__(self, projector: nn.Module, packing: Any, width: int = 64) -> None:
        super().__init__()
        self.projector, self.packing = projector, packing
        self.newline = nn.Parameter(torch.randn(width, generator=torch.Generator().manual_seed(3)))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.packing(self.projector(features), self.newline)
        return made


def packed(packing: Any, implementation: str = "sdpa") -> Any:
    model: Any = llava(implementation, layers=2, vision_layers=2)
    model.model.multi_modal_projector = Packed(model.model.multi_modal_projector, packing)
    return model


@pytest.mark.parametrize("packing", [rows, pictures_apart, twice] if EVERYTHING else [pictures_apart, twice])
def test_movement_is_followed(packing: Any) -> None:
    plain, inputs = packed(packing), llava_inputs()
    visual, oracle = visual_of(inputs), Survivors(TEXT)

    def keep(weights: torch.Tensor, alive: torch.Tensor) -> torch.Tensor:
        score = oracle.weights[0][:, :, 0, 1:].mean(1)
        kept = best(score, torch.ones_like(score, dtype=torch.bool), KEPT).float()[..., None]
        marks = packing(kept - 1.0, torch.zeros(1) if packing is not twice else torch.ones(1))
        return alive & ~visual.masked_scatter(visual, marks.flatten() < -0.5)

    oracle.before[0] = keep
    changed = rewritten(packed(packing, "eager"), [f"cls_prune(keep={KEPT})"], inputs)
    with torch.no_grad():
        with attention_replaced_by(oracle):
            expected = plain(**inputs).logits
        actual = changed(**inputs).logits
    assert oracle.alive is not None
    assert not oracle.alive.all()
    real = oracle.alive & inputs["attention_mask"].bool()
    assert (actual - expected)[real].abs().max() <= 1e3 * torch.finfo(torch.float32).eps * expected[real].abs().max()
    assert torch.count_nonzero(actual[~oracle.alive]) == 0


def test_nothing_changes_where_every_patch_stays() -> None:
    inputs = llava_inputs()
    changed = rewritten(packed(rows), [f"cls_prune(keep={SIDE * SIDE})"], inputs)
    with torch.no_grad():
        assert torch.equal(changed(**inputs).logits, packed(rows)(**inputs).logits)


@pytest.mark.skipif(torch.__version__ < "2.12", reason="Dynamo traces the model in one graph from 2.12 on")
@pytest.mark.parametrize(
    ("packing", "one", "told"),
    [
        (mixed, "cls_prune", "in order: .* mixes them with one another"),
        (shuffled, "cls_prune", "in order: .* channels of several"),
        (averaged, "cls_prune", "in order: .* computes over them"),
        (rows, "dominant_contextual", "laid out anew before they are visual tokens, and it makes new features"),
    ],
    ids=["mixed", "shuffled", "averaged", "contextual"],
)
def test_what_else_happens_to_patches_is_refused(packing: Any, one: str, told: str) -> None:
    with pytest.raises(NotApplicableError, match=told):
        rewritten(packed(packing), [one], llava_inputs())
