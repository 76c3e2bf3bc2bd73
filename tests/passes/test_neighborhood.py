"""Windows against the formula of the NATTEN library, query by query."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_sites import CAUSAL, SITES, site

from passes import Neighborhood, SinkRedistribution
from rewrite.ir import PassError, Program, Site
from rewrite.ir.semantics import evaluate_expression, positions


def natten(query: int, length: int, window: int, dilation: int, causal: bool) -> set[int]:
    """The keys of one query, stride 1, as csrc/include/natten/cuda/reference/mask.hpp computes them."""
    left, right = window // 2, window // 2 + window % 2 - 1
    group, lead = query % dilation, query // dilation
    size = length // dilation + (1 - ((group + (dilation - length % dilation)) // dilation))
    if causal:
        start, end = max(lead - left - right, 0), min(lead + 1, size)
    else:
        start = max(lead - left, 0) + (size - right - lead - 1 if lead + right >= size else 0)
        end = start + window
    return {group + dilation * key for key in range(start, end)}


def seen(setting: Neighborhood, case: Site) -> torch.Tensor:
    """[Nq, Nk] bool: the rewritten site's mask."""
    program = setting.apply(Program((case,)))
    assert program.touched, program.declined
    queries, keys = case.dims["Nq"], case.dims["Nk"]
    mask = evaluate_expression(program.sites[0].attend.mask, positions(queries, keys, torch.device("cpu")))
    return mask.expand(1, 1, queries, keys)[0, 0]


@st.composite
def axes(draw: st.DrawFn, most: int = 24) -> tuple[int, int, int]:
    """(length, window, dilation) with a window that fits and leaves something out."""
    length = draw(st.integers(2, most))
    window = draw(st.integers(1, length - 1))
    return length, window, draw(st.integers(1, length // window))


@settings(max_examples=150, deadline=None)
@given(axes(), st.integers(0, 3))
def test_windows_along_a_sequence(axis: tuple[int, int, int], prefix: int) -> None:
    length, window, dilation = axis
    mask = seen(Neighborhood(window, dilation), site(length + prefix, prefix=prefix))
    assert mask[:prefix].all()
    assert mask[:, :prefix].all()
    for query in range(length):
        keys = natten(query, length, window, dilation, causal=False)
        assert len(keys) == window
        assert set((mask[prefix + query, prefix:]).nonzero().flatten().tolist()) == keys


@settings(max_examples=100, deadline=None)
@given(axes(), st.data())
def test_causal_windows_with_and_without_a_cache(axis: tuple[int, int, int], data: st.DataObject) -> None:
    length, window, dilation = axis
    queries = data.draw(st.integers(1, length))
    mask = seen(Neighborhood(window, dilation), site(length, queries=queries, mask=CAUSAL))
    for query in range(queries):
        position = length - queries + query
        assert set(mask[query].nonzero().flatten().tolist()) == natten(position, length, window, dilation, causal=True)


@settings(max_examples=60, deadline=None)
@given(st.tuples(axes(9), axes(9)), st.sampled_from((0, 1, 5)))
def test_windows_on_a_grid(both: tuple[tuple[int, int, int], tuple[int, int, int]], prefix: int) -> None:
    (height, *down), (width, *across) = both
    case = site(prefix + height * width, (height, width), prefix)
    mask = seen(Neighborhood((down[0], across[0]), (down[1], across[1])), case)
    for row, column in itertools.product(range(height), range(width)):
        rows, columns = natten(row, height, *down, causal=False), natten(column, width, *across, causal=False)
        keys = {*range(prefix), *(prefix + r * width + c for r in rows for c in columns)}
        assert set(mask[prefix + row * width + column].nonzero().flatten().tolist()) == keys


def test_a_causal_window_longer_than_the_sequence_sees_all_of_it() -> None:
    assert torch.equal(seen(Neighborhood(100), SITES["text"]), torch.ones(24, 24, dtype=torch.bool).tril())


def test_the_sites_own_mask_stays_and_stays_causal() -> None:
    changed = Neighborhood(4).apply(Program((SITES["image and text, padded"],))).sites[0]
    assert changed.causal
    assert "padding" in changed.attend.tensors()


def test_windows_after_redistribution_keep_its_groups() -> None:
    program = Neighborhood(4).apply(SinkRedistribution().apply(Program((SITES["image and text"],))))
    assert len(program.touched) == 2
    assert program.sites[0].attend.groups is not None


@pytest.mark.parametrize(
    ("setting", "case", "words"),
    [
        (Neighborhood(9), "grid", "window 9 x dilation 1 = 9 is more than the 8 tokens of axis 0"),
        (Neighborhood((3, 3), (1, 4)), "grid", "window 3 x dilation 4 = 12 is more than the 9 tokens of axis 1"),
        (Neighborhood((3, 3)), "sequence", "window=(3, 3) has 2 entries, and its tokens lie along 1 axes"),
        (Neighborhood(3, dilation=(1,)), "grid", "dilation=(1,) has 1 entries"),
        (Neighborhood(3), "grid, other count", "0 prefix tokens and the grid 8x9 make 72 tokens, it has 49"),
        (Neighborhood(3), "cache, not causal", "KV cache of 24 keys"),
        (Neighborhood(3, layers=(0, 1)), "grid", "it is layer 3, and layers=(0, 1)"),
        (Neighborhood((8, 9)), "grid", "changes nothing"),
    ],
)
def test_declines(setting: Neighborhood, case: str, words: str) -> None:
    ((_, _, reason),) = setting.apply(Program((SITES[case],))).declined
    assert words in reason


@pytest.mark.parametrize(
    "values", [{"window": 0}, {"window": ()}, {"dilation": -1}, {"window": "all", "dilation": 2}, {"layers": (1, 1)}, {"window": (3, 0)}]
)
def test_out_of_range(values: dict[str, object]) -> None:
    with pytest.raises(PassError, match=r"neighborhood: .* is out of range"):
        Neighborhood(**values)
