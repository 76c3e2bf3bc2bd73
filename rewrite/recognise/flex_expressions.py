"""Score and mask functions of FlexAttention, captured as graphs of numbers, as expressions of the IR."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from sympy.logic.boolalg import Boolean
from torch import fx

from rewrite.ir.expression import NK, NQ, B, H, I, J, read
from rewrite.recognise.operators import exact, spelled, value_of
from rewrite.recognise.region import Layout, NearMissError, Operand

_HALF = sympy.Rational(1, 2)


@dataclass(frozen=True)
class Number:
    """A number or truth value of one (b, h, i, j), and where it is minus infinity instead."""

    value: Any
    hidden: Boolean = sympy.false


@dataclass(frozen=True)
class Buffer:
    """A tensor that is read, and the indices it was given so far."""

    node: fx.Node
    indices: tuple[sympy.Expr, ...] = ()


@dataclass(frozen=True)
class Unread:
    """What a function was given and may leave unread; the reason why it cannot be read."""

    reason: str


def _is_truth(value: Any) -> bool:
    # To sympy a symbol may be either; here symbols are numbers.
    return isinstance(value, Boolean) and not isinstance(value, sympy.Symbol)


def _truth(value: Any) -> Any:
    return value if _is_truth(value) else sympy.Ne(value, 0)


def _number(value: Any) -> Any:
    return sympy.Piecewise((1, value), (0, True)) if _is_truth(value) else value


def _numbers(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *values: function(*map(_number, values))


def _truths(function: Callable[..., Any]) -> Callable[..., Any]:
    """A logical operator; on integers it would work bit by bit."""

    def apply(*values: Any) -> Any:
        if not all(map(_is_truth, values)):
            raise NearMissError("it works on the bits of integers")
        return function(*values)

    return apply


def _equal(left: Any, right: Any) -> Any:
    if _is_truth(left) and _is_truth(right):
        return sympy.Or(sympy.And(left, right), sympy.And(sympy.Not(left), sympy.Not(right)))
    return sympy.Eq(_number(left), _number(right))


# What an operator does to values, by its name; an operator that is not here is not read.
_OPERATORS: Mapping[str, Callable[..., Any]] = {
    **dict.fromkeys(("add", "radd"), _numbers(lambda left, right: left + right)),
    **dict.fromkeys(("sub", "subtract"), _numbers(lambda left, right: left - right)),
    "rsub": _numbers(lambda left, right: right - left),
    **dict.fromkeys(("mul", "multiply", "rmul"), _numbers(lambda left, right: left * right)),
    **dict.fromkeys(("div", "divide", "truediv", "true_divide"), _numbers(lambda left, right: left / right)),
    **dict.fromkeys(("floordiv", "floor_divide"), _numbers(lambda left, right: sympy.floor(left / right))),
    **dict.fromkeys(("mod", "remainder"), _numbers(sympy.Mod)),
    **dict.fromkeys(("neg", "negative"), _numbers(lambda value: -value)),
    **dict.fromkeys(("abs", "absolute"), _numbers(sympy.Abs)),
    "square": _numbers(lambda value: value**2),
    "pow": _numbers(lambda base, exponent: base**exponent),
    "exp": _numbers(sympy.exp),
    "exp2": _numbers(lambda value: sympy.exp(sympy.Float(math.log(2)) * value)),
    "log": _numbers(sympy.log),
    "log2": _numbers(lambda value: sympy.log(value) * sympy.Float(1 / math.log(2))),
    "tanh": _numbers(sympy.tanh),
    "sigmoid": _numbers(lambda value: 1 / (1 + sympy.exp(-value))),
    "relu": _numbers(lambda value: sympy.Max(value, 0)),
    "sqrt": _numbers(lambda value: value**_HALF),
    "rsqrt": _numbers(lambda value: value**-_HALF),
    "reciprocal": _numbers(lambda value: 1 / value),
    **dict.fromkeys(("minimum", "min", "clamp_max"), _numbers(sympy.Min)),
    **dict.fromkeys(("maximum", "max", "clamp_min"), _numbers(sympy.Max)),
    "eq": _equal,
    "ne": lambda left, right: sympy.Not(_equal(left, right)),
    **dict.fromkeys(("lt", "less"), _numbers(sympy.Lt)),
    **dict.fromkeys(("le", "less_equal"), _numbers(sympy.Le)),
    **dict.fromkeys(("gt", "greater"), _numbers(sympy.Gt)),
    **dict.fromkeys(("ge", "greater_equal"), _numbers(sympy.Ge)),
    **dict.fromkeys(("and", "bitwise_and"), _truths(sympy.And)),
    **dict.fromkeys(("or", "bitwise_or"), _truths(sympy.Or)),
    **dict.fromkeys(("xor", "bitwise_xor"), _truths(lambda left, right: sympy.Not(_equal(left, right)))),
    **dict.fromkeys(("invert", "bitwise_not"), _truths(sympy.Not)),
    "logical_and": lambda left, right: sympy.And(_truth(left), _truth(right)),
    "logical_or": lambda left, right: sympy.Or(_truth(left), _truth(right)),
    "logical_not": lambda value: sympy.Not(_truth(value)),
}
_FILLED = {"ones": 1, "new_ones": 1, "ones_like": 1, "zeros": 0, "new_zeros": 0, "zeros_like": 0}
_CASTS = {"float": torch.float32, "double": torch.float64, "half": torch.float16, "bfloat16": torch.bfloat16, "bool": torch.bool}
_CASTS |= {"int": torch.int32, "long": torch.int64}
_UNCHANGED = frozenset({"clone", "contiguous", "detach", "view", "reshape", "squeeze"})


@dataclass
class FlexReader:
    """Reads score and mask functions; what they read of tensors is gathered in `operands`.

    sizes: the traced lengths of b, h, i and j.
    """

    sizes: Mapping[sympy.Symbol, Any]
    operands: dict[str, Operand] = field(default_factory=dict)
    _names: dict[tuple[fx.Node, tuple[sympy.Expr, ...]], str] = field(default_factory=dict)

    def score(self, body: fx.GraphModule, given: sympy.Expr, captured: Sequence[Any]) -> Number:
        """The score that a score function makes of `given`."""
        return self._read(body, (Number(given), *map(Number, (B, H, I, J))), captured)

    def mask(self, body: fx.GraphModule, captured: Sequence[Any]) -> Boolean:
        """The pairs that a mask function lets take part."""
        found = _truth(self._read(body, tuple(map(Number, (B, H, I, J))), captured).value)
        return found if isinstance(found, Boolean) else sympy.sympify(bool(found))

    def _read(self, body: fx.GraphModule, given: Sequence[Number], captured: Sequence[Any]) -> Number:
        values = iter((*given, *map(self._captured, captured)))
        known: dict[fx.Node, Any] = {}
        for node in body.graph.nodes:
            if node.op == "placeholder":
                known[node] = next(values)
            elif node.op == "output":
                (result,) = node.args if isinstance(node.args[0], fx.Node) else node.args[0]
                return self._completed(known[result])
            elif node.op in ("call_function", "call_method"):
                known[node] = self._operator(node, lambda value: self._argument(value, known))
            else:
                raise NearMissError(f"its functions hold {node.name}, a tensor of their own")
        raise NearMissError("one of its functions gives nothing")

    def _captured(self, value: Any) -> Any:
        """What a function captured, as it enters the function's graph."""
        traced = value_of(value) if isinstance(value, fx.Node) else value
        if isinstance(traced, torch.Tensor) and isinstance(value, fx.Node):
            return Buffer(value)
        if isinstance(traced, torch.SymInt | torch.SymFloat):
            expression = traced.node.expr
            if expression.is_number:
                return Number(sympy.sympify(expression))
            for index, symbol in ((I, NQ), (J, NK)):
                if exact(self.sizes[index]) == expression:
                    return Number(symbol)
            return Unread(f"its functions read {expression}, a number that changes from call to call")
        if isinstance(traced, bool | int | float):
            return _constant(traced)
        return Unread(f"its functions read {value}, which is neither a tensor nor a number")

    def _argument(self, value: Any, known: Mapping[fx.Node, Any]) -> Any:
        if isinstance(value, fx.Node):
            return known[value]
        return _constant(value) if isinstance(value, bool | int | float) else value

    def _completed(self, value: Any) -> Number:
        """A number; a tensor that was given an index for every axis is read there."""
        if isinstance(value, Number):
            return value
        if isinstance(value, Unread):
            raise NearMissError(value.reason)
        if not isinstance(value, Buffer):
            raise NearMissError(f"one of its functions computes with {value!r}")
        traced = value_of(value.node)
        if len(value.indices) != traced.dim():
            raise NearMissError(f"{value.node.name} is read as a row, not as a number")
        places = tuple(map(self._within, value.indices, traced.shape))
        key = (value.node, places)
        if key not in self._names:
            kind = "mask" if traced.dtype == torch.bool else "bias" if traced.is_floating_point() else "index"
            self._names[key] = name = f"{kind}{len(self._names)}"
            # A single number keeps one axis, which is of size one wherever it is read.
            single = Layout(order=(0,), appended=1)
            self.operands[name] = Operand(value.node, Layout(order=tuple(range(traced.dim()))) if traced.dim() else single)
        try:
            found = read(self._names[key], *(places or (J,)))
        except ValueError as error:
            raise NearMissError(str(error)) from None
        return Number(sympy.Ne(found, 0) if traced.dtype == torch.bool else found)

    def _within(self, index: sympy.Expr, extent: Any) -> sympy.Expr:
        """An index as the IR reads it: a bare position runs over a whole axis, which must then be as long as there are positions."""
        if index not in self.sizes or exact(self.sizes[index]) == exact(extent):
            return index
        if not isinstance(extent, int):
            raise NearMissError(f"its functions read a tensor of {extent} by {index}, of which there are {self.sizes[index]}")
        return sympy.Min(index, extent - 1)

    def _operator(self, node: fx.Node, value: Callable[[Any], Any]) -> Any:
        name = spelled(node).strip("_")
        if name in ("getitem", "index"):
            buffer, index = value(node.args[0]), node.args[1]
            if not isinstance(buffer, Buffer):
                raise NearMissError(f"{node.name} indexes what is not a tensor")
            entries = [self._completed(value(each)).value for each in (index if isinstance(index, tuple | list) else (index,))]
            return Buffer(buffer.node, (*buffer.indices, *entries))
        if name in _FILLED:
            return _constant(bool(_FILLED[name]) if value_of(node).dtype == torch.bool else _FILLED[name])
        operands = [self._completed(value(each)) for each in node.args if not isinstance(each, torch.dtype | torch.device)]
        if name in ("to", "type", "type_as") or name in _CASTS:
            return _cast(operands[0], value_of(node).dtype)
        if name in _UNCHANGED:
            return operands[0]
        keywords = {key: self._completed(value(each)) for key, each in node.kwargs.items() if each is not None}
        if name == "where" and len(operands) == 3 and not keywords:
            condition, yes, no = operands if node.op == "call_function" else (operands[1], operands[0], operands[2])
            return _chosen(condition, yes, no)
        if name == "masked_fill" and len(operands) == 3 and not keywords:
            return _chosen(operands[1], operands[2], operands[0])
        if name in ("clamp", "clip") and len(operands) == 1:
            low, high = keywords.pop("min", None), keywords.pop("max", None)
            bounded = operands[0] if low is None else _apply("maximum", [operands[0], low], node)
            return bounded if high is None else _apply("minimum", [bounded, high], node)
        if keywords or name not in _OPERATORS:
            raise NearMissError(f"its functions use {spelled(node)}, which is not read")
        return _apply(name, operands, node)


