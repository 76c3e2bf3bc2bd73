"""What Python does to patches between two graphs: followed where it moves them, and forgotten where it computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction

import pytest
import torch
from torch.nn import functional

from rewrite.relay import Relay
from rewrite.tokens.chosen import Choice, Chosen

CHOICE = Choice("a pass", "a tower", Fraction(1, 2))


@pytest.fixture
def relay() -> Iterator[Relay]:
    made = Relay()
    yield made
    made.stop()


def packed(x: torch.Tensor, newline: torch.Tensor) -> torch.Tensor:
    """Crops [2, 6, C] put side by side to one raster of 2 x 6, a line's end behind each row, what is behind the fifth column cut off."""
    raster = x.view(1, 2, 2, 3, -1).permute(4, 0, 2, 1, 3).contiguous().flatten(1, 2).flatten(2, 3)[:, :, :5]
    return torch.cat((raster, newline[:, None, None].expand(*raster.shape[:-1], 1).to(raster)), -1).flatten(1, 2).transpose(0, 1)


def turned(x: torch.Tensor, newline: torch.Tensor) -> torch.Tensor:
    """An index, another type, padding and copies; some tokens twice."""
    return functional.pad(torch.stack(list(x.half().roll(1, 1)))[:, [0, 0, 3, 5]], (0, 0, 1, 0)).flip(0).repeat(1, 2, 1).clone()


@pytest.mark.parametrize("move", [packed, turned])
@pytest.mark.parametrize("training", [False, True])
def test_movement(relay: Relay, move: Callable[..., torch.Tensor], training: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    features, stay = torch.randn(2, 6, 4, generator=generator, requires_grad=training), torch.rand(2, 6, generator=generator) < 0.5
    features = features * 1.0
    relay.follow(features, Chosen(CHOICE, stay))
    result = move(features, torch.randn(4, generator=generator))
    relay.stop()
    found = relay.shadows.read(result)
    assert found is not None
    assert found.choice == CHOICE
    # The same movement of numbers that say which patches leave; what is no patch is zero.
    leaves = move((~stay).float()[..., None].expand(2, 6, 4).contiguous(), torch.zeros(4))
    assert torch.equal(~found.stay, leaves.bool())
    assert not found.stay.all()


@pytest.mark.parametrize(
    ("compute", "told"),
    [
        (lambda x: x + x.flip(0), "add"),
        (lambda x: x.mean(1), "mean"),
        (lambda x: x @ x.mT, "bmm"),
        (lambda x: x.softmax(1), "softmax"),
        (lambda x: x.mul_(2.0), "mul_"),
        (lambda x: torch.zeros(2, 6, 4).copy_(x), "copy_"),
    ],
    ids=["sum", "mean", "product", "softmax", "write", "buffer"],
)
def test_what_is_computed_has_no_patches(relay: Relay, compute: Callable[[torch.Tensor], torch.Tensor], told: str) -> None:
    features = torch.randn(2, 6, 4)
    relay.follow(features, Chosen(CHOICE, torch.ones(2, 6, dtype=torch.bool)))
    # What is no patch any more is not taken for a token of another kind.
    result = torch.cat([compute(features).flatten(), torch.randn(3)])
    relay.stop()
    found = relay.shadows.read(result)
    assert found is not None
    assert found.lost is not None
    assert told in found.lost
