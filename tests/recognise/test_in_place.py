"""Graphs with operators that write in place: read as what they compute, and left alone where that cannot be shown."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from spellings import SCALE, Attention, H, N, x
from torch import Tensor, fx

from rewrite.engine import copy_graph
from rewrite.recognise.functional import forwarded_writes
from rewrite.recognise.regions import find_regions
from rewrite.recognise.verify import verify
from rewrite.recognise.writes import overwritten, remaining_writes, writes, written_by


def captured(function: Callable[..., Any], *inputs: Tensor, dynamic: bool = False) -> fx.GraphModule:
    """The graph of a function, on which `forwarded_writes` has run."""
    kept: list[fx.GraphModule] = []

    def backend(module: fx.GraphModule, example_inputs: list[Any]) -> Any:
        kept.append(copy_graph(module))
        return module.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)(*(each.clone() for each in inputs))
    (module,) = kept
    forwarded_writes(module.graph)
    module.graph.eliminate_dead_code(is_impure_node=writes)
    module.graph.lint()
    module.recompile()
    return module


def targets(module: fx.GraphModule) -> set[str]:
    return {node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "") for node in module.graph.nodes}


def scaled_in_place(self: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1)
    scores *= SCALE
    scores.add_(self.bias)
    return scores.softmax(-1) @ v


def masked_in_place(self: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    hidden = torch.ones(N, N, dtype=torch.bool).triu(1)
    scores = (q @ k.transpose(-2, -1)).mul_(SCALE)
    scores.masked_fill_(hidden, -torch.inf)
    return scores.softmax(-1) @ v


def assigned(self: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """timm's mvitv2: a relative position bias assigned to all of the scores but the first `prefix` rows and columns, here none."""
    prefix = 0
    scores = (q * SCALE) @ k.transpose(-2, -1)
    scores[:, :, prefix:, prefix:] = scores[:, :, prefix:, prefix:] + self.bias
    return scores.softmax(-1) @ v


def copied(self: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q * SCALE) @ k.transpose(-2, -1)
    kept = torch.empty_like(scores)
    kept.copy_(scores)
    kept += self.bias
    return kept.softmax(-1) @ v


@pytest.mark.parametrize(
    ("core", "text"),
    [
        (scaled_in_place, f"{SCALE:.15g}*qk + bias0[h, i, j]"),
        (masked_in_place, f"{SCALE:.15g}*qk"),
        (assigned, f"{SCALE:.15g}*qk + bias0[h, i, j]"),
        (copied, f"{SCALE:.15g}*qk + bias0[h, i, j]"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_attention_with_writes_is_read(core: Callable[..., Tensor], text: str) -> None:
    model, given = Attention(core), x()
    module = captured(model, given)
    (region,), misses = find_regions(module.graph)
    assert misses == []
    assert verify(region) is None
    assert f"softmax({text}" in str(region.attend)
    assert remaining_writes(module.graph) == []
    assert not any(name.endswith("_") and not name.startswith("L_") and not name.endswith("__") for name in targets(module))


def aliased(a: Tensor, b: Tensor) -> Any:
    """A view made before the write is read after it."""
    c = a @ b
    view = c.transpose(1, 2)
    c.mul_(2)
    return view + c


def through_a_view(a: Tensor, b: Tensor) -> Any:
    c = a @ b
    c[:, 0].add_(1)
    return c * 2


def cut_apart(a: Tensor, b: Tensor) -> Any:
    c = a @ b
    first, second = c.chunk(2, dim=1)
    first.mul_(3)
    return c + torch.cat([first, second], 1)


def of_an_input(a: Tensor, b: Tensor) -> Any:
    a.add_(b)
    return a * 2


def unread_write(a: Tensor, b: Tensor) -> Any:
    a.add_(b)
    return b * 2


def partly_assigned(a: Tensor, b: Tensor) -> Any:
    c = a @ b
    c[:, 1:] = b[:, 1:]
    return c


def assigned_twice(a: Tensor, b: Tensor) -> Any:
    """What is assigned is a copy: writing on must not reach the value."""
    c, d = a @ b, a + b
    c[:] = d
    c.add_(1)
    d.mul_(2)
    return c, d


def changed_type(a: Tensor, b: Tensor) -> Any:
    c = (a > 0) & (b > 0)
    c |= b > 1
    d = a.to(torch.int32)
    d.mul_(2)
    return c, d


def functions_in_place(a: Tensor, b: Tensor) -> Any:
    c = a @ b
    torch.nn.functional.relu(c, inplace=True)
    d = torch.nn.functional.dropout(c, 0.5, False, True)
    d.add_(1)
    return c, d


CASES = (aliased, through_a_view, cut_apart, of_an_input, unread_write, partly_assigned, assigned_twice, changed_type, functions_in_place)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("function", CASES, ids=lambda function: function.__name__)
def test_results_and_inputs_stay_the_same(function: Callable[..., Any], dynamic: bool) -> None:
    inputs = [torch.randn(4, 4, 4), torch.randn(4, 4, 4)]
    module = captured(function, *inputs, dynamic=dynamic)
    expected_inputs, actual_inputs = ([each.clone() for each in inputs] for _ in range(2))
    expected = function(*expected_inputs)
    sizes = [node for node in module.graph.nodes if node.op == "placeholder" and not isinstance(node.meta["example_value"], Tensor)]
    # Dynamo orders the placeholders by their first use.
    by_name = dict(zip("ab", actual_inputs, strict=True))
    tensors = [by_name[str(node.target)[2]] for node in module.graph.nodes if node.op == "placeholder" and node not in sizes]
    actual = module.forward(*([4] * len(sizes)), *tensors)
    actual = actual if isinstance(expected, tuple) else actual[0]
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(actual_inputs, expected_inputs)


def stale_operand(self: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    """The keys change between the scores and the output, and are read afterwards through a view."""
    view = k[:, :, :1]
    scores = (q @ k.transpose(-2, -1)) * SCALE
    k.zero_()
    return scores.softmax(-1) @ v, view


def stale_score(self: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    """The scores change through their memory after they were viewed."""
    scores = q @ k.transpose(-2, -1)
    view = scores.view(-1, H, N, N)
    scores[:, :1].mul_(SCALE)
    return view.softmax(-1) @ v, scores


@pytest.mark.parametrize("core", [stale_operand, stale_score])
def test_a_region_that_is_written_into_is_told(core: Callable[..., Any]) -> None:
    module = captured(Attention(core), x())
    (region,), _ = find_regions(module.graph)
    reason = overwritten(region, remaining_writes(module.graph))
    assert reason is not None
    assert "writes into" in reason


def test_a_region_apart_from_writes_is_not() -> None:
    def core(self: Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
        out = ((q @ k.transpose(-2, -1)) * SCALE).softmax(-1) @ v
        out[:, :, 0] = 0.0
        return out

    module = captured(Attention(core), x())
    (region,), _ = find_regions(module.graph)
    assert remaining_writes(module.graph)
    assert overwritten(region, remaining_writes(module.graph)) is None


def test_operators_named_for_keywords_write_nothing() -> None:
    graph = fx.Graph()
    left, right = (graph.placeholder(name) for name in ("left", "right"))
    for node in (left, right):
        node.meta["example_value"] = torch.ones(2, dtype=torch.bool)
    assert written_by(graph.call_function(operator.and_, (left, right))) == []
    assert written_by(graph.call_function(operator.iand, (left, right))) == [left]
