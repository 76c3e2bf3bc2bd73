"""What the weight expression of an operation does to a weight of zero, and whether it is a factor."""

from __future__ import annotations

from functools import lru_cache

import sympy
from sympy.logic.boolalg import Boolean

from codegen.masks import split_mask
from rewrite.ir.expression import W
from rewrite.ir.operations import Attend


@lru_cache(maxsize=1024)
def weight_factor(weight: sympy.Expr) -> sympy.Expr | None:
    """The factor a of a weight expression  a * w  with an a free of w; None for any other expression."""
    factor = weight.diff(W)
    return None if factor.has(W) or not vanishes(weight) else factor


@lru_cache(maxsize=1024)
def vanishes(weight: sympy.Expr) -> bool:
    """Whether the weight expression is zero at w = 0."""
    return bool(weight.xreplace({W: sympy.Integer(0)}) == 0)


@lru_cache(maxsize=1024)
def split_visits(attend: Attend) -> tuple[Boolean, Boolean]:
    """(static, dynamic): pairs that `static` hides need no visit, those that `dynamic` hides are found where they are visited.

    Where the weight expression makes something of a hidden pair's weight of zero, every pair has to be visited.
    """
    return split_mask(attend.mask) if vanishes(attend.weight) else (sympy.true, attend.mask)
