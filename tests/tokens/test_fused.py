"""Fused tokens: they flow with the others, nothing is read for them by position, and outputs leave them out."""

from __future__ import annotations

import pytest
import torch

from rewrite.ir import NotApplicableError
from rewrite.tokens import choose
from rewrite.tokens.gather import gather_tokens, scatter_tokens
from rewrite.tokens.placement import Selection
from rewrite.tokens.surgery import push_selections
from tests.tokens.token_graphs import traced


def test_positions_compose_through_fused_tokens() -> None:
    """Three tokens of six stay and one is fused; then two of these four and another fused one."""
    first = choose.positions_with_fused(choose.composed_positions(None, torch.tensor([[0, 2, 5]])), 6, 0)
    second = choose.positions_with_fused(choose.composed_positions(first, torch.tensor([[0, 3]])), 6, 0)
    assert first.tolist() == [[0, 2, 5, 6]]
    assert second.tolist() == [[0, 6, 6]]
    short = torch.tensor([[[1.0], [7.0], [9.0]]], requires_grad=True)
    full = scatter_tokens(short, second, 1, 6, fused=True)
    full.sum().backward()
    assert full.flatten().tolist() == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert short.grad is not None
    assert short.grad.flatten().tolist() == [1.0, 0.0, 0.0]


def test_what_leaves_is_summed_by_its_score() -> None:
    stream, score = torch.arange(8.0).reshape(1, 4, 2), torch.tensor([[9.0, 0.5, 0.25, 2.0]])
    made = choose.fused_tokens(stream, torch.tensor([[0, 3]]), score, 0)
    torch.testing.assert_close(made[:, :2], gather_tokens(stream, torch.tensor([[0, 3]]), 1))
    torch.testing.assert_close(made[0, 2], 0.5 * stream[0, 1] + 0.25 * stream[0, 2])


def test_a_tensor_with_an_entry_for_every_token_has_none_for_a_fused_one() -> None:
    module = traced(lambda x, table: x * table, torch.randn(2, 6, 8), torch.randn(6, 8))
    x = next(node for node in module.graph.nodes if node.op == "placeholder")
    with pytest.raises(NotApplicableError, match="none for tokens that were fused; select without fusing"):
        push_selections(module.graph, {x: {1: Selection(x, 6, 4, fused=True)}}, frozenset())
