"""Gradients of an attention operation, recomputed a block of queries at a time in O(block x Nk) memory.

With p the final weights and dp[i,j] = dout[i] . v[j], each block gives  dv[j] = sum_i p[i,j] dout[i],  goes back through the steps of
`codegen.attention_block` from dp to dqk, and from there to queries and keys. All derivatives of expressions are taken symbolically, so
that a case that is not chosen never leaks a NaN. Sums run in one fixed order: the result is deterministic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from codegen.attention_block import AttentionBlock
from codegen.gathered import Gathered, gathered
from codegen.score_block import ScoreBlock, dot, sum_over_queries, weighted_sum
from codegen.state_call import through_state
from codegen.tensor_reads import TensorGradients, accumulation_dtype
from codegen.torch_state_backward import state_gradients
from codegen.torch_streaming import blockwise_visits
from codegen.visits import Visit
from rewrite.ir.operations import Attend


def _add_columns(total: torch.Tensor, part: torch.Tensor, visit: Visit) -> None:
    """total[:, :, columns] += part of the visited planes; the columns of a visit are distinct, so that the order of the sum is fixed."""
    total[visit.of_keys] += part


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
    gradients, by_state = TensorGradients(attend.tensors(), tensors, wanted), through_state(attend, operands, tensors)
    if by_state is not None:
        found = state_gradients(by_state, received, gradients)
        return [*found, *(gradient.result() for gradient in gradients)]
    chosen = gathered(attend, query, key, tensors)
    if chosen is None:
        d_query, d_key, d_value = (torch.zeros(t.shape, dtype=dtype, device=t.device) for t in (query, key, value))
    else:
        d_query, d_key, d_value = _gathered_gradients(attend, chosen, received, operands, tensors, gradients)
    for visit in blockwise_visits(attend, query, key, tensors) if chosen is None else chosen.plan.everywhere:
        rows, keys, values = visit.queries(query, 2).to(dtype), visit.keys(key, 2).to(dtype), visit.keys(value, 2).to(dtype)
        d_rows, d_lse = visit.queries(grad_out, 2).to(dtype), visit.queries(grad_lse, 2)[..., None].to(dtype)
        block = ScoreBlock(attend, query, key, tensors, visit)
        block.read_dot(rows, keys)
        attention = AttentionBlock(block, tensors)
        _add_columns(d_value, sum_over_queries(attention.weights, d_rows, values.shape[1]), visit)
        d_dot = attention.dot_gradient(dot(d_rows, values), d_lse, gradients)
        d_query[visit.of_queries] = weighted_sum(d_dot, keys)
        _add_columns(d_key, sum_over_queries(d_dot, rows, keys.shape[1]), visit)
    whole = ((d_query, query), (d_key, key), (d_value, value))
    return [*(total.to(operand.dtype) for total, operand in whole), *(gradient.result() for gradient in gradients)]


def _add_entries(total: torch.Tensor, entries: torch.Tensor, part: torch.Tensor) -> None:
    """total[entries] += part, for total [n, H, D], entries [P, m] and part [P, H, m, D]; each adds up in a fixed order on its device."""
    terms = part.transpose(1, 2).flatten(0, 1)
    if total.device.type == "cpu":
        total.index_add_(0, entries.flatten(), terms)
    else:
        total.index_put_((entries.flatten(),), terms, accumulate=True)


def _gathered_gradients(
    attend: Attend,
    chosen: Gathered,
    received: tuple[torch.Tensor, torch.Tensor],
    operands: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    tensors: Mapping[str, torch.Tensor],
    gradients: TensorGradients,
) -> list[torch.Tensor]:
    """What the small attentions give the gradients of query, key and value, in the accumulation dtype; the tensors' are added."""
    dtype = accumulation_dtype(operands[0].dtype)
    queries, keys, values = (chosen.rows_of(operand) for operand in operands)
    grad_out, grad_lse = chosen.rows_of(received[0]), chosen.rows_of(received[1][..., None])
    d_queries, d_keys, d_values = (torch.zeros(t.shape, dtype=dtype, device=t.device) for t in (queries, keys, values))
    for visit in chosen.visits():
        taken = (visit.queries(queries), visit.queries(grad_out), visit.keys(keys), visit.keys(values))
        # Most are multiplied twice, and each product would copy what is not contiguous.
        rows, d_rows, own_keys, own_values = (t.to(dtype).contiguous() for t in taken)
        d_lse = visit.queries(grad_lse).to(dtype)
        if visit.row_taken is not None:
            # What only fills up a block has been counted where it belongs.
            d_rows, d_lse = d_rows * visit.row_taken, d_lse * visit.row_taken
        block = ScoreBlock(attend, *operands[:2], tensors, visit)
        block.read_dot(rows, own_keys)
        attention = AttentionBlock(block, tensors)
        _add_entries(d_values, visit.columns, sum_over_queries(attention.weights, d_rows, values.shape[1]))
        d_dot = attention.dot_gradient(dot(d_rows, own_values), d_lse, gradients)
        _add_entries(d_queries, visit.rows, weighted_sum(d_dot, own_keys))
        _add_entries(d_keys, visit.columns, sum_over_queries(d_dot, rows, keys.shape[1]))
    pairs = zip((d_queries, d_keys, d_values), operands, strict=True)
    return [chosen.tensor_of(rows, operand) for rows, operand in pairs]
