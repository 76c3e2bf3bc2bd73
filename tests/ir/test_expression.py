"""Expressions: written to JSON and back with the same meaning, and evaluated exactly."""

from __future__ import annotations

import json
import math

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rewrite.ir import NK, NQ, QK, B, G, H, I, J, Sigmoid, W, conjuncts, is_static, letters, mass, read, tensor, tensors_in
from rewrite.ir.expression import from_json, to_json
from rewrite.ir.semantics import evaluate_expression, positions, read_at
from rewrite.ir.site import is_causal_term

TENSORS = {"bias": tensor("bias", "hij"), "slope": tensor("slope", "h")}
QUERIES, KEYS = 5, 7


def environment() -> dict[str, object]:
    random = torch.Generator().manual_seed(0)
    return {
        **positions(QUERIES, KEYS, torch.device("cpu")),
        "b": torch.arange(2).view(-1, 1, 1, 1),
        "h": torch.arange(3).view(1, -1, 1, 1),
        "qk": torch.randn(2, 3, QUERIES, KEYS, generator=random, dtype=torch.float64),
        "bias": torch.randn(1, 3, QUERIES, KEYS, generator=random, dtype=torch.float64),
        "slope": torch.rand(1, 3, 1, 1, generator=random, dtype=torch.float64),
        "mass_visual": torch.rand(2, 3, QUERIES, 1, generator=random, dtype=torch.float64),
    }


INTEGERS = st.recursive(
    st.one_of(st.sampled_from([I, J, B, H, NQ, NK]), st.integers(-9, 9).map(sympy.Integer)),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(lambda pair: pair[0] + pair[1]),
        st.tuples(inner, inner).map(lambda pair: pair[0] - pair[1]),
        st.tuples(inner, st.integers(2, 5)).map(lambda pair: sympy.Mod(*pair)),
        st.tuples(inner, st.integers(2, 5)).map(lambda pair: sympy.floor(pair[0] / pair[1])),
        st.tuples(inner, inner).map(lambda pair: sympy.Min(*pair)),
        st.tuples(inner, inner).map(lambda pair: sympy.Max(*pair)),
    ),
    max_leaves=5,
)
RELATIONS = st.sampled_from([sympy.Le, sympy.Lt, sympy.Ge, sympy.Gt, sympy.Eq, sympy.Ne])
PREDICATES = st.recursive(
    st.tuples(RELATIONS, INTEGERS, INTEGERS).map(lambda parts: parts[0](*parts[1:])),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(lambda pair: sympy.And(*pair)),
        st.tuples(inner, inner).map(lambda pair: sympy.Or(*pair)),
        inner.map(sympy.Not),
    ),
    max_leaves=3,
)
SCORES = st.recursive(
    st.one_of(
        st.sampled_from([QK, mass("visual"), *TENSORS.values()]),
        st.floats(-4, 4).map(sympy.Float),
        st.fractions(-3, 3, max_denominator=9).map(lambda value: sympy.Rational(value.numerator, value.denominator)),
        INTEGERS,
    ),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(lambda pair: pair[0] + pair[1]),
        st.tuples(inner, inner).map(lambda pair: pair[0] * pair[1]),
        inner.map(sympy.tanh),
        inner.map(Sigmoid),
        inner.map(lambda value: sympy.exp(sympy.tanh(value))),
        inner.map(lambda value: sympy.log(1 + value**2)),
        inner.map(lambda value: sympy.sqrt(sympy.Abs(value))),
        st.tuples(inner, PREDICATES, inner).map(lambda parts: sympy.Piecewise((parts[0], parts[1]), (parts[2], True))),
    ),
    max_leaves=4,
)


def value(expression: sympy.Basic) -> torch.Tensor:
    return torch.as_tensor(evaluate_expression(expression, environment())).expand(2, 3, QUERIES, KEYS)


def through_json(expression: sympy.Basic) -> sympy.Basic:
    return from_json(json.loads(json.dumps(to_json(expression))))


@settings(max_examples=150, deadline=None)
@given(st.one_of(PREDICATES, INTEGERS))
def test_json_keeps_positions_exactly(expression: sympy.Basic) -> None:
    assert torch.equal(value(through_json(expression)), value(expression))


