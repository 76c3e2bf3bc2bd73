"""What an expression may be made of on the way between a product of queries and keys, a normaliser and the product with the values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from rewrite.recognise.contraction import CONTRACTIONS, number
from rewrite.recognise.operators import argument, canonical, hinted_shape, value_of
from rewrite.recognise.region import NearMissError

UNCHANGED = frozenset({"cast", "contiguous", "clone", "detach", "dropout"})
VIEWS = frozenset(
    {
        "transpose",
        "permute",
        "reshape",
        "flatten",
        "unflatten",
        "squeeze",
        "unsqueeze",
        "expand",
        "expand_as",
        "matrix_transpose",
        "movedim",
    }
)
# Functions of one number.
FUNCTIONS: Mapping[str, Callable[[sympy.Expr], sympy.Expr]] = {
    "neg": lambda x: -x,
    "exp": sympy.exp,
    "tanh": sympy.tanh,
    "sigmoid": lambda x: 1 / (1 + sympy.exp(-x)),
    "relu": lambda x: sympy.Max(x, 0),
    "square": lambda x: x**2,
}
# Functions of two.
OPERATORS: Mapping[str, Callable[[sympy.Expr, sympy.Expr], sympy.Expr]] = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "div": lambda x, y: x / y,
    "maximum": sympy.Max,
    "minimum": sympy.Min,
}
BOUNDS: Mapping[str, tuple[str, ...]] = {"clamp": ("min", "max"), "clamp_min": ("min",), "clamp_max": ("max",)}
_CHOICES = frozenset({"masked_fill", "where"})
_ELEMENTWISE = frozenset({"assigned", *FUNCTIONS, *OPERATORS, *BOUNDS, *_CHOICES})
# A linear map of heads stands among elementwise operators where heads are mixed.
MIXES = frozenset({"linear", "conv"})


def is_step(node: fx.Node) -> bool:
    """True for an operator that an expression may be made of."""
    name = canonical(node)
    rank = value.dim() if isinstance(value := value_of(node), torch.Tensor) else 0
    # Of these, only what is done to a whole map is meant, which has queries and keys, and heads where they are mixed.
    if name in MIXES:
        return rank >= 4
    if name in ("cat", "getitem"):
        return rank >= 3
    return name in _ELEMENTWISE or name in UNCHANGED or name in VIEWS or name == "einsum"


def contractions_behind(node: fx.Node) -> Iterator[fx.Node]:
    """The contractions that a score may come from, through views and elementwise operators, the first operands' first."""
    return (end for end in ends(node) if canonical(end) in CONTRACTIONS)


def blockers(node: fx.Node) -> list[fx.Node]:
    """The operators at which the way back from a score ends where it meets no contraction."""
    return [end for end in ends(node) if end.op != "placeholder"] or [node]


def ends(node: fx.Node) -> Iterator[fx.Node]:
    """Where the ways back from a score end, the first operands' first. An einsum may be an end and a mixture of heads: it is both."""
    stack, seen = [node], {node}
    while stack:
        current = stack.pop()
        step = is_step(current)
        if not step or canonical(current) == "einsum":
            yield current
        if step:
            for source in reversed(current.all_input_nodes):
                if source not in seen and isinstance(value_of(source), torch.Tensor):
                    seen.add(source)
                    stack.append(source)


def pair(node: fx.Node) -> tuple[Any, Any]:
    """The two operands of an operator that may name the second."""
    return (node.args[0], node.args[1]) if len(node.args) > 1 else (node.args[0], node.kwargs["other"])


def branches(node: fx.Node) -> tuple[Any, Any, Any]:
    """Condition, value where it holds and value where it does not: torch.where(condition, yes, no), yes.where(condition, no)."""
    if len(node.args) != 3:
        raise NearMissError(f"{node.name} (where) names its arguments in a way this does not read")
    first, second, third = node.args
    return (second, first, third) if node.op == "call_method" else (first, second, third)


def slices(index: Any, shape: Sequence[int]) -> tuple[range, ...] | None:
    """The positions that an index of slices takes of every axis; None for any other index, and for one that takes all."""
    entries = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in entries:
        place = entries.index(Ellipsis)
        entries[place : place + 1] = [slice(None)] * (len(shape) - len(entries) + 1)
    entries += [slice(None)] * (len(shape) - len(entries))
    if len(entries) != len(shape) or not all(isinstance(entry, slice) and _has_numbers(entry) for entry in entries):
        return None
    taken = tuple(range(extent)[entry] for entry, extent in zip(entries, shape, strict=True))
    return None if all(len(rows) == extent for rows, extent in zip(taken, shape, strict=True)) else taken


def _has_numbers(entry: slice) -> bool:
    return all(part is None or isinstance(part, int) for part in (entry.start, entry.stop)) and entry.step in (None, 1)


def only_adds_axes(node: fx.Node) -> bool:
    """True for x[:, None], which takes all of x."""
    index = node.args[1]
    entries = index if isinstance(index, tuple) else (index,)
    return any(entry is None for entry in entries)


@dataclass(frozen=True)
class Total:
    """The sum of a tensor over one of its axes, plus a number."""

    of: fx.Node
    dim: int
    epsilon: float


def summed(node: Any) -> Total | None:
    """What a node is the sum of: x.sum(dim), its axis kept or put back, perhaps plus a number."""
    epsilon = 0.0
    while isinstance(node, fx.Node):
        name = canonical(node)
        if name == "sum":
            dim, source = argument(node, "dim"), node.args[0]
            if isinstance(dim, tuple | list) and len(dim) == 1:
                dim = dim[0]
            if not isinstance(dim, int) or not isinstance(source, fx.Node):
                return None
            return Total(source, dim % len(hinted_shape(source)), epsilon)
        if name == "add" and (added := number(pair(node)[1])) is not None:
            epsilon += float(added)
        elif name not in ("cast", "unsqueeze", "detach") and not (name == "getitem" and only_adds_axes(node)):
            return None
        node = node.args[0]
    return None
