"""Masks that hide nothing, taken off our copy of the graph before it is read.

A library that may not look at a mask while it is traced builds one of positions alone, such as ``arange(n) >= 0``, where without a trace it
would build none. Passes that decline masked sites should not decline these. What a mask holds is known by bounds: the least and the
greatest that its entries can be, whatever the sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import fx

from rewrite.recognise.operators import argument, canonical, value_of
from rewrite.recognise.writes import remaining_writes
from rewrite.tokens.placement import storages_of


class Bounds(NamedTuple):
    """Every entry is between them; True is 1 and False is 0."""

    low: float
    high: float


_UNKNOWN = Bounds(-math.inf, math.inf)
_TRUE, _FALSE, _EITHER = Bounds(1, 1), Bounds(0, 0), Bounds(0, 1)

# A mask of positions is a few dozen operators.
_LONGEST = 100


def drop_open_masks(graph: fx.Graph) -> None:
    """Attention calls lose a mask, and scores a bias, that changes nothing at any input of the graph."""
    known: dict[fx.Node, Bounds] = {}
    # What is written into tells nothing by how it was made.
    written = {storage for write in remaining_writes(graph) for storage in write.storages}
    known.update((node, _UNKNOWN) for node in graph.nodes if written and written & storages_of(node))

    def is_open(operand: object) -> bool:
        if not isinstance(operand, fx.Node) or not isinstance(value_of(operand), torch.Tensor):
            return False
        return _bounds(operand, known) == (_TRUE if value_of(operand).dtype == torch.bool else _FALSE)

    for node in list(graph.nodes):
        drop = _DROP.get(canonical(node))
        if drop is not None:
            drop(node, is_open)


def _bounds(node: fx.Node, known: dict[fx.Node, Bounds]) -> Bounds:
    """What is known of a tensor's entries from the operators that make it, operands first."""
    stack, steps = [] if node in known else [node], 0
    while stack and steps < _LONGEST:
        current = stack[-1]
        waiting = [source for source in current.all_input_nodes if source not in known] if _name(current) in _OF else []
        stack += waiting
        steps += 1
        if not waiting:
            known[stack.pop()] = _step(current, known)
    return known.setdefault(node, _UNKNOWN)


def _step(node: fx.Node, known: Mapping[fx.Node, Bounds]) -> Bounds:
    step = _OF.get(_name(node))
    if step is None:
        return _UNKNOWN
    operands = [_operand(each, known) for each in node.args]
    try:
        return step(node, operands)
    except (TypeError, ValueError, IndexError):  # spelt in a way that the step does not read
        return _UNKNOWN


def _operand(value: Any, known: Mapping[fx.Node, Bounds]) -> Bounds:
    if isinstance(value, fx.Node):
        return known.get(value, _UNKNOWN)
    return Bounds(value, value) if isinstance(value, bool | int | float) else _UNKNOWN


def _name(node: fx.Node) -> str:
    if node.op not in ("call_function", "call_method"):
        return ""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return _SPELLINGS.get(name, name)


# The steps: what is known of a result, from what is known of the positional operands.
Step = Callable[[fx.Node, list[Bounds]], Bounds]


def _arange(node: fx.Node, operands: list[Bounds]) -> Bounds:
    """Positions from 0, or from a number, upwards."""
    if len(operands) > 2 or "step" in node.kwargs or "start" in node.kwargs:
        return _UNKNOWN
    return Bounds(operands[0].low if len(operands) == 2 else 0, math.inf)


def _full(node: fx.Node, operands: list[Bounds]) -> Bounds:
    value = node.kwargs["fill_value"] if "fill_value" in node.kwargs else node.args[1]
    return Bounds(float(value), float(value))  # type: ignore[arg-type]


def _compare(holds: Callable[[Bounds, Bounds], bool], fails: Callable[[Bounds, Bounds], bool]) -> Step:
    def step(node: fx.Node, operands: list[Bounds]) -> Bounds:
        left, right = operands
        return _TRUE if holds(left, right) else _FALSE if fails(left, right) else _EITHER

    return step


def _where(node: fx.Node, operands: list[Bounds]) -> Bounds:
    condition, yes, no = operands
    if condition in (_TRUE, _FALSE):
        return yes if condition == _TRUE else no
    return Bounds(min(yes.low, no.low), max(yes.high, no.high))


