"""Passes that need a whole grid, on sites whose tokens are not one; and how such sites are told."""

from __future__ import annotations

import pytest
from synthetic_sites import site

from passes.linearize.agent import Agent
from passes.sparsify.neighborhood import Neighborhood
from rewrite.ir import TokenLayout

LAYOUTS: dict[str, tuple[TokenLayout, str]] = {
    "grid 14x14, windows 7x7, shifted": (TokenLayout((14, 14), window=(7, 7), shifted=True), "it attends in windows of 7x7"),
    "grid 14x14, dilated windows 7x7": (
        TokenLayout((14, 14), window=(7, 7), partition="grid"),
        "it attends in dilated windows of 7x7",
    ),
    "1 prefix + grid 4x7x7, windows 1x7x7": (TokenLayout((4, 7, 7), 1, window=(1, 7, 7)), "it attends in windows of 1x7x7"),
    "grid 7x7, reordered": (TokenLayout((7, 7), raster=False), "the tokens of its grid 7x7 are not in row-major order"),
    "1 prefix + grid 6x8 + 10 behind": (TokenLayout((6, 8), 1, suffix=10), "10 tokens follow its grid"),
}


@pytest.mark.parametrize("text", LAYOUTS)
def test_a_part_of_a_grid_is_declined(text: str) -> None:
    layout, reason = LAYOUTS[text]
    windowed = site(49, layout=layout)
    assert str(layout) == text
    assert Neighborhood(window=3).declines(windowed) == reason
    assert Agent(tokens=9).declines(windowed) == reason


def test_a_whole_grid_is_none_of_these() -> None:
    assert TokenLayout((7, 7), 1).partial is None
    assert Neighborhood(window=3).declines(site(49, (7, 7))) is None
