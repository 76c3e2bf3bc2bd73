"""Operators that write into a tensor: which they are, what they write, and whether that falsifies a region.

Who shares memory with whom is read off the traced values: fake tensors share storages exactly as the real ones will.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from rewrite.recognise.operators import value_of
from rewrite.recognise.region import Region
from rewrite.recognise.regions import interior
from rewrite.tokens.placement import Storage, storages_of

# Python's in-place operators and the ones that make a new object.
IN_PLACE_OPERATORS: Mapping[Callable[..., Any], Callable[..., Any]] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.iand: operator.and_,
    operator.ior: operator.or_,
}
_WRITING_OPERATORS = frozenset(
    {*IN_PLACE_OPERATORS, operator.setitem, operator.ifloordiv, operator.imod, operator.ipow, operator.ixor, operator.imatmul}
)
# Python's own operators whose names end in an underscore because they would be keywords.
_KEYWORDS = frozenset({operator.and_, operator.or_, operator.not_, operator.is_})


def written_by(node: fx.Node) -> list[fx.Node]:
    """The tensors among an operator's arguments that it writes into."""
    targets: list[Any] = []
    if node.op == "call_method":
        name = str(node.target)
        if (name.endswith("_") and not name.endswith("__")) or (name.startswith("__i") and name != "__invert__") or name == "__setitem__":
            targets.append(node.args[0])
    elif node.op == "call_function":
        name = getattr(node.target, "__name__", "")
        is_named_so = name.endswith("_") and not name.endswith("__") and node.target not in _KEYWORDS
        if node.target in _WRITING_OPERATORS or is_named_so or _asked_in_place(node):
            targets += node.args[:1] or list(node.kwargs.values())[:1]
        targets.append(node.kwargs.get("out"))
        targets += _written_by_schema(node)
    return [entry for entry in tree_leaves(targets) if isinstance(entry, fx.Node) and isinstance(value_of(entry), torch.Tensor)]


def writes(node: fx.Node) -> bool:
    """True where removing the node would change more than the node: for `fx.Graph.eliminate_dead_code`, which keeps these."""
    opens_vmap = getattr(node.target, "__name__", "") in ("_vmap_increment_nesting", "_vmap_decrement_nesting")
    return node.is_impure() or opens_vmap or bool(written_by(node))


@dataclass(frozen=True)
class Write:
    """An operator and the memory it writes."""

    node: fx.Node
    storages: frozenset[Storage]


def remaining_writes(graph: fx.Graph) -> list[Write]:
    """Every write into a tensor that is left in the graph, in program order."""
    found = [(node, frozenset(storage for target in written_by(node) for storage in storages_of(target))) for node in graph.nodes]
    return [Write(node, storages) for node, storages in found if storages]


def overwritten(region: Region, remaining: Sequence[Write]) -> str | None:
    """What is written between where a region was read and where it would be computed instead, in words; None where nothing is.

    The replacement reads the operands at the region's output, and takes what lies between for functions of them.
    """
    inside = set(interior(region))
    operands = {operand.node for operand in region.operands().values()}
    for node in inside | operands:
        held = storages_of(node)
        readers = [user for user in node.users if user in inside]
        for write in remaining:
            if not held & write.storages or not node < write.node or not write.node < region.output:
                continue
            if node in operands and any(not write.node < reader for reader in readers):
                return f"{write.node.name} writes into {node.name}, which it reads, before its result is there"
            if node not in operands and any(write.node < reader for reader in readers):
                return f"{write.node.name} writes into {node.name}, a part of it, before it is used"
    return None


def _asked_in_place(node: fx.Node) -> bool:
    """True for functions called with inplace=True, by name or by position."""
    if "inplace" in node.kwargs:
        return bool(node.kwargs["inplace"])
    if True not in node.args or not inspect.isfunction(node.target):
        return False
    names = list(inspect.signature(node.target).parameters)
    return "inplace" in names and node.args[names.index("inplace") : names.index("inplace") + 1] == (True,)


def _written_by_schema(node: fx.Node) -> Iterator[Any]:
    """The arguments that a registered operator's schema says it writes into."""
    target = node.target
    packet = isinstance(target, torch._ops.OpOverloadPacket)
    overloads = [getattr(target, name) for name in target.overloads()] if packet else [target]  # type: ignore[union-attr]
    for overload in overloads:
        if isinstance(overload, torch._ops.OpOverload) and overload._schema.is_mutable:
            for place, argument in enumerate(overload._schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    yield node.args[place] if place < len(node.args) else node.kwargs.get(argument.name)
