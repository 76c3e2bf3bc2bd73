"""A mask of all pairs, read as the operators that make it: the terms say of every pair what the tensor does, and nothing else is read."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx

from rewrite.ir.semantics import aligned, evaluate_expression, positions
from rewrite.recognise.mask_terms import mask_terms

N = 6
Make = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def places() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(N)[None, None, :, None], torch.arange(N)[None, None, None, :]


def causal_and_padded(ids: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    rows, columns = places()
    return (rows.new_ones((), dtype=torch.bool) & (columns <= rows + 0)) & seen[:, None, None, :].to(torch.bool)


def packed_in_order(ids: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    rows, columns = places()
    batch = torch.arange(2)[:, None, None, None]
    return ((ids[batch, columns] < ids[batch, rows]) & seen.bool()[:, None, None].expand(2, 1, N, N)).expand(2, 1, N, N)


def shifted(ids: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    rows, columns = places()
    return torch.logical_and(columns + 2 >= rows, ids[:, None, :, None] == ids[:, None, None])


def either(ids: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    rows, columns = places()
    return (columns <= rows) | seen.bool()[:, None, None]


def by_number(ids: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    return ids[:, None, :, None].float() == ids[:, None, None].float()


def written(ids: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    rows, columns = places()
    mask = columns <= rows
    mask[..., :2] = True
    return mask


def traced(make: Make, given: tuple[torch.Tensor, ...]) -> fx.Node:
    """The mask's node, with values as Dynamo would give them."""
    nodes: list[fx.Node] = []

    def backend(module: fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., object]:
        (output,) = module.graph.find_nodes(op="output")
        nodes.append(output.args[0][0])
        return module.forward

    torch.compile(make, backend=backend)(*given)
    return nodes[0]


@pytest.mark.parametrize("make", [causal_and_padded, packed_in_order, shifted, either, by_number, written])
def test_terms(make: Make) -> None:
    given = torch.tensor([[1, 1, 0, 0, 2, 2], [0, 1, 1, 1, 1, 3]]), torch.tensor([[1] * 6, [0, 0, 1, 1, 0, 1]])
    node = traced(make, given)
    found = mask_terms(node, "mask")
    assert (found is None) == (make in (either, by_number, written))
    if found is None:
        return
    values = positions(N, N, torch.device("cpu"))
    for name, (read, axes) in found.tensors.items():
        value = fx.Interpreter(fx.GraphModule({}, _up_to(read))).run(*_inputs(read, given))
        values[name] = aligned(value[tuple(slice(None) if axis in axes else 0 for axis in "bhij")], axes)
    assert torch.equal(torch.as_tensor(evaluate_expression(found.mask, values)).expand(2, 1, N, N), make(*given).expand(2, 1, N, N))


def _up_to(node: fx.Node) -> fx.Graph:
    graph, known = fx.Graph(), dict[fx.Node, fx.Node]()
    for each in node.graph.nodes:
        known[each] = graph.node_copy(each, known.__getitem__)
        if each is node:
            break
    graph.output(known[node])
    return graph


def _inputs(node: fx.Node, given: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """What the graph takes, told by the names that Dynamo gives."""
    names = {"ids": given[0], "seen": given[1]}
    placeholders = [each.name for each in node.graph.nodes if each.op == "placeholder"]
    return [next(value for name, value in names.items() if name in each) for each in placeholders]