def _constant(value: float) -> Number:
    if isinstance(value, bool):
        return Number(sympy.true if value else sympy.false)
    if isinstance(value, float) and math.isinf(value):
        if value > 0:
            raise NearMissError("one of its functions computes with infinity")
        return Number(sympy.Integer(0), sympy.true)
    return Number(sympy.Integer(value) if isinstance(value, int) else sympy.Float(value))


def _cast(given: Number, dtype: torch.dtype) -> Number:
    if dtype == torch.bool:
        return Number(_truth(given.value))
    value = _number(given.value)
    if not dtype.is_floating_point and not value.is_integer:
        raise NearMissError("one of its functions cuts a number to an integer")
    return Number(value, given.hidden)


def _chosen(condition: Number, yes: Number, no: Number) -> Number:
    holds = _truth(condition.value)
    hidden = sympy.Or(sympy.And(holds, yes.hidden), sympy.And(sympy.Not(holds), no.hidden))
    if yes.hidden == sympy.true:
        return Number(no.value, hidden)
    if no.hidden == sympy.true:
        return Number(yes.value, hidden)
    if _is_truth(yes.value) and _is_truth(no.value):
        return Number(sympy.ITE(holds, yes.value, no.value), hidden)
    return Number(sympy.Piecewise((_number(yes.value), holds), (_number(no.value), True)), hidden)


def _apply(name: str, operands: Sequence[Number], node: fx.Node) -> Number:
    """An operator on numbers; minus infinity stays what it is under addition and positive factors, and is not followed elsewhere."""
    hidden = [operand for operand in operands if operand.hidden != sympy.false]
    value = _OPERATORS[name](*(operand.value for operand in operands))
    if not hidden:
        return Number(value)
    others = [operand.value for operand in operands if operand is not hidden[0]]
    adds = name in ("add", "radd") or (name == "sub" and hidden[0] is operands[0])
    scales = name in ("mul", "multiply", "rmul") or (name in ("div", "truediv") and hidden[0] is operands[0])
    if len(hidden) > 1 or not (adds or (scales and all(other.is_number and other > 0 for other in others))):
        raise NearMissError(f"its functions compute on with minus infinity ({spelled(node)})")
    return Number(value, hidden[0].hidden)
