"""Masks of the sparse passes through the torch lowering, which visits only the keys they leave: results and gradients, shapes drawn."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_sites import CAUSAL, Example, example, site

from codegen.masks import static_key, visible_pairs
from codegen.operator import attend
from codegen.visits import best_plan, visits
from passes import Grid, Halo, Neighborhood, Window
from rewrite.ir import Attend, Pass, Program


def compare(setting: Pass, shown: Example) -> None:
    """The operator on the rewritten site against the pass's reference, and the gradients of query, key and value, in float64."""
    (changed,) = setting.apply(Program((shown.site,))).sites
    operands = [shown.operands[name].clone().requires_grad_() for name in ("query", "key", "value")]
    actual = attend(changed.attend, *operands, shown.operands)
    scale = float(changed.scale)
    inputs = shown.inputs({})
    query, key, value = operands
    repeat = query.shape[1] // key.shape[1]
    key, value = (operand.repeat_interleave(repeat, dim=1) for operand in (key, value))
    dots = (scale * query @ key.transpose(-2, -1)).masked_fill(inputs.logits == -torch.inf, -torch.inf)
    known = type(inputs)(query=query, key=key, value=value, logits=dots, site=shown.site)
    expected = setting.reference(known)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    weight = torch.randn(actual.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    pairs = zip(*(torch.autograd.grad((out * weight).sum(), operands) for out in (actual, expected)), strict=True)
    for got, wanted in pairs:
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-11)


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 5), st.booleans(), st.data())
def test_windows(tokens: int, window: int, sinks: int, causal: bool, data: st.DataObject) -> None:
    queries = data.draw(st.integers(1, tokens)) if causal else None
    heads = data.draw(st.sampled_from(((2, 2), (4, 2), (3, 1))))
    compare(Window(window, sinks), example(site(tokens, queries=queries, heads=heads, **({"mask": CAUSAL} if causal else {}))))


@settings(max_examples=12, deadline=None)
@given(st.tuples(st.integers(2, 5), st.integers(1, 4)), st.sampled_from((0, 1, 3)), st.sampled_from(("halo", "grid", "neighborhood")))
def test_on_grids(sides: tuple[int, int], prefix: int, name: str) -> None:
    grid = (2 * sides[0], 2 * sides[1])
    setting = {"halo": Halo(3, 1), "grid": Grid(2, "grid"), "neighborhood": Neighborhood(2, causal=(False, True), stride=2)}[name]
    compare(setting, example(site(prefix + grid[0] * grid[1], grid, prefix, heads=(4, 2))))


def visited(attend_: Attend, tokens: int) -> float:
    """The pairs that the plan visits, for each pair that is seen."""
    key, device = static_key(attend_.mask), torch.device("cpu")
    plan = best_plan(key, tokens, tokens)
    found = visits(key, tokens, tokens, plan, device)
    return sum(visit.n_queries * len(visit.key_positions(device)) for visit in found) / visible_pairs(attend_.mask, tokens, tokens)


@pytest.mark.parametrize(
    ("setting", "prefix", "most"),
    [
        (Window(256), 0, 1.6),  # blocks of 128 queries: 256 + 128 keys for 257
        (Neighborhood(13, dilation=2), 1, 3.0),  # residues apart, tiles of 8 x 8: (8 + 12)^2 keys for 13^2
        (Halo(8, 4), 1, 1.3),  # a block's queries see the same keys
        (Grid(8, "block"), 0, 1.3),
        (Grid(8, "grid"), 1, 1.3),
    ],
)
def test_the_plan_visits_little_more_than_is_seen(setting: Pass, prefix: int, most: float) -> None:
    tokens = prefix + 48 * 48
    (changed,) = setting.apply(Program((site(tokens, (48, 48), prefix),))).sites
    assert visited(changed.attend, tokens) <= most
