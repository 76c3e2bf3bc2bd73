"""An attention operation in torch operators, a block of queries at a time: never the Nq x Nk map.

Plain softmax attention with a bias, a mask or a sink goes to torch's fused attention, on all queries at once or, with a static mask, on
each block of queries with the keys it sees. Everything else is matrix products, block by block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache

import sympy
import torch
from torch.nn import functional

from codegen.attention_block import AttentionBlock
from codegen.masks import split_mask, static_key
from codegen.score_block import ScoreBlock, linear_score, weighted_sum
from codegen.tensor_reads import accumulation_dtype
from codegen.visits import Plan, Visit, best_plan, visits
from codegen.weight_form import split_visits
from rewrite.ir.expression import letters
from rewrite.ir.operations import Attend

# Scores held at a time, 16 MiB in float32: about what two cores have as last-level cache.
SCORES_AT_A_TIME = 1 << 22
# Queries at a time where torch's fused attention needs a bias that has to be computed: its calls no longer count from there.
FUSED_ROWS = 512


def rows_at_a_time(query: torch.Tensor, key: torch.Tensor) -> int:
    """Queries per block for `SCORES_AT_A_TIME`: a power of two, so that neighbouring sizes share their plans, and from 16 to 256."""
    per_row = max(1, query.shape[0] * query.shape[1] * key.shape[2])
    fitting = max(1, SCORES_AT_A_TIME // per_row)
    return min(256, max(16, 1 << (fitting.bit_length() - 1)))


def blockwise_visits(attend: Attend, query: torch.Tensor, key: torch.Tensor) -> tuple[Visit, ...]:
    """The visits of what is computed as matrix products: the plan that suits the mask, in blocks of `rows_at_a_time` at most."""
    static, n_queries, n_keys, most = static_key(split_visits(attend)[0]), query.shape[2], key.shape[2], rows_at_a_time(query, key)
    plan = best_plan(static, n_queries, n_keys)
    return visits(static, n_queries, n_keys, plan._replace(block=min(plan.block, most)), query.device)


def output_like(query: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Uninitialised (out [B, H, Nq, Dv], lse [B, H, Nq] float32); out lies as [B, Nq, H, Dv], as models read it next."""
    batch, heads, n_queries, _ = query.shape
    out = query.new_empty(batch, n_queries, heads, value.shape[3]).transpose(1, 2)
    return out, query.new_empty(batch, heads, n_queries, dtype=torch.float32)


@lru_cache(maxsize=1024)
def _fused_score(attend: Attend) -> tuple[float, sympy.Expr] | None:
    """What `linear_score` says, where torch's fused attention computes the operation; else None."""
    return linear_score(attend.score) if replace(attend, sink=None).is_plain else None


