"""A mask tensor by query and key, read as what its graph makes it of: terms of keys, of queries, and comparisons of the two.

Libraries compute ``(j <= i) & padding[b, j] & (segment[b, i] == segment[b, j])`` as one tensor of all pairs. The operands of its operators
lie along the one or the other axis, and stand in the graph: a mask that is read from these has a state form where the tensor has none.
Nothing is evaluated; where any part is not of this form nothing is read.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import sympy
import torch
from sympy.logic.boolalg import Boolean
from torch import fx

from rewrite.ir.expression import I, J, tensor
from rewrite.recognise.operators import canonical, shape_of, value_of
from rewrite.recognise.writes import remaining_writes
from rewrite.tokens.placement import storages_of

# A mask is joined of a few terms; more operators than this are something else.
_LONGEST = 64

_JOINED = (operator.and_, torch.logical_and, torch.bitwise_and, "__and__", "logical_and", "bitwise_and")
_SAME_PAIRS = frozenset({"expand", "contiguous", "cast", "clone"})
_ONES = (torch.ones, torch.ones_like, "new_ones")
_COMPARED: dict[object, Callable[..., Boolean]] = {
    **dict.fromkeys((operator.le, torch.le, "le", "__le__"), sympy.Le),
    **dict.fromkeys((operator.lt, torch.lt, "lt", "__lt__"), sympy.Lt),
    **dict.fromkeys((operator.ge, torch.ge, "ge", "__ge__"), sympy.Ge),
    **dict.fromkeys((operator.gt, torch.gt, "gt", "__gt__"), sympy.Gt),
    **dict.fromkeys((operator.eq, torch.eq, "eq", "__eq__"), sympy.Eq),
}


class _UnreadError(Exception):
    """The mask is made in another way."""


@dataclass
class MaskTerms:
    """mask: a predicate that says the same as the tensor. tensors: what it reads, [B or 1, 1, Nq or 1, Nk or 1], by name, and the letters
    of the axes that it reads of them."""

    name: str
    mask: Boolean = sympy.true
    tensors: dict[str, tuple[fx.Node, str]] = field(default_factory=dict)

    def _read(self, node: fx.Node, axis: str) -> sympy.Indexed:
        name = next((known for known, (other, axes) in self.tensors.items() if other is node and axes == f"b{axis}"), None)
        if name is None:
            name = f"{self.name}_{len(self.tensors)}"
            self.tensors[name] = (node, f"b{axis}")
        return tensor(name, f"b{axis}")

    def add(self, node: fx.Node) -> None:
        """One term. Raises `_UnreadError`."""
        axis = _axis(node)
        if axis is not None:
            self.mask = sympy.And(self.mask, sympy.Ne(self._read(node, axis), 0))
            return
        relation = _COMPARED.get(node.target)
        if relation is None or len(node.args) != 2 or node.kwargs:
            raise _UnreadError
        self.mask = sympy.And(self.mask, relation(*(self._side(side) for side in node.args)))

    def _side(self, side: object) -> sympy.Expr:
        axis = _axis(side) if isinstance(side, fx.Node) else None
        if axis is None or not isinstance(side, fx.Node):
            raise _UnreadError
        dtype = value_of(side).dtype
        if dtype.is_floating_point or dtype.is_complex:
            raise _UnreadError
        place = _position(side)
        return self._read(side, axis) if place is None else place


def mask_terms(node: fx.Node, name: str) -> MaskTerms | None:
    """The terms of a mask [B or 1, 1, Nq, Nk] bool, for a tensor that is called `name`; None where it is made in another way."""
    found = MaskTerms(name)
    seen: list[fx.Node] = []
    try:
        for term in _terms(node, seen):
            found.add(term)
    except _UnreadError:
        return None
    written = {storage for write in remaining_writes(node.graph) for storage in write.storages}
    if written and any(written & storages_of(each) for each in seen):
        return None
    return found


def _terms(node: fx.Node, seen: list[fx.Node]) -> Iterator[fx.Node]:
    """What a mask is joined of; seen: every node that is looked at."""
    stack = [node]
    while stack:
        current = stack.pop()
        seen.append(current)
        value = value_of(current)
        if len(seen) > _LONGEST or not isinstance(value, torch.Tensor) or value.dtype != torch.bool:
            raise _UnreadError
        if current.target in _ONES:
            continue
        if current.target in _JOINED and len(current.args) == 2 and all(isinstance(each, fx.Node) for each in current.args):
            stack += current.args  # type: ignore[arg-type]
        elif value.dim() != 4:
            raise _UnreadError
        elif canonical(current) in _SAME_PAIRS and isinstance(current.args[0], fx.Node) and _keeps_pairs(current.args[0]):
            stack.append(current.args[0])
        else:
            yield current


def _keeps_pairs(source: fx.Node) -> bool:
    """Whether a copy of a tensor in another type or size has its axes, and each entry for as many pairs."""
    value = value_of(source)
    return isinstance(value, torch.Tensor) and value.dim() == 4 and value.dtype == torch.bool


def _axis(node: fx.Node) -> str | None:
    """ "i" or "j" where a tensor has four axes and lies along this one and the batch alone."""
    shape = shape_of(node)
    if shape is None or len(shape) != 4 or not _is_one(shape[1]):
        return None
    along = [letter for letter, length in zip("ij", shape[2:], strict=True) if not _is_one(length)]
    return along[0] if len(along) == 1 else None


def _is_one(length: object) -> bool:
    return type(length) is int and length == 1


def _position(node: fx.Node) -> sympy.Expr | None:
    """The position, where a tensor of four axes numbers one of them, perhaps from a number on."""
    axis, offset = _axis(node), 0
    while True:
        if node.target in (operator.add, torch.add, "add") and len(node.args) == 2 and not node.kwargs:
            operands = [each for each in node.args if isinstance(each, fx.Node)]
            numbers = [each for each in node.args if type(each) is int]
            if len(operands) != 1 or len(numbers) != 1:
                return None
            node, offset = operands[0], offset + numbers[0]
        elif canonical(node) == "getitem" and isinstance(node.args[0], fx.Node) and _adds_axes(node.args[1]):
            node = node.args[0]
        else:
            break
    if node.target is not torch.arange or len(node.args) != 1 or {"start", "end", "step"} & set(node.kwargs):
        return None
    return (I if axis == "i" else J) + offset


def _adds_axes(index: object) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return all(part is None or part == slice(None) for part in parts)
