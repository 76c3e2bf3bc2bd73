"""What cannot be carried on fewer tokens is an error that names the node, the operator, the module and what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from token_graphs import POSITIONS, B, C, H, K, N, pushed, traced
from torch import Tensor, fx, nn
from torch.nn import functional as F

from rewrite.ir.errors import ModelCallError, NotApplicableError
from rewrite.tokens.gather import kept_positions
from rewrite.tokens.surgery import Selection, insert_gather, push_selections, restore

OVER_TOKENS: dict[str, Callable[..., Any]] = {
    "mean": lambda x, y: x.mean(1),
    "sum of everything": lambda x, y: x.sum(),
    "variance": lambda x, y: torch.var(x, (0, 1)),
    "sum of merged tokens": lambda x, y: x.flatten(0, 1).sum(0),
    "max": lambda x, y: x.max(dim=1)[0],
    "cumsum": lambda x, y: x.cumsum(1),
    "sort": lambda x, y: x.sort(1)[0],
    "normalize": lambda x, y: F.normalize(x, dim=1),
    "linear over tokens": lambda x, y: F.linear(x.transpose(1, 2), y[:, :N]),
    "layer norm over tokens": lambda x, y: F.layer_norm(x, (N, C)),
}
WITHOUT_A_RULE: dict[str, Callable[..., Any]] = {
    "convolution": lambda x, y: F.conv1d(x.transpose(1, 2), y[:, :, None]),
    "pooling": lambda x, y: F.avg_pool1d(x.transpose(1, 2), 2),
    "fft": lambda x, y: torch.fft.fft(x, dim=1),
    "assignment": lambda x, y: _assigned(x * 1),
    "assignment of tokens": lambda x, y: _assigned_value(torch.zeros(B, N, C), x * 1),
    "masked scatter": lambda x, y: x.masked_scatter(x > 0, torch.ones(B * N * C)),
}
OVER_RESTORED: dict[str, Callable[..., Any]] = {
    "mean": lambda x, y: x[:, 1:].mean(1),
    "softmax": lambda x, y: x[:, 1:].softmax(1),
    "matmul": lambda x, y: torch.ones(3, N - 1) @ x[:, 1:],
    "reduction after a merge": lambda x, y: x.flatten().sum(0),
    "attention": lambda x, y: F.scaled_dot_product_attention(x, x[:, 1:], x[:, 1:]),
}


def _assigned(x: Tensor) -> Tensor:
    x[:, 0] = 0
    return x


def _assigned_value(x: Tensor, value: Tensor) -> Tensor:
    x[:, :] = value
    return x


@pytest.mark.parametrize("case", OVER_TOKENS)
def test_computing_over_tokens(case: str) -> None:
    with pytest.raises(NotApplicableError, match="computes over the tokens"):
        pushed(OVER_TOKENS[case], torch.randn(B, N, C), torch.randn(C, C))


@pytest.mark.parametrize("case", WITHOUT_A_RULE)
def test_operators_without_a_rule(case: str) -> None:
    with pytest.raises(NotApplicableError, match="how its axes flow is not known"):
        pushed(WITHOUT_A_RULE[case], torch.randn(B, N, C), torch.randn(C, C))


@pytest.mark.parametrize("case", OVER_RESTORED)
def test_computing_over_restored_tokens(case: str) -> None:
    with pytest.raises(NotApplicableError, match="put back as zeros"):
        pushed(OVER_RESTORED[case], torch.randn(B, N, C), torch.randn(C, C))


OTHERS: dict[str, tuple[Callable[..., Any], str]] = {
    "batch": (lambda x, y: x.sum(0), "over the batch"),
    "in place": (lambda x, y: (y.expand(B, C, C)[:, :N] * 1).add_(x), "writes selected tokens"),
    "restored with selected": (lambda x, y: x.roll(1, 1) + x, "combines selected tokens"),
    "einsum without a batch": (lambda x, y: torch.einsum("bnc,nc->bnc", x, y[:N]), "no axis for the batch"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_refusals(case: str) -> None:
    function, reason = OTHERS[case]
    with pytest.raises(NotApplicableError, match=reason):
        pushed(function, torch.randn(B, N, C), torch.randn(C, C))


def test_causal_queries_of_other_positions_than_the_keys() -> None:
    with pytest.raises(NotApplicableError, match="is_causal=True"):
        pushed(lambda q, k: F.scaled_dot_product_attention(q, k, k, is_causal=True), *torch.randn(2, B, H, N, C), short={0: 2})


def test_the_message_names_the_place() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pool = nn.AdaptiveAvgPool1d(1)

        def forward(self, x: Tensor) -> Tensor:
            return self.pool(x.transpose(1, 2))

    module = traced(Pooled(), torch.randn(B, N, C))
    x = next(n for n in module.graph.nodes if n.op == "placeholder")
    with pytest.raises(NotApplicableError, match=r"node \w+ \(adaptive_avg_pool1d\) in pool: .*; make the selection after it"):
        push_selections(module.graph, {x: {1: Selection(x, N, K)}}, frozenset())


def _two_inputs() -> tuple[fx.Graph, fx.Node, fx.Node]:
    module = traced(lambda x, y: x + y, torch.randn(B, N, C), torch.randn(B, N, C))
    x, y = (n for n in module.graph.nodes if n.op == "placeholder")
    return module.graph, x, y


def test_two_selections_on_one_axis() -> None:
    graph, x, y = _two_inputs()
    with pytest.raises(NotApplicableError, match="two different selections"):
        push_selections(graph, {x: {1: Selection(x, N, K)}, y: {1: Selection(y, N, K)}}, frozenset())


def test_a_selection_of_what_was_selected() -> None:
    graph, x, y = _two_inputs()
    total = next(n for n in graph.nodes if n.op == "call_function")
    with pytest.raises(NotApplicableError, match="tokens had been dropped before"):
        push_selections(graph, {x: {1: Selection(y, N, K)}, total: {1: Selection(y, N, K)}}, frozenset())


@pytest.mark.parametrize("axis", [0, 2])
def test_a_selection_on_an_axis_without_tokens(axis: int) -> None:
    graph, x, _ = _two_inputs()
    x.meta["example_value"] = torch.zeros(B, N, 1)
    with pytest.raises(NotApplicableError, match="along a token axis"):
        push_selections(graph, {x: {axis: Selection(x, N, K)}}, frozenset())


def test_public_inserts_are_inverse() -> None:
    module = traced(lambda x: x * 2, torch.randn(B, N, C))
    graph = module.graph
    x, double = (n for n in graph.nodes if n.op != "output")
    with graph.inserting_before(x):
        positions = graph.placeholder("positions")
    selection = Selection(positions, N, K)
    full = restore(graph, insert_gather(graph, double, 1, selection), 1, selection)
    next(n for n in graph.nodes if n.op == "output").args = ((full,),)
    graph.lint()
    value = torch.randn(B, N, C)
    (got,) = fx.GraphModule(module, graph)(POSITIONS, value)
    dropped = torch.ones(B, N, dtype=torch.bool).scatter(1, POSITIONS, False)
    torch.testing.assert_close(got, (value * 2).masked_fill(dropped[..., None], 0))


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_rows_with_other_counts_fail_when_it_runs(backend: str) -> None:
    torch._dynamo.reset()
    run = torch.compile(lambda mask: kept_positions(mask, 3), backend=backend, fullgraph=True)
    mask = torch.tensor([[1, 0, 0, 1, 0], [0, 1, 1, 0, 0]]).bool()
    assert run(mask).tolist() == [[1, 2, 4], [0, 3, 4]]
    mask[0, 1] = True
    with pytest.raises(ModelCallError, match=r"same number of visual tokens.*expected 2 of 5 tokens in each row, found \[3, 2\]"):
        run(mask)


def test_a_mask_of_another_kind() -> None:
    with pytest.raises(ModelCallError, match=r"bool \[B, N\]"):
        kept_positions(torch.zeros(2, 3), 1)
