"""Scores to weights over the keys of one block of queries, and the gradient of that.

With s the scores, t the logit of a sink, p the weights, c = sum_j p_j dp_j, and D the denominator as a function of S = sum_j s_j:

    softmax   p_j = exp(s_j) / (exp(t) + sum_k exp(s_k))    ds_j = p_j (dp_j - c + dlse)    dt = exp(t - lse) (dlse - c)
    sum       p_j = s_j / D(S)                              ds_j = (dp_j - D'(S) c) / D(S) + dlse / S
    none      p_j = s_j                                     ds_j = dp_j

lse is what is saved beside the output: the logarithm of the softmax's denominator, -inf for a query that sees no key; of the scores' sum,
-inf where that is not positive; and 0 where nothing is normalised.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from codegen.base_two import LOG2_E
from codegen.tensor_reads import derivative
from rewrite.ir.expression import TOTAL
from rewrite.ir.operations import Attend
from rewrite.ir.semantics import evaluate_expression


@dataclass(frozen=True)
class Normalised:
    """weights [B, H, n, m], lse [B, H, n]; hidden: True where a key is hidden (broadcasts), or None; sink [B, H, n, 1] or None.

    Of "sum": total, denominator and its slope by total, [B, H, n, 1] each.
    """

    weights: torch.Tensor
    lse: torch.Tensor
    hidden: torch.Tensor | None
    sink: torch.Tensor | None = None
    total: torch.Tensor | None = None
    denominator: torch.Tensor | None = None
    slope: torch.Tensor | None = None


def normalise(
    attend: Attend, scores: torch.Tensor, hidden: torch.Tensor | None, sink: torch.Tensor | None, values: Mapping[str, Any]
) -> Normalised:
    """scores [B, H, n, m], which become the weights, with `hidden_score` where a key is hidden; sink [B, H, n, 1] or None.

    values: the block's positions by name.
    """
    if attend.normaliser == "softmax":
        return _softmax(scores, hidden, sink)
    if attend.normaliser == "none":
        return Normalised(scores, scores.new_zeros(scores.shape[:3]), hidden)
    total = scores.sum(-1, keepdim=True)
    known = {**values, "total": total}

    def value_of(expression: sympy.Expr) -> torch.Tensor:
        return torch.as_tensor(evaluate_expression(expression, known), dtype=total.dtype, device=total.device).expand_as(total)

    denominator, lse = value_of(attend.denominator), total.clamp(min=0.0).log().squeeze(-1)
    slope = value_of(derivative(attend.denominator, TOTAL))
    return Normalised(scores.div_(_divisor(denominator)), lse, hidden, total=total, denominator=denominator, slope=slope)


def hidden_score(attend: Attend) -> float:
    """The score with which a key weighs nothing."""
    return -torch.inf if attend.normaliser == "softmax" else 0.0


def _softmax(scores: torch.Tensor, hidden: torch.Tensor | None, sink: torch.Tensor | None) -> Normalised:
    """A row of -inf gives weights of zero and -inf, whatever its sink."""
    maximum = scores.amax(-1, keepdim=True)
    peak = maximum if sink is None else torch.maximum(maximum, sink)
    peak = peak.masked_fill(peak == -torch.inf, 0.0)
    # exp2 because torch's exp, which asks MKL for every digit on the CPU, takes twice as long or more.
    weights = scores.sub_(peak).mul_(LOG2_E).exp2_()
    total = weights.sum(-1, keepdim=True)
    if sink is not None:
        total += (sink - peak).exp()
    weights /= total.masked_fill(total == 0, 1.0)
    lse = (peak + total.log()).masked_fill(maximum == -torch.inf, -torch.inf)
    return Normalised(weights, lse.squeeze(-1), hidden, sink)


def divided(terms: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """terms / total, zeros where the total is zero."""
    return terms / _divisor(total)


def _divisor(total: torch.Tensor) -> torch.Tensor:
    """What is divided by: nothing is left of a number over infinity."""
    return total.masked_fill(total == 0, torch.inf)


def normalise_gradients(
    attend: Attend, found: Normalised, d_weights: torch.Tensor, d_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(gradient of the scores [B, H, n, m], of the sink [B, H, n, 1] or None), from those of the weights and of lse [B, H, n, 1]."""
    if attend.normaliser == "softmax":
        mean = (found.weights * d_weights).sum(-1, keepdim=True)
        d_scores = found.weights * (d_weights - mean + d_lse)
        if found.sink is None:
            return d_scores, None
        lse = found.lse[..., None]
        share = (found.sink - lse).exp().masked_fill(lse == -torch.inf, 0.0)
        return d_scores, share * (d_lse - mean)
    d_scores = d_weights
    if found.total is not None and found.denominator is not None and found.slope is not None:
        mean = (found.weights * d_weights).sum(-1, keepdim=True)
        d_scores = divided(d_weights - found.slope * mean, found.denominator) + divided(d_lse, found.total.clamp(min=0.0))
    return d_scores if found.hidden is None else d_scores.masked_fill(found.hidden, 0.0), None
