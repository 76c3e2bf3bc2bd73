"""Gradients of an attention operation, recomputed a block of queries at a time in O(block x Nk) memory.

With p the final weights and dp[i,j] = dout[i] . v[j], each block gives  dv[j] = sum_i p[i,j] dout[i],  goes back through the steps of
`codegen.attention_block` from dp to dqk, and from there to queries and keys. All derivatives of expressions are taken symbolically, so
that a case that is not chosen never leaks a NaN. Sums run in one fixed order: the result is deterministic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from codegen.attention_block import AttentionBlock
from codegen.score_block import ScoreBlock, dot, sum_over_queries, weighted_sum
from codegen.tensor_reads import TensorGradients, accumulation_dtype
from codegen.torch_streaming import blockwise_visits
from codegen.visits import Visit
from rewrite.ir.operations import Attend


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
    gradients = TensorGradients(attend.tensors(), tensors, wanted)
    for visit in blockwise_visits(attend, query, key):
        rows, keys, values = visit.queries(query, 2).to(dtype), visit.keys(key, 2).to(dtype), visit.keys(value, 2).to(dtype)
        d_rows, d_lse = visit.queries(grad_out, 2).to(dtype), visit.queries(grad_lse, 2)[..., None].to(dtype)
        block = ScoreBlock(attend, query, key, tensors, visit)
        block.read_dot(rows, keys)
        attention = AttentionBlock(block, tensors)
        _add_columns(d_value, sum_over_queries(attention.weights, d_rows, value.shape[1]), visit)
        d_dot = attention.dot_gradient(dot(d_rows, values), d_lse, gradients)
        d_query[:, :, visit.rows] = weighted_sum(d_dot, keys)
        _add_columns(d_key, sum_over_queries(d_dot, rows, key.shape[1]), visit)
    whole = ((d_query, query), (d_key, key), (d_value, value))
    return [*(total.to(operand.dtype) for total, operand in whole), *(gradient.result() for gradient in gradients)]
