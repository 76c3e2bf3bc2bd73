"""What each query gives: sums over keys of a term in its weights, by the streaming kernel without values.

With lse_i the log-sum-exp of query i, kept from the attention itself, the weight of a pair is an expression in its score, and so is a term

    r_i = sum_j s'_ij,    s'_ij = term(weight(exp(s_ij - lse_i)))

which is what the kernel of an attention without a normaliser sums beside its values: here nothing but that sum is kept, in float32. Masks,
block lists, GQA, biases and the split walk of decoding are those of any attention, memory is O(N), and no kernel had to be written for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache

import sympy
import torch

from codegen.kernel import has_triton_form, kernel_for
from codegen.received_kernel import LSE
from codegen.weight_form import vanishes
from rewrite.ir.expression import NQ, I, W, tensor
from rewrite.ir.operations import Attend
from rewrite.ir.statistic import Statistic

# exp is 0 in float32 from about -104 on. A logarithm of a weight stops here, so that 0 times it is 0 for scores of -inf too.
LEAST_LOG = sympy.Integer(-200)


def reason_against_sums(statistic: Statistic) -> str | None:
    """Why a statistic over keys has no kernel, in words, or None."""
    attend = statistic.attend
    if attend.mixes or attend.groups is not None or attend.renormalised or attend.normaliser != "softmax":
        return "its weights are not expressions in a score and the log-sum-exp of its row"
    if attend.mask != sympy.true and not vanishes(_term(statistic).xreplace({_WEIGHT: W})):
        return f"its term {statistic.term} counts pairs that the mask hides"
    return has_triton_form(softmax_of(statistic), values=False) or has_triton_form(summed(statistic), values=False)


# Stands for the softmax's weight in a term, behind which nothing is simplified before it is known to be an exponential.
_WEIGHT = sympy.Dummy("weight", real=True)


def _term(statistic: Statistic) -> sympy.Expr:
    return sympy.sympify(statistic.term).xreplace({W: sympy.sympify(statistic.attend.weight).xreplace({W: _WEIGHT})})


@lru_cache(maxsize=1024)
def softmax_of(statistic: Statistic) -> Attend:
    """The attention whose log-sum-exp the statistic reads; rows that it does not read see no key."""
    attend = statistic.attend
    if statistic.rows is None:
        mask = attend.mask
    else:
        first, stop = (None if at is None else at if at >= 0 else NQ + at for at in statistic.rows)
        mask = sympy.And(attend.mask, sympy.Ge(I, first), sympy.true if stop is None else sympy.Lt(I, stop))
    return replace(attend, mask=mask, weight=W, choice=None)


@lru_cache(maxsize=1024)
def summed(statistic: Statistic) -> Attend:
    """The attention without a normaliser whose rows of scores are summed: s' of the module's docstring."""
    weight = sympy.exp(sympy.Max(sympy.sympify(statistic.attend.score) - tensor(LSE, "bhi"), LEAST_LOG))
    return replace(softmax_of(statistic), score=_term(statistic).xreplace({_WEIGHT: weight}), normaliser="none", sink=None)


def row_sums(attend: Attend, query: torch.Tensor, key: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """[B, H, Nq] float32: the log-sum-exp of an attention, or the sums of its scores where it has no softmax."""
    sums = query.new_empty(query.shape[:3], dtype=torch.float32)
    operands = [operand if operand.stride(-1) == 1 else operand.contiguous() for operand in (query, key)]
    kernel_for(attend.to_json(), values=False).load().launch(*operands, [tensors[name] for name in attend.tensors()], sums)
    return sums


def given(
    statistic: Statistic, query: torch.Tensor, key: torch.Tensor, tensors: Mapping[str, torch.Tensor], lse: torch.Tensor | None
) -> torch.Tensor:
    """[B, H, rows] float32, of a statistic that `reason_against_sums` has nothing against; lse [B, H, Nq]: the attention's own, or None."""
    total = row_sums(softmax_of(statistic), query, key, tensors) if lse is None else lse
    # A query that sees no key gives nothing.
    own = {LSE: total.masked_fill(total == -torch.inf, torch.inf)}
    start, stop = statistic.rows or (0, None)
    return row_sums(summed(statistic), query, key, {**tensors, **own})[:, :, start:stop]
