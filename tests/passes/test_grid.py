"""MaxViT's partitions against attention computed inside reshaped features."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_sites import SITES, site
from test_neighborhood import seen

from passes import Grid
from rewrite.ir import PassError, Program


def partitioned(grid: tuple[int, int], size: int, kind: str) -> list[set[int]]:
    """The tokens of every part, by the published code's reshapes."""
    (height, width), number = grid, torch.arange(grid[0] * grid[1]).view(1, *grid, 1)
    if kind == "block":
        parts = number.reshape(1, height // size, size, width // size, size, 1).transpose(2, 3)
    else:
        parts = number.reshape(1, size, height // size, size, width // size, 1).permute(0, 2, 4, 1, 3, 5)
    return [set(part.tolist()) for part in parts.reshape(-1, size * size)]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(2, 3), st.sampled_from(("block", "grid")), st.sampled_from((0, 1, 5)))
def test_parts(size: int, down: int, across: int, kind: str, prefix: int) -> None:
    grid = (size * down, size * across)
    mask = seen(Grid(size, kind), site(prefix + grid[0] * grid[1], grid, prefix))
    assert mask[:prefix].all()
    assert mask[:, :prefix].all()
    for part in partitioned(grid, size, kind):
        for token in part:
            assert set(mask[prefix + token, prefix:].nonzero().flatten().tolist()) == part


def test_layers_alternate_and_begin_with_blocks() -> None:
    case = SITES["grid of even sides"]
    for layer, kind in enumerate(("block", "grid", "block", "grid")):
        assert torch.equal(seen(Grid(4), replace(case, layer=layer)), seen(Grid(4, kind), replace(case, layer=layer)))
    assert not torch.equal(seen(Grid(4, "block"), case), seen(Grid(4, "grid"), case))


@pytest.mark.parametrize(
    ("setting", "case", "words"),
    [
        (Grid(4), "grid", "its grid of 8x9 tokens cannot be cut into parts of 4x4"),
        (Grid(7), "grid, other count", "make 72 tokens, it has 49"),
        (Grid(2), "sequence", "its tokens lie on no grid"),
        (Grid(2), "image and text", "it is causal"),
    ],
)
def test_declines(setting: Grid, case: str, words: str) -> None:
    ((_, _, reason),) = setting.apply(Program((SITES[case],))).declined
    assert words in reason


def test_one_part_changes_nothing() -> None:
    ((_, _, reason),) = Grid(6).apply(Program((site(36, (6, 6)),))).declined
    assert "changes nothing" in reason


@pytest.mark.parametrize("values", [{"size": 0}, {"kind": "window"}, {"layers": ()}])
def test_out_of_range(values: dict[str, object]) -> None:
    with pytest.raises(PassError, match="grid: "):
        Grid(**values)