def attend_forward(
    attend: Attend, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tensors: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [B, H, Nq, Dv] in the query's dtype, lse [B, H, Nq] float32), the definition of out being `rewrite.ir.semantics.attend`.

    lse, of the scores that a query sees: the logarithm of the softmax's denominator, the sink's part included, -inf for a query that sees
    no key; of the scores' sum for "sum", -inf where that is not positive; 0 for "none".
    """
    linear = _fused_score(attend)
    if linear is not None and query.device.type == "cpu":
        return _fused(attend, linear, (query, key, value), tensors)
    out, lse = output_like(query, value)
    out.zero_()
    lse.fill_(-torch.inf if attend.normaliser != "none" else 0.0)
    dtype = accumulation_dtype(query.dtype)
    for visit in blockwise_visits(attend, query, key):
        block = ScoreBlock(attend, query, key, tensors, visit)
        block.read_dot(visit.queries(query, 2).to(dtype), visit.keys(key, 2).to(dtype))
        attention = AttentionBlock(block, tensors)
        out[:, :, visit.rows] = weighted_sum(attention.weights, visit.keys(value, 2).to(dtype)).to(out.dtype)
        lse[:, :, visit.rows] = attention.lse.to(lse.dtype)
    return out, lse


def _fused_visits(attend: Attend, rest: sympy.Expr, n_queries: int, n_keys: int, device: torch.device) -> tuple[Visit, ...]:
    """All at once where torch takes the bias as it is; blocks where the mask leaves keys out or a bias has to be made."""
    static, dynamic = split_mask(attend.mask)
    key = static_key(attend.mask)
    if static != sympy.true:
        return visits(key, n_queries, n_keys, best_plan(key, n_queries, n_keys), device)
    ready = dynamic == sympy.true and (rest == 0 or (isinstance(rest, sympy.Indexed) and letters(rest.indices) is not None))
    return visits(key, n_queries, n_keys, Plan(max(1, n_queries) if ready else FUSED_ROWS), device)


def _bias(block: ScoreBlock, rest: sympy.Expr, dtype: torch.dtype) -> torch.Tensor | None:
    """What is added to the scaled dot product, [1 or B, 1 or H, rows, columns]; None for nothing."""
    size = (block.values["i"].shape[2], block.values["j"].shape[3])
    bias = None
    if rest != 0:
        bias = torch.as_tensor(block.evaluate(rest), dtype=dtype, device=block.values["i"].device)
        bias = bias.view((1,) * (4 - bias.dim()) + bias.shape)
        bias = bias.expand(*bias.shape[:2], *size)
    hidden = block.hidden()
    if hidden is None:
        return bias
    hidden = hidden.view((1,) * (4 - hidden.dim()) + hidden.shape)
    if bias is None:
        return torch.zeros(*hidden.shape[:2], *size, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)
    return bias.masked_fill(hidden, -torch.inf)


def _every_head(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """[B, Hkv, n, D] -> [B, H, n, D], each key head repeated for the query heads that share it."""
    batch, key_heads, n, width = tensor.shape
    shared = tensor[:, :, None].expand(batch, key_heads, heads // key_heads, n, width)
    return tensor if key_heads == heads else shared.reshape(batch, heads, n, width)


def _fused(
    attend: Attend,
    linear: tuple[float, sympy.Expr],
    operands: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    tensors: Mapping[str, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale * qk + rest) by torch's fused CPU attention, which gives the log-sum-exp too."""
    (scale, rest), (query, key, value) = linear, operands
    n_queries, n_keys, width = query.shape[2], key.shape[2], value.shape[3]
    # The fused operator takes one head dim for all three; zeros change neither a dot product nor the columns that are kept.
    widest = max(query.shape[3], width)
    query, key, value = (functional.pad(t, (0, widest - t.shape[3])) if t.shape[3] < widest else t for t in (query, key, value))
    out, lse = output_like(query, value[..., :width])
    planned = _fused_visits(attend, rest, n_queries, n_keys, query.device)
    if sum(visit.n_queries for visit in planned) < n_queries:
        out.zero_()
        lse.fill_(-torch.inf)
    for visit in planned:
        block = ScoreBlock(attend, query, key, tensors, visit)
        bias = _bias(block, rest, query.dtype)
        part, total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            visit.queries(query, 2),
            _every_head(visit.keys(key, 2), query.shape[1]),
            _every_head(visit.keys(value, 2), query.shape[1]),
            attn_mask=bias,
            scale=scale,
        )
        part = part[..., :width]
        # Rows that see no key come back with whatever log-sum-exp the operator likes; only then is the bias looked through.
        if bias is not None and bool(((total == 0) | ~total.isfinite()).any()):
            empty = bias.amax(-1) == -torch.inf
            part, total = part.masked_fill(empty[..., None], 0.0), total.masked_fill(empty, -torch.inf)
        if attend.sink is not None:
            part, total = _with_sink(part, total, block.filled(attend.sink, total[..., None])[..., 0])
        out[:, :, visit.rows] = part
        lse[:, :, visit.rows] = total
    return out, lse


def _with_sink(out: torch.Tensor, lse: torch.Tensor, sink: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A softmax without a sink, as the one with: out [B, H, n, Dv] shrinks by what the logit sink [B, H, n] adds to the normaliser."""
    total = torch.logaddexp(lse, sink).masked_fill(lse == -torch.inf, -torch.inf)
    share = (lse - total).exp().masked_fill(lse == -torch.inf, 0.0)
    return (out * share[..., None]).to(out.dtype), total
