"""Rows that keep different numbers of patches, against each row by itself."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rewrite.tokens import choose


def by_itself(score: list[float], there: list[int], keep: float, mass: float) -> list[int]:
    """Places of one row's patches that stay, of those that are there."""
    ranked, stay, reached = sorted(there, key=lambda at: (-score[at], at)), list[int](), 0.0
    total = sum(score[at] for at in there)
    for at in ranked[: max(1, math.ceil(keep * len(there)))]:
        if stay and reached >= mass * total:
            break
        stay.append(at)
        reached += score[at]
    return sorted(stay)


@settings(deadline=None, max_examples=60)
@given(
    patches=st.integers(1, 12),
    rows=st.integers(1, 3),
    ends=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    keep=st.floats(0.05, 1.0),
    mass=st.floats(0.05, 0.99),
    padded=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_as_each_row_alone(patches: int, rows: int, ends: tuple[int, int], keep: float, mass: float, padded: bool, seed: int) -> None:
    prefix, suffix = ends
    generator = torch.Generator().manual_seed(seed)
    score = torch.rand(rows, prefix + patches + suffix, generator=generator, dtype=torch.float64) ** 3
    present = torch.rand(score.shape, generator=generator) < 0.7
    present[:, :prefix] = present[:, prefix + patches :] = True
    present[:, prefix] = True  # one patch at least
    most = max(1, math.ceil(keep * patches))
    places, stays = choose.patches_of_mass(score.masked_fill(~present, 0.0), present, ends, most, (keep, "ceil"), mass, padded)
    assert places.shape == stays.shape
    expected = []
    for row in range(rows):
        there = [at for at in range(prefix, prefix + patches) if present[row, at]]
        around = [*range(prefix), *range(prefix + patches, prefix + patches + suffix)]
        expected.append(sorted(by_itself(score[row].tolist(), there, keep, mass) + around))
        assert places[row][stays[row]].tolist() == expected[-1]
        assert places[row].tolist() == sorted(set(places[row].tolist()))
    assert places.shape[1] == prefix + suffix + most if padded else places.shape[1] == max(map(len, expected))


def test_what_goes_into_a_fused_token() -> None:
    """All that leaves, padding among it; a row that nothing leaves has none."""
    stream = torch.tensor([[1.0, 2.0, 4.0, 8.0], [1.0, 2.0, 4.0, 8.0]])[..., None]
    positions, stays = torch.tensor([[0, 1, 2], [0, 1, 2]]), torch.tensor([[True, True, False], [True, True, True]])
    before = torch.tensor([[True] * 4, [True, True, True, False]])
    score = torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 0.0]])
    fused = choose.fused_of_mass(stream, positions, stays, score, 0)
    assert fused[..., 0].tolist() == [[1, 2, 4, 12], [1, 2, 4, 0]]
    present = choose.present_with_fused(stays, before, 4, 0)
    assert present.tolist() == [[True, True, False, True], [True, True, True, False]]


@pytest.mark.parametrize("mass", [0.0, 1.0])
def test_a_mass_out_of_range(mass: float) -> None:
    from rewrite import PassError, parse_pass

    with pytest.raises(PassError, match=r"mass=.*above 0 and below 1"):
        parse_pass(f"evit(mass={mass})")
