"""The time of a whole graph as predicted: every operator's multiply-adds and bytes over the ceilings measured on its device.

Attention sites are left out, since `rewrite.prediction` has them. Tokens that left make every operator behind them shorter: norms, linear
layers, MLPs, rotations, and not attention alone.
"""

from __future__ import annotations

from collections.abc import Container, Iterable

import torch
from torch import fx

from rewrite.cost import GraphCost, Shapes, node_cost
from rewrite.machine import Machine
from rewrite.recognise.operators import argument, canonical, value_of

# Operators that give another view of a tensor and move nothing.
_VIEWS = frozenset(
    (
        *("reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "expand", "expand_as", "transpose", "permute", "matrix_transpose"),
        *("movedim", "narrow", "getitem", "chunk", "split", "unbind", "detach"),
    )
)


def device_of(graph: fx.Graph) -> tuple[torch.device, torch.dtype] | None:
    """Where a graph computes and in which floating-point type, by its first floating tensor that is computed; None where there is none."""
    for node in graph.nodes:
        value = value_of(node)
        if node.op.startswith("call") and isinstance(value, torch.Tensor) and value.is_floating_point():
            return value.device, value.dtype
    return None


def operator_costs(graph: fx.Graph, shapes: Shapes, outside: Container[fx.Node]) -> list[GraphCost]:
    """What every operator of a graph but those `outside` computes and moves, with tokens gone on the axes in `shapes`."""
    return [node_cost(node, shapes) for node in graph.nodes if node not in outside and _moves(node)]


def seconds_of(costs: Iterable[GraphCost], machine: Machine) -> float:
    """Seconds of operators one behind the other."""
    return sum(machine.seconds("linear" if one.multiply_adds else "moved", one.multiply_adds, one.bytes) for one in costs)


def _moves(node: fx.Node) -> bool:
    """Whether a node computes a tensor anew."""
    value, name = value_of(node), canonical(node)
    if not node.op.startswith("call") or not isinstance(value, torch.Tensor) or name in _VIEWS:
        return False
    if name == "dropout":
        return argument(node, "training", True) is not False
    sources = [value_of(source) for source in node.all_input_nodes]
    if name in ("cast", "contiguous"):
        return not (isinstance(sources[0], torch.Tensor) and (sources[0].dtype, sources[0].device) == (value.dtype, value.device))
    return True
