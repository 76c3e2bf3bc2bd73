"""The symbols a score, a mask and a reweighting are written in, and their JSON form.

A site's arithmetic is sympy over a closed vocabulary, so that one printer per target (torch, Triton) covers every method:

    qk            the dot product  sum_d query[b,h,i,d] * key[b,h,j,d]
    b, h, i, j    batch, query head, query and key positions (integers from 0)
    Nq, Nk        numbers of queries and keys (known when the kernel is launched)
    name[...]     a tensor operand, read at some of b, h, i, j in that order, or at integer expressions in them, one per axis:
                  rel_h[b,h,i,floor(j/14)] reads a position table by the row of the key. An axis of size 1 is read at 0 whatever its
                  index; the others are of their letters' sizes where all indices are letters in order, and else an index outside an
                  axis is clamped to it (reads that must not happen are guarded by a Piecewise).
    w             inside `Attend.weight` only: the normalised weight of (b, h, i, j)
    total         inside `Attend.denominator` only: the sum of the scores of (b, h, i) over the keys it sees
    mass_<group>  inside `Groups.weights` only: the softmax mass of that group of keys for (b, h, i), summing to one over groups

A tensor is read at one index tuple only within an operation, so that its name says which value is meant. The axes of a matrix that mixes
heads are g, the head that results, and h, the head that is read; g occurs nowhere else.

The JSON form exists because a kernel's description travels through a graph as a string argument, and text is never evaluated here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import sympy
from sympy.logic.boolalg import Boolean, BooleanFalse, BooleanTrue

QK = sympy.Symbol("qk", real=True)
B, H, I, J = sympy.symbols("b h i j", integer=True, nonnegative=True)
NQ, NK = sympy.symbols("Nq Nk", integer=True, positive=True)

W = sympy.Symbol("w", real=True)
TOTAL = sympy.Symbol("total", real=True)
G = sympy.Symbol("g", integer=True, nonnegative=True)

INDICES: Mapping[str, sympy.Symbol] = {"b": B, "h": H, "i": I, "j": J}
_SYMBOLS: Mapping[str, sympy.Symbol] = {"qk": QK, "w": W, "total": TOTAL, "Nq": NQ, "Nk": NK, **INDICES}
_IN_AN_INDEX = frozenset({B, H, I, J, NQ, NK})

# Where a tensor operand is read: one index per axis.
Indices = tuple[sympy.Expr, ...]

# What the names of the groups' masses begin with.
_MASS = "mass_"


class Sigmoid(sympy.Function):  # type: ignore[misc]
    """1 / (1 + exp(-x)), whose value and derivative are finite for every x; spelt with exp they are not."""

    nargs = 1

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        """Sigmoid(x) Sigmoid(-x): a difference from one would lose the digits of a small weight."""
        return self * Sigmoid(-self.args[0])

    def _eval_evalf(self, prec: int) -> sympy.Expr:
        value: sympy.Expr = (1 / (1 + sympy.exp(-self.args[0])))._eval_evalf(prec)
        return value

    def _eval_is_positive(self) -> bool | None:
        return bool(self.args[0].is_real) or None


# Every operator an expression may contain; anything else is refused when it is written out.
_OPERATORS: Mapping[str, Callable[..., Any]] = {
    "Add": sympy.Add,
    "Mul": sympy.Mul,
    "Pow": sympy.Pow,
    "Mod": sympy.Mod,
    "floor": sympy.floor,
    "Min": sympy.Min,
    "Max": sympy.Max,
    "Abs": sympy.Abs,
    "exp": sympy.exp,
    "log": sympy.log,
    "tanh": sympy.tanh,
    "Sigmoid": Sigmoid,
    "Equality": sympy.Eq,
    "Unequality": sympy.Ne,
    "LessThan": sympy.Le,
    "StrictLessThan": sympy.Lt,
    "GreaterThan": sympy.Ge,
    "StrictGreaterThan": sympy.Gt,
    "And": sympy.And,
    "Or": sympy.Or,
    "Not": sympy.Not,
    "ITE": sympy.ITE,
}


def tensor(name: str, axes: str) -> sympy.Indexed:
    """The operand `name` read at the given axes, a subset of "bhij" in that order, for example ``tensor("bias", "hij")``."""
    return sympy.Indexed(sympy.IndexedBase(name, real=True), *(INDICES[axis] for axis in axes))


def read(name: str, *indices: sympy.Expr | int) -> sympy.Indexed:
    """The operand `name` read at one integer expression per axis, for example ``read("rel_h", B, H, I, sympy.floor(J / 14))``.

    Raises `ValueError` where an index is not an integer expression in b, h, i, j, Nq and Nk.
    """
    places = tuple(sympy.sympify(index) for index in indices)
    for place in places:
        if not place.is_integer or not place.free_symbols <= _IN_AN_INDEX:
            raise ValueError(f"{name} cannot be read at {place}: an index is an integer expression in b, h, i, j, Nq and Nk")
    return sympy.Indexed(sympy.IndexedBase(name, real=True), *places)


@lru_cache(maxsize=4096)
def letters(indices: Indices) -> str | None:
    """ "bij" and so on where every index is one of b, h, i, j, in that order and each once; None for any other indices."""
    names = "".join(str(index) for index in indices if index in INDICES.values())
    return names if len(names) == len(indices) and list(names) == sorted(set(names), key="bhij".index) else None


def mass(group: str) -> sympy.Symbol:
    """The softmax mass of a group of keys, for one (batch, head, query): a number in [0, 1]."""
    return sympy.Symbol(f"{_MASS}{group}", real=True, nonnegative=True)


def tensors_in(*expressions: sympy.Basic) -> dict[str, Indices]:
    """Every tensor operand read by the expressions, in order of name: name -> where it is read.

    Raises `ValueError` where one name is read at two places, or is that of a symbol.
    """
    found: dict[str, Indices] = {}
    for expression in expressions:
        for each in expression.atoms(sympy.Indexed):
            name, places = str(each.base.label), tuple(each.indices)
            if name in _SYMBOLS:
                raise ValueError(f"a tensor cannot be called {name}: that is a symbol of the vocabulary")
            if found.setdefault(name, places) != places:
                both = " and at ".join(sorted(f"[{', '.join(map(str, indices))}]" for indices in (found[name], places)))
                raise ValueError(f"{name} is read at {both}; give the second read a name of its own")
    return dict(sorted(found.items()))


def to_json(expression: sympy.Basic) -> Any:
    """A JSON value for an expression of the vocabulary; raises `TypeError` for anything outside it."""
    if isinstance(expression, BooleanTrue):
        return True
    if isinstance(expression, BooleanFalse):
        return False
    if isinstance(expression, sympy.Integer):
        return int(expression)
    if isinstance(expression, sympy.Float):
        return float(expression)
    if isinstance(expression, sympy.Rational):
        return ["Rational", int(expression.p), int(expression.q)]
    if isinstance(expression, sympy.Symbol):
        if expression.name not in _SYMBOLS and not expression.name.startswith(_MASS):
            raise TypeError(f"the symbol {expression.name} is not in the vocabulary of attention expressions")
        return ["Symbol", expression.name]
    if isinstance(expression, sympy.Indexed):
        plain = letters(expression.indices)
        places = plain if plain is not None else [to_json(index) for index in expression.indices]
        return ["Tensor", str(expression.base.label), places]
    if isinstance(expression, sympy.Piecewise):
        return ["Piecewise", *([to_json(value), to_json(condition)] for value, condition in expression.args)]
    name = type(expression).__name__
    if name not in _OPERATORS:
        raise TypeError(f"{name} is not in the vocabulary of attention expressions (in {expression})")
    return [name, *(to_json(argument) for argument in expression.args)]


def from_json(value: Any) -> Any:
    """The expression that `to_json` wrote; raises `TypeError` for a name outside the vocabulary."""
    if isinstance(value, bool):
        return sympy.true if value else sympy.false
    if isinstance(value, int):
        return sympy.Integer(value)
    if isinstance(value, float):
        return sympy.Float(value)
    head, *arguments = value
    if head == "Rational":
        return sympy.Rational(*arguments)
    if head == "Symbol":
        name = arguments[0]
        if name not in _SYMBOLS and not name.startswith(_MASS):
            raise TypeError(f"the symbol {name} is not in the vocabulary of attention expressions")
        return _SYMBOLS[name] if name in _SYMBOLS else mass(name.removeprefix(_MASS))
    if head == "Tensor":
        name, places = arguments
        return tensor(name, places) if isinstance(places, str) else read(name, *(from_json(index) for index in places))
    if head == "Piecewise":
        return sympy.Piecewise(*((from_json(piece), from_json(condition)) for piece, condition in arguments))
    if head not in _OPERATORS:
        raise TypeError(f"{head} is not in the vocabulary of attention expressions")
    return _OPERATORS[head](*(from_json(argument) for argument in arguments))


def conjuncts(predicate: Boolean) -> tuple[Boolean, ...]:
    """The terms of a conjunction, or the predicate itself."""
    return tuple(predicate.args) if isinstance(predicate, sympy.And) else (predicate,)


def is_static(expression: sympy.Basic) -> bool:
    """True where the value depends on positions and sizes only, not on the contents of a tensor."""
    return not expression.atoms(sympy.Indexed)
