"""What an attention multiplies and adds as it is computed, as a closed form in its sizes."""

from __future__ import annotations

from collections.abc import Mapping

import sympy

from codegen.block_choice import visited_pairs
from codegen.contraction_order import QUADRATIC, STATE, Sizes, state_plan
from rewrite.ir.operations import Attend


def multiply_adds_formula(attend: Attend, sizes: Mapping[str, int]) -> tuple[sympy.Expr, dict[str, int]]:
    """(a closed form in B, H, Hkv, Nq, Nk, D, Dv and counts, the counts) for an attention of the sizes that have the former names.

    Through the state where a call of these sizes computes it so (`codegen.contraction_order`). Else pair by pair: those that positions
    alone hide are not computed, and not counted; of blocks that the data choose, as many are counted as may be chosen
    (`codegen.block_choice`).
    """
    plan = state_plan(attend, Sizes.named(sizes))
    if plan is not None:
        return STATE, dict(plan.counts)
    return QUADRATIC, {"pairs": visited_pairs(attend, sizes["Nq"], sizes["Nk"])}


def computed_multiply_adds(attend: Attend, sizes: Mapping[str, int]) -> int:
    """The number that `multiply_adds_formula` comes to. sizes: B, H, Hkv, Nq, Nk, D and Dv."""
    formula, counts = multiply_adds_formula(attend, sizes)
    known = {**sizes, **counts}
    return int(formula.subs({symbol: known[symbol.name] for symbol in formula.free_symbols}))
