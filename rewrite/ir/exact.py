"""Comparisons of positions without fractions.

sympy takes ``floor((j - 1) / 14) >= n`` to ``j/14 - 1/14 >= n``, which is the same in exact arithmetic and not in floating point:
at j = 43 the left side misses 3 by a rounding. Multiplied out, every comparison of positions is one of integers.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import sympy


def _denominator(expression: sympy.Basic) -> int:
    """The common denominator of a sum of products with rational coefficients, whatever stands inside functions left aside."""
    terms = sympy.Add.make_args(expression)
    return int(sympy.ilcm(1, *(sympy.Rational(term.as_coeff_Mul()[0]).q for term in terms)))


@lru_cache(maxsize=1024)
def without_fractions(expression: Any) -> Any:
    """The same predicate with every comparison of integer positions multiplied out to integers; anything else is left as it is."""
    if isinstance(expression, sympy.Rel):
        left, right = expression.args
        coefficients = [term.as_coeff_Mul() for side in (left, right) for term in sympy.Add.make_args(side)]
        # A Float is inexact to begin with, and a symbol that is no integer has no exact form.
        if all(number.is_Rational and (rest.is_integer or rest == 1) for number, rest in coefficients):
            common = int(sympy.ilcm(_denominator(left), _denominator(right)))
            return expression if common == 1 else expression.func(sympy.expand(common * left), sympy.expand(common * right))
        return expression
    if isinstance(expression, sympy.And | sympy.Or | sympy.Not | sympy.ITE):
        return expression.func(*(without_fractions(argument) for argument in expression.args))
    return expression
