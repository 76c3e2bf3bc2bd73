"""Expressions as Triton text. Triton divides integers as C does; the text is evaluated here with numbers that do the same."""

from __future__ import annotations

import math
from types import SimpleNamespace

import attention_forms as forms
import pytest
import sympy
import torch

from codegen.triton_printer import triton_text
from rewrite.ir import QK, I, J, RewriteError, Sigmoid, mass, semantics, tensor

NAMES = {"i": "i", "j": "j", "Nq": "Nq", "Nk": "Nk", "qk": "qk", "bias": "bias", "mask": "mask", "mass_text": "mass_text"}


class CInt(int):
    """An integer whose division and remainder truncate."""

    def __floordiv__(self, other: int) -> CInt:
        return CInt(math.trunc(int(self) / int(other)))

    def __mod__(self, other: int) -> CInt:
        return CInt(math.fmod(int(self), int(other)))

    def __add__(self, other: int) -> CInt:
        return CInt(int(self) + int(other)) if isinstance(other, int) else int(self) + other

    def __sub__(self, other: int) -> CInt:
        return CInt(int(self) - int(other)) if isinstance(other, int) else int(self) - other

    def __mul__(self, other: int) -> CInt:
        return CInt(int(self) * int(other)) if isinstance(other, int) else int(self) * other

    __radd__, __rmul__ = __add__, __mul__

    def __rsub__(self, other: int) -> CInt:
        return CInt(int(other) - int(self))

    def __neg__(self) -> CInt:
        return CInt(-int(self))


TL = SimpleNamespace(
    where=lambda condition, yes, no: (
        CInt(yes if condition else no) if isinstance(yes, int) and isinstance(no, int) else yes if condition else no
    ),
    minimum=min,
    maximum=max,
    exp=math.exp,
    exp2=lambda x: 2.0**x,
    log=math.log,
    log2=math.log2,
    sqrt=math.sqrt,
    abs=abs,
    sigmoid=lambda x: 1 / (1 + math.exp(-x)),
)


def value_of(expression: sympy.Basic, **values: float) -> float:
    text = triton_text(expression, {name: name for name in values})
    return eval(text, {"tl": TL}, {name: CInt(value) if isinstance(value, int) else value for name, value in values.items()})


@pytest.mark.parametrize(
    "expression",
    [
        sympy.floor((I - 5) / 7),
        sympy.floor(I / 3) * 2 + J,
        sympy.Mod(I - 9, 4),
        sympy.Mod(I - J, 5),
        sympy.Max(0, sympy.Min(I - 3, 6), J - 2),
        sympy.Abs(I - J),
        sympy.floor((I - J) / 4) - sympy.floor(J / 2),
        sympy.Piecewise((I, I < J), (J - I, sympy.Eq(sympy.Mod(I, 2), 0)), (sympy.Integer(7), True)),
    ],
)
def test_integers(expression: sympy.Expr) -> None:
    for i in range(12):
        for j in range(12):
            assert value_of(expression, i=i, j=j) == expression.subs({I: i, J: j}), triton_text(expression, NAMES)


@pytest.mark.parametrize(
    "mask",
    [
        forms.neighbourhood_2d(5, 6, 3, 2, 1).mask,
        forms.neighbourhood_2d(3, 14, 3, 1, 1).mask,
        forms.neighbourhood_1d(14, 5, 3, 2).mask,
        forms.empty_rows().mask,
    ],
)
def test_predicates(mask: sympy.Basic) -> None:
    n = 32
    seen = semantics.evaluate_expression(mask, semantics.positions(n, n, torch.device("cpu"))).expand(1, 1, n, n)[0, 0]
    code = compile(triton_text(mask, NAMES), "mask", "eval")
    for i in range(n):
        for j in range(n):
            assert bool(eval(code, {"tl": TL}, {"i": CInt(i), "j": CInt(j)})) == bool(seen[i, j]), (i, j)


def test_comparisons_of_fractions_are_exact() -> None:
    """sympy takes floor((j - 1) / 14) >= 3 to j/14 - 1/14 >= 3, which floating point misses at j = 43."""
    term = sympy.floor((J - 1) / 14) >= 3
    assert value_of(term, j=43)
    assert not value_of(term, j=42)


@pytest.mark.parametrize(
    "expression",
    [
        30 * sympy.tanh(QK / 30),
        Sigmoid(QK - sympy.log(3)) * Sigmoid(sympy.Integer(2)),
        0.125 * QK + tensor("bias", "hij"),
        sympy.exp(-(QK**2)) / (1 + sympy.Abs(QK)),
        (1 + 0.4 * mass("text")) / mass("text"),
        sympy.sqrt(1 + mass("text")) * QK,
        sympy.Pow(2, -mass("text")) - QK / 3,
        1 / mass("text") ** 2,
        sympy.Pow(mass("text"), -5) + QK,
        sympy.Pow(mass("text"), sympy.Rational(-3, 2)) * QK,
        sympy.Pow(mass("text"), sympy.Rational(5, 2)) * QK,
        -QK,
    ],
)
@pytest.mark.parametrize("qk", [-80.0, -0.3, 0.0, 2.5])
def test_real_expressions(expression: sympy.Expr, qk: float) -> None:
    values = {"qk": qk, "bias": 0.7, "mass_text": 0.3}
    wanted = float(expression.subs({QK: qk, tensor("bias", "hij"): 0.7, mass("text"): 0.3}))
    assert value_of(expression, **values) == pytest.approx(wanted, rel=1e-12, abs=1e-12)


def test_text() -> None:
    assert triton_text(0.125 * QK + tensor("bias", "hij"), {**NAMES, "bias": "bias_tile"}) == "0.125 * qk + bias_tile"
    assert triton_text(sympy.log(I + 1) / sympy.log(2), {"i": "i"}) == "tl.log((i + 1) * 1.0) / 0.6931471805599453"
    assert triton_text(sympy.floor(I / 8), {"i": "i[:, None]"}) == "(i[:, None] // 8)"
    assert triton_text(J <= I, {"i": "i[:, None]", "j": "j[None, :]"}) == "j[None, :] <= i[:, None]"
    assert triton_text(sympy.Not(sympy.Ne(tensor("mask", "bij"), 0), evaluate=False), NAMES) == "~(mask != 0)"


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        (sympy.sin(QK), "sin has no Triton form"),
        (sympy.floor(QK), "integer quotient"),
        (QK ** sympy.Rational(1, 3), "only powers"),
        (sympy.Mod(I, J - 3), "positive"),
        (mass("other"), "cannot be read"),
    ],
)
def test_what_cannot_be_printed_is_refused(expression: sympy.Expr, reason: str) -> None:
    with pytest.raises(RewriteError, match=reason):
        triton_text(expression, NAMES)
