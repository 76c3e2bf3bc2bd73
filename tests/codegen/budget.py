"""How far a result may be from the float64 reference: bounds from the data and the arithmetic, not chosen by hand.

With u the unit roundoff: a score, a sum of D products and a few terms in float32, is off by at most (D + 8) u32 * (sum of magnitudes);
a softmax weight is off by twice that, relatively (`weight_error` has the others), and by u of the dtype where it is rounded for the
second matrix product; the output is rounded once more. All of it is carried by  sum_j |weight_ij| |v_j|.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch

from codegen.tensor_reads import derivative
from codegen.weight_form import weight_factor
from rewrite.ir import QK, TOTAL, Attend
from rewrite.ir.semantics import all_positions, attend, attention_weights, evaluate_expression, mix_heads, read_at

# A group weight such as 1 + 0.4 (m2 + m3) / m1 has a few masses in it, each off as a softmax weight is.
OPERATIONS_OF_A_GROUP_WEIGHT = 8


def in_double(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.double() if value.is_floating_point() else value for name, value in values.items()}


def expected(operation: Attend, values: dict[str, torch.Tensor]) -> torch.Tensor:
    return attend(operation, in_double(values))


def environment(operation: Attend, values: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What the operation's expressions read, in float64, every pair of query and key at once."""
    doubled = in_double(values)
    query, key = doubled["query"], doubled["key"]
    dot = query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).transpose(-2, -1)
    known: dict[str, Any] = {**all_positions(dot.shape, dot.device), "qk": dot}
    mixing = {name for mix in operation.mixes for name in (mix.matrix, mix.bias)}
    tensors = {name: read_at(doubled[name], indices, known) for name, indices in operation.tensors().items() if name not in mixing}
    return {**known, **tensors}


def scores(operation: Attend, values: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(scores [B, H, Nq, Nk] after their heads were mixed, which pairs are seen, the sink's logits [B, H, Nq, 1] or None), in float64."""
    known = environment(operation, values)
    dot = known["qk"]
    score = torch.as_tensor(evaluate_expression(operation.score, known)).expand_as(dot)
    seen = torch.as_tensor(evaluate_expression(operation.mask, known)).expand_as(dot)
    sink = None if operation.sink is None else torch.as_tensor(evaluate_expression(operation.sink, known), dtype=dot.dtype)
    return mix_heads(operation.score_mix, score, in_double(values)), seen, None if sink is None else sink.expand_as(dot[..., :1])


def expected_lse(operation: Attend, values: dict[str, torch.Tensor]) -> torch.Tensor:
    """[B, H, Nq]: what `codegen.normalise` calls lse."""
    score, seen, sink = scores(operation, values)
    if operation.normaliser == "none":
        return torch.zeros(score.shape[:3], dtype=torch.float64)
    if operation.normaliser == "sum":
        return score.masked_fill(~seen, 0.0).sum(-1).clamp(min=0.0).log()
    lse = score.masked_fill(~seen, -torch.inf).logsumexp(-1)
    return lse if sink is None else torch.logaddexp(lse, sink[..., 0]).masked_fill(lse == -torch.inf, -torch.inf)


def score_error(operation: Attend, values: dict[str, torch.Tensor]) -> float:
    """How far a score may be off in float32."""
    doubled = in_double(values)
    heads = doubled["query"].shape[1] // doubled["key"].shape[1]
    magnitude = doubled["query"].abs() @ doubled["key"].abs().repeat_interleave(heads, 1).transpose(-2, -1)
    bias = sum(float(value.abs().max()) for name, value in doubled.items() if name == "bias")
    terms = doubled["query"].shape[3] + 8
    return terms * torch.finfo(torch.float32).eps * (float(magnitude.max()) + bias + 1.0)


def weight_error(operation: Attend, values: dict[str, torch.Tensor]) -> torch.Tensor:
    """[B, H, Nq, Nk]: how far a weight may be off for scores that are off by `score_error`."""
    weights, error = attention_weights(operation, in_double(values)).abs(), score_error(operation, values)
    if operation.normaliser == "softmax":
        return 2 * (OPERATIONS_OF_A_GROUP_WEIGHT if operation.groups is not None else 1) * error * weights
    known = environment(operation, values)
    factor, slope = weight_factor(operation.weight), derivative(operation.score, QK)
    assert factor is not None
    count = torch.as_tensor(evaluate_expression(factor, known), dtype=torch.float64).abs()
    error *= float(torch.as_tensor(evaluate_expression(slope, known), dtype=torch.float64).abs().max())
    if operation.normaliser == "none":
        return (error * count).expand_as(weights)
    # s_j / sum: both are off, and where the sum is nothing but error, so is the result.
    score, seen, _ = scores(operation, values)
    total = score.masked_fill(~seen, 0.0).sum(-1, keepdim=True)

    def below(expression: sympy.Expr) -> torch.Tensor:
        value = evaluate_expression(expression, {**known, "total": total})
        return torch.as_tensor(value, dtype=torch.float64).abs().expand_as(total)

    divisor, changes = below(operation.denominator), below(derivative(operation.denominator, TOTAL))
    relative = (error * (count + changes * score.shape[-1] * weights) / divisor).expand_as(weights)
    unknown = (divisor <= changes * score.shape[-1] * error) & seen.any(-1, keepdim=True)
    return relative.masked_fill(divisor == 0, 0.0).masked_fill(unknown & (changes > 0), torch.inf)


def output_budget(operation: Attend, values: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """[B, H, Nq, Dv]: the largest error of the output in `dtype`."""
    doubled = in_double(values)
    weights = attention_weights(operation, doubled).abs()
    value = doubled["value"].abs().repeat_interleave(weights.shape[1] // doubled["value"].shape[1], 1)
    numbers = torch.finfo(dtype)
    relative = 3 * numbers.eps + weights.shape[-1] * torch.finfo(torch.float32).eps
    # Weights under the smallest number of the dtype are rounded to multiples of it.
    smallest = numbers.eps * numbers.smallest_normal
    return (relative * weights + weight_error(operation, values)) @ value + smallest * value.sum(2, keepdim=True)
