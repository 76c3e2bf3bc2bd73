"""Gradients of an attention operation, recomputed a block of queries at a time in O(block x Nk) memory.

With a the softmax weights, w_g the weight of group g, m_g its mass, t[i,j] = dout[i] . v[j], and c_g = sum_{j in g} a[i,j] t[i,j]:

    da[i,j]     = w_g(j) t[i,j] + sum_g c_g dw_g/dm_g(j)
    dscore[i,j] = a[i,j] (da[i,j] - sum_j a[i,j] da[i,j] + dlse[i])
    dv[j]       = sum_i w_g(j) a[i,j] dout[i]
    dqk         = dscore * dscore_expression/dqk,       and likewise for every tensor that the score reads;

a tensor that the weights read gets  sum_g c_g dw_g/dtensor. All derivatives of expressions are taken symbolically, so that a case
that is not chosen never leaks a NaN. Sums run in one fixed order: the result is deterministic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from codegen.group_block import GroupBlock
from codegen.score_block import ScoreBlock, accumulation_dtype, derivative, dot, softmax, sum_over_queries, weighted_sum
from codegen.torch_streaming import blockwise_visits
from codegen.visits import Visit
from rewrite.ir.expression import QK, letters, tensor
from rewrite.ir.operations import Attend
from rewrite.ir.semantics import aligned


class TensorGradient:
    """The gradient of one tensor operand, gathered block by block."""

    def __init__(self, name: str, axes: str, operand: torch.Tensor) -> None:
        self.name, self.symbol, self.operand = name, tensor(name, axes), operand
        self.total = aligned(
            torch.zeros_like(operand, dtype=accumulation_dtype(operand.dtype), memory_format=torch.contiguous_format), axes
        )

    def add(self, part: torch.Tensor, visit: Visit) -> None:
        """Add what one visit gives, [B, H, rows, columns] or, from the group weights, [B, H, rows, 1]."""
        whole = [axis for axis in range(4) if self.total.shape[axis] == 1]
        part = part.sum(whole, keepdim=True) if whole else part
        rows = slice(None) if 2 in whole else visit.rows
        columns = slice(None) if 3 in whole else visit.columns
        if isinstance(rows, torch.Tensor) and isinstance(columns, torch.Tensor):
            rows = rows[:, None]
        self.total[:, :, rows, columns] += part

    def result(self) -> torch.Tensor:
        return self.total.reshape(self.operand.shape).to(self.operand.dtype)


def _add_columns(total: torch.Tensor, part: torch.Tensor, visit: Visit) -> None:
    """total[:, :, columns] += part; the columns of a visit are distinct, so that the order of the sum is fixed."""
    total[:, :, visit.columns] += part


def attend_gradients(
    attend: Attend,
    received: tuple[torch.Tensor, torch.Tensor],
    operands: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    tensors: Mapping[str, torch.Tensor],
    wanted: Sequence[str],
) -> list[torch.Tensor]:
    """Gradients of query, key, value and of the tensors named in `wanted`, in this order, shaped and typed as these are.

    received: the gradients of out [B, H, Nq, Dv] and of lse [B, H, Nq]. operands: query, key, value.
    Raises `RewriteError` where a wanted gradient would have to pass floor or Mod.
    """
    (grad_out, grad_lse), (query, key, value) = received, operands
    dtype = accumulation_dtype(query.dtype)
    d_query, d_key, d_value = (torch.zeros(t.shape, dtype=dtype, device=t.device) for t in (query, key, value))
    axes = attend.tensors()
    gradients = [TensorGradient(name, letters(axes[name]) or "", tensors[name]) for name in wanted]
    for visit in blockwise_visits(attend, query, key):
        rows, keys, values = visit.queries(query, 2).to(dtype), visit.keys(key, 2).to(dtype), visit.keys(value, 2).to(dtype)
        d_rows = visit.queries(grad_out, 2).to(dtype)
        block = ScoreBlock(attend, query, key, tensors, visit)
        block.read_dot(rows, keys)
        attention, _ = softmax(block.scores())
        d_attention = dot(d_rows, values)
        weighted = attention
        if attend.groups is not None:
            groups = GroupBlock(block, attend.groups, attention)
            counted = groups.per_group(attention * d_attention)
            factor = groups.per_key(groups.weights)
            weighted = attention * factor
            d_attention = d_attention * factor + groups.per_key(groups.mass_gradient(counted))
            for gradient in gradients:
                slopes = groups.slopes(gradient.symbol)
                if slopes is not None:
                    gradient.add((slopes * counted).sum(-1, keepdim=True), visit)
        _add_columns(d_value, sum_over_queries(weighted, d_rows, value.shape[1]), visit)
        mean = (attention * d_attention).sum(-1, keepdim=True)
        d_score = attention * (d_attention - mean + visit.queries(grad_lse, 2)[..., None].to(dtype))
        for gradient in gradients:
            slope = derivative(attend.score, gradient.symbol)
            if slope != 0:
                gradient.add(d_score * block.evaluate(slope), visit)
        d_dot = d_score * block.evaluate(derivative(attend.score, QK))
        d_query[:, :, visit.rows] = weighted_sum(d_dot, keys)
        _add_columns(d_key, sum_over_queries(d_dot, rows, key.shape[1]), visit)
    whole = ((d_query, query), (d_key, key), (d_value, value))
    return [*(total.to(operand.dtype) for total, operand in whole), *(gradient.result() for gradient in gradients)]