def _indexed(node: fx.Node, operands: list[Bounds]) -> Bounds:
    """A part of a tensor has its bounds."""
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    plain = all(entry is None or entry is Ellipsis or isinstance(entry, slice | int) for entry in index)
    return operands[0] if plain and isinstance(value_of(node.args[0]), torch.Tensor) else _UNKNOWN  # type: ignore[arg-type]


def _logical(node: fx.Node, operands: list[Bounds]) -> list[Bounds]:
    if value_of(node).dtype != torch.bool:
        raise TypeError("bits of numbers")
    return [Bounds(max(each.low, 0), min(each.high, 1)) for each in operands]


def _and(node: fx.Node, operands: list[Bounds]) -> Bounds:
    left, right = _logical(node, operands)
    return Bounds(min(left.low, right.low), min(left.high, right.high))


def _or(node: fx.Node, operands: list[Bounds]) -> Bounds:
    left, right = _logical(node, operands)
    return Bounds(max(left.low, right.low), max(left.high, right.high))


def _not(node: fx.Node, operands: list[Bounds]) -> Bounds:
    (only,) = _logical(node, operands)
    return Bounds(1 - only.high, 1 - only.low)


def _sum(node: fx.Node, operands: list[Bounds]) -> Bounds:
    left, right = operands
    return Bounds(left.low + right.low, left.high + right.high) if not node.kwargs else _UNKNOWN


_GREATER = _compare(lambda left, right: left.low >= right.high, lambda left, right: left.high < right.low)
_STRICTLY = _compare(lambda left, right: left.low > right.high, lambda left, right: left.high <= right.low)
_KEPT: Step = lambda node, operands: operands[0]  # noqa: E731

# Python's operators and methods by the names of torch's functions.
_SPELLINGS: Mapping[str, str] = {"__and__": "and_", "bitwise_and": "and_", "logical_and": "and_", "__or__": "or_", "bitwise_or": "or_"} | {
    "logical_or": "or_", "bitwise_not": "invert", "logical_not": "invert", "__invert__": "invert", "greater_equal": "ge", "greater": "gt",
    "less_equal": "le", "less": "lt", "__ge__": "ge", "__gt__": "gt", "__le__": "le", "__lt__": "lt", "__add__": "add", "iadd": "add",
}  # fmt: skip
_OF: Mapping[str, Step] = {
    "arange": _arange,
    **dict.fromkeys(("zeros", "zeros_like", "new_zeros"), lambda node, operands: Bounds(0, 0)),
    **dict.fromkeys(("ones", "ones_like", "new_ones"), lambda node, operands: Bounds(1, 1)),
    "full": _full,
    "ge": _GREATER,
    "gt": _STRICTLY,
    "le": lambda node, operands: _GREATER(node, operands[::-1]),
    "lt": lambda node, operands: _STRICTLY(node, operands[::-1]),
    "and_": _and,
    "or_": _or,
    "invert": _not,
    "add": _sum,
    "where": _where,
    "getitem": _indexed,
    **dict.fromkeys(
        ("expand", "view", "reshape", "unsqueeze", "squeeze", "transpose", "permute", "contiguous", "clone", "detach", "repeat", "flatten"),
        _KEPT,
    ),
    **dict.fromkeys(("to", "float", "half", "double", "bfloat16", "type_as"), _KEPT),
}


Open = Callable[[object], bool]


def _attention(node: fx.Node, is_open: Open) -> None:
    mask = argument(node, "attn_mask")
    if is_open(mask):
        node.args = tuple(None if operand is mask else operand for operand in node.args)
        node.kwargs = {name: None if operand is mask else operand for name, operand in node.kwargs.items()}


def _add(node: fx.Node, is_open: Open) -> None:
    if len(node.args) != 2 or node.kwargs:
        return
    for kept, added in (node.args, node.args[::-1]):
        if not isinstance(kept, fx.Node) or not is_open(added):
            continue
        before, after = value_of(kept), value_of(node)
        same = isinstance(before, torch.Tensor) and before.dtype == after.dtype and before.shape == after.shape
        if same and before.dtype.is_floating_point:
            node.replace_all_uses_with(kept)
            node.graph.erase_node(node)
            return


_DROP: Mapping[str, Callable[[fx.Node, Open], None]] = {"attention": _attention, "add": _add}
