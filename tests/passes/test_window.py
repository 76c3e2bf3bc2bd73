"""Sliding windows with sinks, query by query."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_sites import CAUSAL, SITES, site
from test_neighborhood import seen

from passes import Window
from rewrite.ir import PassError, Program, TokenLayout


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), st.integers(1, 35), st.integers(0, 6), st.integers(0, 3), st.data())
def test_causal_windows_with_and_without_a_cache(length: int, window: int, sinks: int, prefix: int, data: st.DataObject) -> None:
    queries = data.draw(st.integers(1, length))
    mask = seen(Window(window, sinks), site(length, prefix=prefix, queries=queries, mask=CAUSAL))
    for query in range(queries):
        position = length - queries + query
        last, first = range(max(0, position - window + 1), position + 1), range(min(max(sinks, prefix), position + 1))
        assert set(mask[query].nonzero().flatten().tolist()) == {*last, *first}


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(1, 35), st.integers(0, 6), st.integers(0, 3))
def test_windows_on_both_sides(length: int, window: int, sinks: int, prefix: int) -> None:
    mask, everywhere = seen(Window(window, sinks), site(length, prefix=prefix)), max(sinks, prefix)
    for query in range(length):
        near = range(max(0, query - window // 2), min(length, query + window // 2 + 1))
        expected = set(range(length)) if query < everywhere else {*near, *range(min(everywhere, length))}
        assert set(mask[query].nonzero().flatten().tolist()) == expected


def test_decoding_step_by_step_sees_what_the_whole_sequence_does() -> None:
    whole = seen(Window(5, 2), site(12, mask=CAUSAL))
    for keys in range(1, 13):
        step = seen(Window(5, 2), site(keys, queries=1, mask=CAUSAL))
        assert torch.equal(step[0], whole[keys - 1, :keys])


def test_tokens_behind_a_grid_are_part_of_the_sequence() -> None:
    behind = site(59, layout=TokenLayout((6, 8), 1, suffix=10))
    assert Window(5, 0).declines(behind) is None
    assert seen(Window(5, 0), behind)[58].nonzero().flatten().tolist() == [0, 56, 57, 58]


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (SITES["cache, not causal"], "KV cache of 24 keys"),
        (site(49, layout=TokenLayout((14, 14), window=(7, 7))), "windows of 7x7"),
        (site(49, layout=TokenLayout((7, 7), raster=False)), "not in row-major order"),
        (SITES["cross"], "cross-attention"),
    ],
)
def test_declines(case: object, words: str) -> None:
    ((_, _, reason),) = Window(5).apply(Program((case,))).declined
    assert words in reason


@pytest.mark.parametrize("values", [{"window": 0}, {"sinks": -1}, {"layers": ()}])
def test_out_of_range(values: dict[str, object]) -> None:
    with pytest.raises(PassError, match=r"window: .* is out of range"):
        Window(**values)
