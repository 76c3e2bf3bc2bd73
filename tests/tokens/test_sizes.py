"""Sizes in a graph mean full lengths: read off short tensors, symbolic, or grouped by reshapes."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from token_graphs import POSITIONS, B, C, H, K, N, pushed, zeroed
from torch import Tensor, fx

from rewrite.tokens.gather import gather_tokens
from rewrite.tokens.structure import reshape_groups
from rewrite.tokens.surgery import Selection, push_selections

QUERIES: dict[str, Callable[[fx.Graph, fx.Node], Any]] = {
    "size(1)": lambda g, x: g.call_method("size", (x, 1)),
    "size(dim=-2)": lambda g, x: g.call_method("size", (x,), {"dim": -2}),
    "size()[1]": lambda g, x: g.call_function(operator.getitem, (g.call_method("size", (x,)), 1)),
    "shape[1]": lambda g, x: g.call_function(operator.getitem, (g.call_function(getattr, (x, "shape")), 1)),
    "shape[:-1][1]": lambda g, x: g.call_function(
        operator.getitem, (g.call_function(operator.getitem, (g.call_function(getattr, (x, "shape")), slice(0, -1))), 1)
    ),
    "sym_size": lambda g, x: g.call_function(torch.ops.aten.sym_size.int, (x, 1)),
    "numel": lambda g, x: g.call_function(operator.floordiv, (g.call_method("numel", (x,)), B * C)),
}


@pytest.mark.parametrize("query", QUERIES)
@pytest.mark.parametrize("symbolic", [False, True])
def test_size_queries_give_the_full_length(query: str, symbolic: bool) -> None:
    graph = fx.Graph()
    length, positions, x = (graph.placeholder(name) for name in ("length", "positions", "x"))
    x.meta["example_value"] = torch.zeros(B, N, C)
    asked = QUERIES[query](graph, x)
    graph.output((graph.call_function(torch.arange, (asked,)),))
    push_selections(graph, {x: {1: Selection(positions, length if symbolic else N, K)}}, frozenset())
    graph.lint()
    module = fx.GraphModule({}, graph)
    assert module(N, POSITIONS, torch.zeros(B, K, C))[0].shape == (N,)


DYNAMIC: dict[str, Callable[..., Tensor]] = {
    "heads": lambda x, y: x.view(x.shape[0], x.shape[1], H, -1).transpose(1, 2).transpose(1, 2).reshape(x.shape[0], x.shape[1], C) + y,
    "expand": lambda x, y: x[:, :, None].expand(x.shape[0], x.shape[1], 2, C).sum(2) * y[: x.shape[1]],
    "sizes of the tokens in numbers": lambda x, y: (x + y) / x.shape[1],
    "arange": lambda x, y: x * y + torch.arange(x.shape[1]).view(-1, 1),
    "slices that are whole": lambda x, y: x[:, : x.shape[1]] + y,
    "batch and tokens merged": lambda x, y: (x.reshape(-1, C) * 2).view(x.shape[0], x.shape[1], C) + y,
    "merged and split heads": lambda x, y: (
        (x.view(x.shape[0], x.shape[1], H, C // H).transpose(1, 2).reshape(-1, x.shape[1], C // H).view(x.shape[0], H, x.shape[1], -1)).sum(
            (1, 3)
        )[..., None]
        + y
    ),
}


@pytest.mark.parametrize("case", DYNAMIC)
def test_symbolic_sizes(case: str) -> None:
    x, y = torch.randn(B, N, C), torch.randn(N, C)
    got, _ = pushed(DYNAMIC[case], x, y, dynamic=True)
    torch.testing.assert_close(got, zeroed(DYNAMIC[case](x, y)))


def test_symbolic_merge_is_restored_at_the_output() -> None:
    x = torch.randn(B, N, C)
    got, _ = pushed(lambda x: x.view(-1, C) * 2, x, dynamic=True)
    torch.testing.assert_close(got, zeroed(x).view(-1, C) * 2)


def test_symbolic_cut_is_restored() -> None:
    def cut(x: Tensor) -> Tensor:
        return x[:, -1:].flatten(0, 1)

    x = torch.randn(B, N, C)
    got, _ = pushed(cut, x, dynamic=True)
    torch.testing.assert_close(got, cut(zeroed(x)))


@given(st.lists(st.sampled_from([1, 2, 3, 4, 5]), min_size=1, max_size=5), st.data())
@settings(max_examples=200, deadline=None)
def test_reshape_groups_hold_the_same_elements(shape: list[int], data: st.DataObject) -> None:
    factors = [f for size in shape for f in ((2, 2) if size == 4 else (size,))]
    target: list[int] = []
    while factors:
        count = data.draw(st.integers(1, len(factors)))
        target.append(math.prod(factors[:count]))
        factors = factors[count:]
        if data.draw(st.booleans()):
            target.append(1)
    import sympy

    groups = reshape_groups(tuple(map(sympy.Integer, shape)), tuple(map(sympy.Integer, target)))
    for ins, outs in groups:
        assert math.prod(shape[i] for i in ins) == math.prod(target[i] for i in outs)
        if len(ins) == len(outs) == 1:
            own = torch.arange(shape[ins[0]]).view([-1 if i == ins[0] else 1 for i in range(len(shape))]).expand(shape)
            new = torch.arange(target[outs[0]]).view([-1 if i == outs[0] else 1 for i in range(len(target))]).expand(target)
            assert torch.equal(own.reshape(target), new)
    assert {i for ins, _ in groups for i in ins} == {i for i, size in enumerate(shape) if size != 1}
    assert {i for _, outs in groups for i in outs} == {i for i, size in enumerate(target) if size != 1}


def test_gather_of_the_functions_themselves() -> None:
    table = torch.randn(N, C, requires_grad=True)
    rows = gather_tokens(table, POSITIONS, 0)
    torch.testing.assert_close(rows, table[POSITIONS])
    rows.sum().backward()
    torch.testing.assert_close(table.grad, torch.bincount(POSITIONS.flatten(), minlength=N).float()[:, None].expand(N, C))
    one = torch.randn(1, N, C)
    torch.testing.assert_close(gather_tokens(one, POSITIONS, 1), one[0][POSITIONS])
    merged = torch.randn(B * H, C, N)
    torch.testing.assert_close(gather_tokens(merged, POSITIONS, -1, rows=H)[3], merged[3][:, POSITIONS[1]])
    torch.testing.assert_close(gather_tokens(one, POSITIONS[:1], 1, batch_axis=None), one[:, POSITIONS[0]])
