"""What an expression means: its value with torch, for given values of its symbols and tensors.

Everything broadcasts against [B, H, Nq, Nk]. Positions are computed in integers, so that they are exact.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch
from sympy.logic.boolalg import BooleanFalse, BooleanTrue

from rewrite.ir.expression import B, H, I, Indices, letters

Value = Any  # a tensor, or a Python number where an expression is constant


def _tensor(value: Value) -> torch.Tensor:
    """A number as a tensor without axes, in double precision: it takes on the precision of the tensors it meets."""
    return torch.as_tensor(value, dtype=torch.float64) if isinstance(value, float) else torch.as_tensor(value)


def _exact(function: Callable[[Value, Value], Value]) -> Callable[[Value, Value], Value]:
    """Integer positions that meet a fraction become doubles; torch would take them to its default precision."""

    def apply(left: Value, right: Value) -> Value:
        if isinstance(left, float) and isinstance(right, torch.Tensor) and not right.is_floating_point():
            right = right.double()
        if isinstance(right, float) and isinstance(left, torch.Tensor) and not left.is_floating_point():
            left = left.double()
        return function(left, right)

    return apply


def _fold(function: Callable[[Value, Value], Value]) -> Callable[..., Value]:
    return lambda *arguments: functools.reduce(_exact(function), arguments)


def _power(base: Value, exponent: Value) -> Value:
    if isinstance(base, torch.Tensor) and not base.is_floating_point() and isinstance(exponent, int) and exponent < 0:
        base = base.double()
    return base**exponent


def _minimum(left: Value, right: Value) -> Value:
    return torch.minimum(_tensor(left), _tensor(right))


def _maximum(left: Value, right: Value) -> Value:
    return torch.maximum(_tensor(left), _tensor(right))


def _elementwise(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Value], Value]:
    def apply(argument: Value) -> torch.Tensor:
        value = _tensor(argument)
        return function(value if value.is_floating_point() else value.double())

    return apply


def _floor(argument: Value) -> Value:
    """floor of an exact quotient: integers stay integers."""
    return argument if isinstance(argument, int) or not torch.as_tensor(argument).is_floating_point() else torch.as_tensor(argument).floor()


# One row per operator of the vocabulary: sympy class name -> what it does to values.
_EVALUATE: Mapping[str, Callable[..., Value]] = {
    "Add": _fold(operator.add),
    "Mul": _fold(operator.mul),
    "Pow": _fold(_power),
    "Mod": operator.mod,
    "floor": _floor,
    "Min": _fold(_minimum),
    "Max": _fold(_maximum),
    "Abs": abs,
    "exp": _elementwise(torch.exp),
    "log": _elementwise(torch.log),
    "tanh": _elementwise(torch.tanh),
    "Sigmoid": _elementwise(torch.sigmoid),
    "Equality": operator.eq,
    "Unequality": operator.ne,
    "LessThan": operator.le,
    "StrictLessThan": operator.lt,
    "GreaterThan": operator.ge,
    "StrictGreaterThan": operator.gt,
    "And": _fold(operator.and_),
    "Or": _fold(operator.or_),
    "Not": lambda argument: torch.as_tensor(argument).logical_not(),
    "ITE": lambda condition, yes, no: torch.where(_tensor(condition), _tensor(yes), _tensor(no)),
}


@functools.lru_cache(maxsize=1024)
def without_fractions(relation: sympy.Rel) -> sympy.Rel:
    """The relation between integers that a relation between fractions of positions is, so that it holds exactly.

    sympy itself makes such fractions: it takes  floor(j / 9) >= n  to  j / 9 >= n.
    """
    if relation.atoms(sympy.Indexed, sympy.Float) or any(symbol.name == "qk" for symbol in relation.free_symbols):
        return relation
    numerator, denominator = sympy.fraction(sympy.together(relation.lhs - relation.rhs))
    return relation.func(numerator, 0) if denominator.is_Integer and denominator > 1 else relation


def evaluate_expression(expression: sympy.Basic, values: Mapping[str, Value]) -> Value:
    """The expression with symbols and tensors looked up by name, all broadcast against [B, H, Nq, Nk].

    Integer division appears as floor(x / n) and is done in integers, so that positions stay exact.
    """
    return _evaluate(expression, values, {})


def evaluate_expressions(expressions: Sequence[sympy.Basic], values: Mapping[str, Value]) -> list[Value]:
    """Several of them, what they have in common once."""
    known: dict[sympy.Basic, Value] = {}
    return [_evaluate(expression, values, known) for expression in expressions]


def _evaluate(expression: sympy.Basic, values: Mapping[str, Value], known: dict[sympy.Basic, Value]) -> Value:
    """known: what parts of the expression have come to so far."""
    if not expression.args or isinstance(expression, sympy.Indexed):
        return _leaf(expression, values)
    if expression not in known:
        known[expression] = _operation(expression, values, known)
    return known[expression]


def _leaf(expression: sympy.Basic, values: Mapping[str, Value]) -> Value:
    if isinstance(expression, BooleanTrue | BooleanFalse):
        return bool(expression)
    if isinstance(expression, sympy.Integer):
        return int(expression)
    if isinstance(expression, sympy.Rational | sympy.Float):
        return float(expression)
    if isinstance(expression, sympy.Symbol):
        return values[expression.name]
    if isinstance(expression, sympy.Indexed):
        return values[_label(expression)]
    raise TypeError(f"{expression} is not in the vocabulary of attention expressions")


@functools.lru_cache(maxsize=1024)
def _label(read: sympy.Indexed) -> str:
    return str(read.base.label)


def _operation(expression: sympy.Basic, values: Mapping[str, Value], known: dict[sympy.Basic, Value]) -> Value:
    if isinstance(expression, sympy.floor):
        numerator, denominator = sympy.fraction(sympy.together(expression.args[0]))
        if denominator != 1 and numerator.is_integer and denominator.is_integer:
            return _evaluate(numerator, values, known) // _evaluate(denominator, values, known)
    if isinstance(expression, sympy.Rel):
        expression = without_fractions(expression)
    if isinstance(expression, sympy.Piecewise):
        result: Value = None
        for piece, condition in reversed(expression.args):
            value = _evaluate(piece, values, known)
            holds = _evaluate(condition, values, known)
            # A last piece without an `otherwise` covers all that is left, by the vocabulary's convention.
            result = value if result is None or holds is True else torch.where(_tensor(holds), _tensor(value), _tensor(result))
        return result
    return _EVALUATE[type(expression).__name__](*(_evaluate(argument, values, known) for argument in expression.args))


def aligned(tensor: torch.Tensor, axes: str) -> torch.Tensor:
    """A tensor with the given axes (of "bhij") as one that broadcasts against [B, H, Nq, Nk]."""
    shape = [1, 1, 1, 1]
    for axis, size in zip(axes, tensor.shape, strict=True):
        shape["bhij".index(axis)] = size
    return tensor.reshape(shape)


def read_at(tensor: torch.Tensor, indices: Indices, values: Mapping[str, Value]) -> torch.Tensor:
    """A tensor read at its indices, as one that broadcasts against [B, H, Nq, Nk].

    values: of b, h, i, j, Nq and Nk, as far as the indices need them. Read at letters in order, axes are of the letters' sizes or 1. At
    any other indices, one outside its axis is clamped to it, so that an axis of size 1 is read at 0.
    """
    plain = letters(indices)
    if plain is not None:
        return aligned(tensor, plain)
    places = places_of(tensor.shape, indices, values, tensor.device)
    # Axes read at b, h and i are cut to what is there; the others become one, gathered from for every pair: one lookup each, not four.
    kept = {axis: indices.index(axis) for axis in (B, H, I) if axis in indices}
    rest = [axis for axis in range(tensor.dim()) if axis not in kept.values()]
    flat = torch.zeros(1, 1, 1, 1, dtype=torch.int64, device=tensor.device)
    for axis in rest:
        flat = flat * tensor.shape[axis] + places[axis]
    source = tensor.permute(*kept.values(), *rest).flatten(len(kept)) if rest else tensor.permute(*kept.values()).unsqueeze(-1)
    for dim, axis in reversed(list(enumerate(kept.values()))):
        source = source.index_select(dim, places[axis].flatten())
    source = source.view(*(source.shape[list(kept).index(axis)] if axis in kept else 1 for axis in (B, H, I)), -1)
    sizes = [max(have, wanted) if 0 not in (have, wanted) else 0 for have, wanted in zip(source.shape[:3], flat.shape[:3], strict=True)]
    return source.expand(*sizes, -1).gather(3, flat.expand(*sizes, -1))


def places_of(shape: Sequence[int], indices: Indices, values: Mapping[str, Value], device: torch.device) -> tuple[torch.Tensor, ...]:
    """The indices as numbers, one tensor per axis of `shape`, broadcasting against [B, H, Nq, Nk] and clamped to the axis."""
    found: list[torch.Tensor] = []
    for index, size in zip(indices, shape, strict=True):
        place = torch.as_tensor(evaluate_expression(index, values) if size > 1 else 0, device=device)
        found.append(place.clamp(0, size - 1).view((1,) * (4 - place.dim()) + place.shape))
    return tuple(found)


def positions(n_queries: int, n_keys: int, device: torch.device, queries: slice = slice(None)) -> dict[str, Value]:
    """Values of i, j, Nq and Nk for evaluating expressions, optionally for some of the queries only."""
    return {
        "i": torch.arange(n_queries, device=device)[queries].view(1, 1, -1, 1),
        "j": torch.arange(n_keys, device=device).view(1, 1, 1, -1),
        "Nq": n_queries,
        "Nk": n_keys,
    }


def all_positions(sizes: Sequence[int], device: torch.device) -> dict[str, Value]:
    """`positions`, and those of b and h, for sizes (B, H, Nq, Nk)."""
    batch, heads, n_queries, n_keys = sizes
    rows, planes = torch.arange(batch, device=device).view(-1, 1, 1, 1), torch.arange(heads, device=device).view(1, -1, 1, 1)
    return {**positions(n_queries, n_keys, device), "b": rows, "h": planes}
