"""Halos against blocks cut out of a padded grid, as the paper computes them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_sites import SITES, site
from test_neighborhood import seen
from torch.nn import functional

from passes import Halo
from rewrite.ir import PassError, Program


@settings(max_examples=25, deadline=None)
@given(st.tuples(st.integers(1, 9), st.integers(2, 9)), st.integers(1, 8), st.integers(0, 5), st.sampled_from((0, 1, 4)))
def test_blocks_and_their_halos(grid: tuple[int, int], block: int, halo: int, prefix: int) -> None:
    height, width = grid
    block = min(block, max(grid) - 1)
    mask = seen(Halo(block, halo), site(prefix + height * width, grid, prefix))
    assert mask[:prefix].all()
    assert mask[:, :prefix].all()
    # Token numbers from 1, zeros where a block or its halo leaves the grid: every block unfolds to the keys that it sees.
    down, right = -height % block, -width % block
    numbers = functional.pad(torch.arange(1, height * width + 1).view(1, 1, height, width), (halo, halo + right, halo, halo + down))
    unfolded = functional.unfold(numbers.double(), block + 2 * halo, stride=block)[0].T.long()
    across = (width + right) // block
    for token in range(height * width):
        keys = unfolded[token // width // block * across + token % width // block]
        assert (mask[prefix + token, prefix:].nonzero().flatten() + 1).tolist() == sorted(keys[keys > 0].tolist())


def test_a_block_as_large_as_the_grid_changes_nothing() -> None:
    ((_, _, reason),) = Halo(9, 0).apply(Program((SITES["grid"],))).declined
    assert "changes nothing" in reason


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("sequence", "its tokens lie on no grid"),
        ("volume", "its tokens lie on a grid of frames"),
        ("text", "it is causal"),
        ("grid, other count", "make 72 tokens, it has 49"),
    ],
)
def test_declines(case: str, words: str) -> None:
    ((_, _, reason),) = Halo(3).apply(Program((SITES[case],))).declined
    assert words in reason


@pytest.mark.parametrize("values", [{"block": 0}, {"halo": -1}, {"layers": (-1,)}])
def test_out_of_range(values: dict[str, object]) -> None:
    with pytest.raises(PassError, match=r"halo: .* is out of range"):
        Halo(**values)
