"""What is known of a tensor's token axes, and the sizes that decide it.

Every node keeps the example value it was traced with, and so the full length of every axis. A placement says on top of that which axes
are physically shorter now, which were put back to their full length with zeros in the gaps, and which axis is the batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._pytree import tree_leaves

Storage = int


@dataclass(frozen=True)
class Selection:
    """The tokens of one axis that are left.

    holders: where tokens were merged, int64 [B, length]: which of the tokens that are left each one of the axis went into. sized: attention
    counts a merged token as often as the tokens that it stands for. prefix, suffix: so many first and last tokens of the axis are all left,
    in front of the others and behind them. present: bool [B, K], where rows keep different numbers, which tokens are no padding of that:
    padding are tokens of the axis that are dropped and still there, hidden from attention. places: `positions`, of padding `length`, where
    tokens are put back. source: the stream that was cut, in which dropped tokens have the value that they keep.

    Two selections are the same where their `positions` are the same node.
    """

    positions: fx.Node  # int64 [B, K], ascending: the tokens of the axis that are left, per batch row
    length: int | fx.Node  # how many the axis had
    kept: int | fx.Node  # K
    fused: bool = False  # some positions are `length`: tokens that were made of several, and are none of the axis
    holders: fx.Node | None = None
    sized: bool = False
    prefix: int = 0
    suffix: int = 0
    source: fx.Node | None = None
    present: fx.Node | None = None
    places: fx.Node | None = None

    @property
    def made(self) -> str | None:
        """How tokens were made of several, in a word; None where each is one of the axis."""
        return "fused" if self.fused else "merged" if self.holders is not None else None


@dataclass(frozen=True)
class Placement:
    """The token axes of one tensor (or of each tensor of a tuple).

    `batch` is the axis along which positions differ, of size B * rows with the batch running slowest; None where B is one.
    """

    axes: Mapping[int, Selection] = field(default_factory=dict)
    restored: frozenset[int] = frozenset()
    batch: int | None = 0
    rows: int = 1


def example(node: fx.Node) -> Any:
    """The example value a node was traced with: tensor, number, or tuple of them; None where it has none."""
    return node.meta.get("example_value")


def first_tensor(node: fx.Node) -> torch.Tensor | None:
    """The tensor a node was traced with, or the first of the tuple it gives."""
    value = example(node)
    if isinstance(value, (tuple, list)) and value:
        value = value[0]
    return value if isinstance(value, torch.Tensor) else None


def is_tensor(node: object) -> bool:
    """Whether an argument is a node that stands for one tensor."""
    return isinstance(node, fx.Node) and isinstance(example(node), torch.Tensor)


def expression(size: Any) -> Any:
    """A size as a sympy expression: a Python or symbolic number, or the node of one. Adds no guard. None where it is not a size."""
    if isinstance(size, fx.Node):
        size = example(size)
    if isinstance(size, torch.SymInt):
        return size.node.expr
    return sympy.Integer(size) if isinstance(size, int) and not isinstance(size, bool) else None


def shape_of(node: fx.Node) -> tuple[Any, ...]:
    """The traced, full shape of a node's (first) tensor, as sympy expressions."""
    tensor = first_tensor(node)
    if tensor is None:
        raise TypeError(f"node {node.name} was traced without a tensor")
    return tuple(expression(size) for size in tensor.shape)


def extents(node: fx.Node) -> tuple[int, ...]:
    """The traced, full shape of a node's (first) tensor in numbers; a size that depends on data is one."""
    tensor = first_tensor(node)
    return () if tensor is None else sizes_of(tensor)


def sizes_of(tensor: torch.Tensor) -> tuple[int, ...]:
    """A traced shape in numbers; a size that depends on data is one."""
    return tuple(size if isinstance(size, int) else int(size.node.hint or 1) for size in tensor.shape)


def storages_of(node: fx.Node) -> frozenset[Storage]:
    """The memory a node's value lies in; none for tensors that have no storage of their own (those inside a vmap)."""
    found: set[Storage] = set()
    for value in tree_leaves(node.meta.get("example_value", node.meta.get("val"))):
        if isinstance(value, torch.Tensor):
            try:
                found.add(value.untyped_storage()._cdata)
            except (NotImplementedError, RuntimeError):
                continue
    return frozenset(found)


def module_path(node: fx.Node) -> str:
    """Where in the model a node comes from, `blocks.3.attn`; `the model itself` where that was not recorded."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = str(stack[-1][0]) if stack else ""
    return path.replace("L['self'].", "").replace("L['self']", "") or "the model itself"