@settings(max_examples=150, deadline=None)
@given(SCORES)
def test_json_keeps_scores(expression: sympy.Expr) -> None:
    again = through_json(expression)
    torch.testing.assert_close(value(again).double(), value(expression).double(), rtol=1e-12, atol=1e-12, equal_nan=True)
    assert through_json(again) == again
    assert tensors_in(again) == tensors_in(expression)
    assert is_static(again) == is_static(expression)


@settings(max_examples=200, deadline=None)
@given(PREDICATES)
def test_predicates_mean_what_sympy_means_at_every_position(predicate: sympy.Basic) -> None:
    computed = value(predicate)
    for b, h, i, j in ((0, 0, 0, 0), (1, 2, 4, 6), (0, 1, 3, 2), (1, 0, 2, 5)):
        exact = predicate.subs({B: b, H: h, I: i, J: j, NQ: QUERIES, NK: KEYS})
        assert bool(computed[b, h, i, j]) == bool(exact)


@pytest.mark.parametrize("offset", [0, 1, 5, 9, 14])
def test_a_comparison_of_quotients_is_exact_though_sympy_drops_the_floor(offset: int) -> None:
    """floor(x) >= n becomes x >= n, which in floating point is false at some x = n."""
    numbers = torch.arange(100).view(1, 1, 1, -1)
    for row in range(1, 8):
        mask = evaluate_expression(sympy.floor((J - offset) / 9) >= row, {"j": numbers})
        assert torch.equal(mask, (numbers - offset) // 9 >= row)


def test_constants_keep_double_precision() -> None:
    factor = sympy.Piecewise((sympy.Float(0.6), I > 2), (sympy.Integer(1), True))
    assert value(factor)[0, 0, -1, 0].item() == 0.6
    assert value(sympy.Float(0.1) * (J - I))[0, 0, 0, 3].item() == 0.1 * 3
    assert value(sympy.Max(mass("visual"), sympy.Float(1.1)))[0, 0, 0, 0].item() == 1.1
    assert value(1 / (J + 1))[0, 0, 0, 2].item() == 1 / 3
    assert value(sympy.exp(J))[0, 0, 0, 1].item() == pytest.approx(math.e, rel=1e-15)


@pytest.mark.parametrize("expression", [sympy.sin(QK), sympy.Symbol("x") + 1, sympy.oo * sympy.Symbol("qk"), sympy.pi * QK, sympy.I * QK])
def test_what_is_outside_the_vocabulary_is_not_written(expression: sympy.Expr) -> None:
    with pytest.raises(TypeError):
        to_json(expression)


@pytest.mark.parametrize("data", [["Symbol", "x"], ["sin", ["Symbol", "qk"]], ["__import__", "os"], ["Add", ["Symbol", "__class__"], 1]])
def test_what_is_outside_the_vocabulary_is_not_read(data: object) -> None:
    with pytest.raises(TypeError, match="not in the vocabulary"):
        from_json(data)


@pytest.mark.parametrize(
    ("term", "causal"),
    [
        (J <= I, True),
        (I >= J, True),
        (J < I + 1, True),
        (I - J >= 0, True),
        (J <= I + NK - NQ, True),
        (J < I + NK - NQ + 1, True),
        (J + NQ <= I + NK, True),
        (J <= I + NK - NQ - 1, True),
        (J < I, True),
        (J <= I + 1, False),
        (J < I + 2, False),
        (J <= I + NK, False),
        (J <= I + NK - NQ + 1, False),
        (J >= I, False),
        (J <= 2 * I, False),
        (J >= I - 4, False),
        (J <= 5, False),
        (sympy.Eq(I, J), False),
        (sympy.Ne(tensor("padding", "bj"), 0), False),
        (sympy.Or(J <= I, J < 3), False),
        (sympy.true, False),
    ],
)
def test_causal_terms(term: sympy.Basic, causal: bool) -> None:
    assert is_causal_term(term) is causal


def test_conjuncts() -> None:
    assert set(conjuncts(sympy.And(J <= I, J > I - 4))) == {J <= I, J > I - 4}
    assert conjuncts(sympy.true) == (sympy.true,)


TABLE = read("table", H, sympy.floor(sympy.Mod(J, 6) / 2), I - J + NK - 1)


def test_letters_are_axes_in_order() -> None:
    assert letters(tensor("bias", "hij").indices) == "hij"
    assert letters(read("bias", H, I, J).indices) == "hij"
    assert letters(()) == ""
    for indices in ((J, I), (I, I), (H, I + 1), (sympy.Integer(0),), (G, H)):
        assert letters(indices) is None


@pytest.mark.parametrize("index", [QK, J / 2, sympy.Symbol("x", integer=True), W, tensor("order", "j"), 1.5])
def test_an_index_is_an_integer_expression_in_positions(index: sympy.Expr) -> None:
    with pytest.raises(ValueError, match="table cannot be read at"):
        read("table", index)


def test_where_tensors_are_read() -> None:
    assert tensors_in(TABLE + tensor("bias", "hj") * QK) == {"bias": (H, J), "table": TABLE.indices}
    with pytest.raises(ValueError, match=r"bias is read at \[h\] and at \[j\]"):
        tensors_in(tensor("bias", "h") + read("bias", J))
    with pytest.raises(ValueError, match="called w"):
        tensors_in(tensor("w", "h"))


def test_json_keeps_reads() -> None:
    score = QK + TABLE + read("constant", 3) + W
    assert through_json(score) == score
    assert to_json(read("bias", H, J)) == ["Tensor", "bias", "hj"]
    with pytest.raises(TypeError, match="vocabulary"):
        from_json(["Tensor", "table", [["Symbol", "x"]]])
    with pytest.raises(ValueError, match="cannot be read at"):
        from_json(["Tensor", "table", [["Symbol", "qk"]]])


@pytest.mark.parametrize("sizes", [(3, 3, 11), (1, 2, 4), (3, 1, 1)])
def test_reads_are_clamped_and_single_entries_broadcast(sizes: tuple[int, int, int]) -> None:
    table = torch.randn(sizes, generator=torch.Generator().manual_seed(1))
    found = read_at(table, TABLE.indices, environment()).expand(1, 3, QUERIES, KEYS)
    for h, i, j in ((0, 0, 0), (2, 4, 0), (1, 2, 6), (2, 0, 6), (0, 4, 5)):
        wanted = (h, j % 6 // 2, i - j + KEYS - 1)
        assert found[0, h, i, j] == table[tuple(min(place, size - 1) for place, size in zip(wanted, sizes, strict=True))]


def test_a_quotient_by_a_length_is_exact() -> None:
    """j / Nk is rounded, and floor(49 * (1 / 49)) is 0."""
    numbers = torch.arange(200)
    assert torch.equal(evaluate_expression(sympy.floor(J / NK), {"j": numbers, "Nk": 49}), numbers // 49)


@pytest.mark.parametrize(
    ("indices", "shape"),
    [
        ((B, H, I, sympy.floor(J / 2)), (2, 3, QUERIES, 4)),
        ((sympy.floor(J / 2), I, H), (4, QUERIES, 3)),
        ((J, I), (KEYS, QUERIES)),
        ((I, I), (QUERIES, QUERIES)),
        ((H, sympy.floor(I / 2), B, sympy.Mod(J, 3)), (2, 2, 1, 3)),
        ((sympy.Integer(2), NK - 1), (4, 9)),
    ],
)
def test_reads_at_any_order_of_indices(indices: tuple[sympy.Expr, ...], shape: tuple[int, ...]) -> None:
    table = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    found = read_at(table, indices, environment()).expand(2, 3, QUERIES, KEYS)
    for b, h, i, j in ((0, 0, 0, 0), (1, 2, 4, 6), (1, 1, 3, 2), (0, 2, 1, 5)):
        places = [int(index.subs({B: b, H: h, I: i, J: j, NK: KEYS})) for index in map(sympy.sympify, indices)]
        assert found[b, h, i, j] == table[tuple(min(place, size - 1) for place, size in zip(places, shape, strict=True))]
