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
    """scores [B, H, n, m], sink [B, H, n, 1] or None; values: the block's positions by name."""
    if attend.normaliser == "softmax":
        return _softmax(scores if hidden is None else scores.masked_fill(hidden, -torch.inf), hidden, sink)
    kept = scores if hidden is None else scores.masked_fill(hidden, 0.0)
    if attend.normaliser == "none":
        return Normalised(kept, kept.new_zeros(kept.shape[:3]), hidden)
    total = kept.sum(-1, keepdim=True)
    known = {**values, "total": total}

    def value_of(expression: sympy.Expr) -> torch.Tensor:
        return torch.as_tensor(evaluate_expression(expression, known), dtype=total.dtype, device=total.device).expand_as(total)

    denominator, lse = value_of(attend.denominator), total.clamp(min=0.0).log().squeeze(-1)
    return Normalised(
        divided(kept, denominator), lse, hidden, total=total, denominator=denominator, slope=value_of(derivative(attend.denominator, TOTAL))
    )


def _softmax(scores: torch.Tensor, hidden: torch.Tensor | None, sink: torch.Tensor | None) -> Normalised:
    """A row of -inf gives weights of zero and -inf, whatever its sink."""
    maximum = scores.amax(-1, keepdim=True)
    peak = maximum if sink is None else torch.maximum(maximum, sink)
    peak = peak.masked_fill(peak == -torch.inf, 0.0)
    # exp2 because torch's exp, which asks MKL for every digit on the CPU, takes twice as long or more.
    weights = (scores - peak).mul_(LOG2_E).exp2_()
    total = weights.sum(-1, keepdim=True)
    if sink is not None:
        total += (sink - peak).exp()
    weights /= total.masked_fill(total == 0, 1.0)
    lse = (peak + total.log()).masked_fill(maximum == -torch.inf, -torch.inf)
    return Normalised(weights, lse.squeeze(-1), hidden, sink)


def divided(terms: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """terms / total, zeros where the total is zero."""
    empty = total == 0
    return (terms / total.masked_fill(empty, 1.0)).masked_fill_(empty, 0.0)


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
