"""What can be told of a weight expression."""

from __future__ import annotations

from dataclasses import replace

import attention_forms as forms
import pytest
import sympy

from codegen.tensor_reads import derivative
from codegen.weight_form import split_visits, vanishes, weight_factor
from rewrite.ir import QK, H, I, J, RewriteError, W, read, tensor

GATE = tensor("gate", "h")
CASES: dict[sympy.Expr, sympy.Expr | None] = {
    W: sympy.Integer(1),
    W * GATE / 2: GATE / 2,
    GATE * W - W: GATE - 1,
    sympy.Piecewise((W, J < I), (sympy.Integer(0), True)): sympy.Piecewise((1, J < I), (0, True)),
    W**2: None,
    W + GATE: None,
    GATE * (W - 1): None,
    sympy.Max(W, GATE): None,
}


@pytest.mark.parametrize("weight", CASES)
def test_a_factor_of_the_weight(weight: sympy.Expr) -> None:
    assert weight_factor(weight) == CASES[weight]


def test_pairs_that_are_hidden_are_visited_where_they_weigh_something() -> None:
    causal = forms.causal()
    assert split_visits(replace(causal, weight=W**2 * GATE)) == (causal.mask, sympy.true)
    assert split_visits(replace(causal, weight=W + GATE)) == (sympy.true, causal.mask)
    assert vanishes(sympy.log(1 + W) * GATE)
    assert not vanishes(sympy.exp(W))


def test_an_index_is_no_part_of_a_derivative() -> None:
    table = read("table", H, sympy.Max(I - J, 0), sympy.floor(J / 2))
    assert derivative(QK * table + table**2, table) == QK + 2 * table
    assert derivative(QK * table, QK) == table
    assert derivative(sympy.Abs(table), table).xreplace({table: sympy.Integer(-3)}) == -1
    with pytest.raises(RewriteError, match="floor"):
        derivative(sympy.floor(table), table)
