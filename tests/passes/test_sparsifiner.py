"""Sparsifiner: what it declines, what it adds, and which keys it keeps."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_sites import SITES, WIDTH, example, random_parameters, site

from passes import Agent, Routed, Sparsifiner
from rewrite.ir import NotApplicableError, PassError, Program, Site, SparseMap, TokenLayout
from rewrite.ir.semantics import evaluate_operation, sparse_map


def map_of(changed: Site) -> SparseMap:
    (found,) = (operation for operation in changed.body.operations if isinstance(operation, SparseMap))
    return found


@pytest.mark.parametrize(
    ("setting", "case", "words"),
    [
        (Sparsifiner(), SITES["grid, mask"], "it is masked (Ne(padding[b, j], 0))"),
        (Sparsifiner(), SITES["text"], "it is causal"),
        (Sparsifiner(), SITES["cross"], "it is cross-attention"),
        (Sparsifiner(), SITES["cache, not causal"], "KV cache"),
        (Sparsifiner(), site(5), "its 5 tokens over reduce_tokens=6 leave a map of rank 0"),
        (Sparsifiner(reduce_channels=8), SITES["grid"], "its head dim 4 over reduce_channels=8 leaves no channel"),
        (Sparsifiner(), site(49, layout=TokenLayout((14, 14), window=(7, 7))), "it attends in windows of 7x7"),
        (Sparsifiner(layers=(0, 1)), SITES["grid"], "it is layer 3, and layers=(0, 1)"),
        (Sparsifiner(keep=0.99), SITES["grid"], "changes nothing"),
    ],
)
def test_declines(setting: Sparsifiner, case: Site, words: str) -> None:
    ((_, _, reason),) = setting.apply(Program((case,))).declined
    assert words in reason


@pytest.mark.parametrize("first", [Agent(4), Routed(regions=(2, 3), topk=2)])
def test_after_another_pass_it_is_declined(first: Agent | Routed) -> None:
    program = Sparsifiner().apply(first.apply(Program((SITES["grid"],))))
    assert len(program.touched) == 1
    assert program.declined


def test_what_it_adds_has_the_papers_shapes_and_learns_nothing_from_the_models_loss() -> None:
    added = Sparsifiner().apply(Program((SITES["grid, CLS"],))).sites[0].body.parameters
    assert {each.name.removeprefix("sparsifiner_"): each.shape for each in added} == {
        "weight": (WIDTH // 2, WIDTH),
        "bias": (WIDTH // 2,),
        "down": (73, 12),
        "up": (73, 12),
    }
    assert not any(each.trainable for each in added)
    assert [each.init == "zeros" for each in added] == [False, True, False, False]


@settings(max_examples=30, deadline=None)
@given(st.floats(0.01, 0.9), st.integers(6, 40), st.integers(0, 3))
def test_each_query_keeps_its_share_and_the_first_tokens_see_all(keep: float, tokens: int, prefix: int) -> None:
    case = site(tokens, prefix=prefix)
    kept = math.ceil(keep * tokens)
    if kept == tokens:
        return
    shown, program = example(case), Sparsifiner(keep=keep).apply(Program((case,)))
    values = {**shown.operands, **random_parameters(program.sites[0])}
    operation = map_of(program.sites[0])
    evaluate_operation(operation, values)
    counts = values[operation.result].sum(-1)
    assert (counts[:, :, :prefix] == tokens).all()
    assert (counts[:, :, prefix:] == kept).all()


@pytest.mark.parametrize(("scale", "expected"), [("dim", WIDTH**-0.5), ("heads", 2**-0.5)])
def test_the_scale_is_the_papers_or_the_released_codes(scale: str, expected: float) -> None:
    changed = Sparsifiner(scale=scale).apply(Program((site(72, (8, 9)),))).sites[0]
    assert map_of(changed).scale == expected


def test_a_basis_below_the_threshold_counts_for_nothing() -> None:
    """Of a map of rank two, the second direction of the basis is too small to be kept: every query keeps the keys of the first."""
    case = site(12)
    operation = map_of(Sparsifiner(keep=0.25, reduce_channels=1).apply(Program((case,))).sites[0])
    up = torch.zeros(12, 2, dtype=torch.float64)
    up[[1, 4, 7], 0] = 0.5
    up[[2, 5, 8], 1] = 0.02
    down = torch.randn(12, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    values = {**example(case).operands, operation.weight: torch.eye(WIDTH, dtype=torch.float64)}
    values |= {operation.bias: torch.zeros(WIDTH, dtype=torch.float64), operation.down: down, operation.up: up}
    seen = sparse_map(operation, values)
    assert torch.equal(seen, torch.isin(torch.arange(12), torch.tensor([1, 4, 7])).expand(seen.shape))


def test_another_number_of_tokens_is_refused() -> None:
    changed = Sparsifiner().apply(Program((site(24),))).sites[0]
    values = {**example(site(30)).operands, **random_parameters(changed)}
    with pytest.raises(NotApplicableError, match="parameters are for 24 tokens, and there are 30"):
        sparse_map(map_of(changed), values)


@pytest.mark.parametrize(
    "values",
    [{"keep": 0.0}, {"keep": 1.5}, {"reduce_channels": 0}, {"reduce_tokens": 0}, {"coefficients": 0}, {"threshold": -1.0}, {"layers": ()}],
)
def test_out_of_range(values: dict[str, object]) -> None:
    with pytest.raises(PassError, match=r"sparsifiner: .* is out of range"):
        Sparsifiner(**values)
