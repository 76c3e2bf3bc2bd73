"""An attention operation in torch operators, a block of queries at a time: never the Nq x Nk map.

Plain softmax attention with a bias, a mask or a sink goes to torch's fused attention, on all queries at once or, with a static mask, on
each block of queries with the keys it sees. Linear attention of many tokens goes through its state (`codegen.torch_state`). Everything
else is matrix products, block by block. Where a mask chooses blocks of keys from the data, these are gathered first (`codegen.gathered`),
and both ways work on what was gathered; where it reads the data otherwise, keys that no query of a block may see are left out
(`codegen.narrowed_visits`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import sympy
import torch
from torch.nn import functional

from codegen.attention_block import AttentionBlock
from codegen.contraction_order import Sizes
from codegen.fused_block import fused_attention, fused_block
from codegen.gathered import Gathered, gathered
from codegen.masks import is_lower_triangle, split_mask, static_key
from codegen.narrowed_visits import seen_keys
from codegen.score_block import ScoreBlock, linear_score, weighted_sum
from codegen.state_call import through_state
from codegen.tensor_reads import accumulation_dtype
from codegen.torch_state import state_forward
from codegen.visits import CANDIDATES, Plan, Planes, Visit, best_plan, visits
from codegen.weight_form import split_visits
from rewrite.ir.expression import I, letters
from rewrite.ir.operations import Attend
from rewrite.ir.semantics import aligned


class Held(NamedTuple):
    """How much of its maps a call computes at a time.

    scores: numbers, of all maps together. queries: of each map, about. maps: at least, where there are as many and 16 queries fit.
    """

    scores: int
    queries: int
    maps: int


# Scores of 2 MiB in float32: with what is made of them they stay in the caches of two cores.
HELD = Held(1 << 19, 256, 1)
# Queries at a time where torch's fused attention needs a bias that has to be computed: its calls no longer count from there.
FUSED_ROWS = 512


def rows_at_a_time(attend: Attend, sizes: Sizes, held: Held) -> int:
    """Queries per block: a power of two, so that neighbouring sizes share their plans, and from 16 on."""
    maps = max(_together(attend, sizes), min(held.maps, sizes.batch * sizes.heads))
    fitting = max(1, held.scores // max(1, maps * sizes.n_keys))
    return min(held.queries, max(16, 1 << (fitting.bit_length() - 1)))


def query_visits(
    attend: Attend, query: torch.Tensor, key: torch.Tensor, tensors: Mapping[str, torch.Tensor], held: Held
) -> tuple[Visit, ...]:
    """What is computed as matrix products, of every map alike: the plan that suits the mask, in blocks of `rows_at_a_time` at most."""
    sizes, seen = Sizes.of(query, key, key), seen_keys(attend, query, key, tensors)
    if seen is None:
        return static_visits(attend, sizes, query.device, held)
    most = rows_at_a_time(attend, sizes, held)
    candidates = [block for block in CANDIDATES if block <= most] or [most]
    return seen.visits(static_key(split_visits(attend)[0]), (sizes.n_queries, sizes.n_keys), candidates)


def static_visits(attend: Attend, sizes: Sizes, device: torch.device, held: Held) -> tuple[Visit, ...]:
    """`query_visits` by what of the mask reads no tensor."""
    static, most = static_key(split_visits(attend)[0]), rows_at_a_time(attend, sizes, held)
    plan = best_plan(static, sizes.n_queries, sizes.n_keys)
    block = min(plan.block, most)
    if static == "true":
        # No small block is left over at the end.
        block = max(1, -(-sizes.n_queries // max(1, sizes.n_queries // block)))
    return visits(static, sizes.n_queries, sizes.n_keys, plan._replace(block=block), device)


def planes_at_a_time(found: Sequence[Visit], attend: Attend, sizes: Sizes, held: Held) -> Iterator[Planes]:
    """All maps of a call, as many at a time as may be held for these visits."""
    batch, heads, together, shared = sizes.batch, sizes.heads, _together(attend, sizes), sizes.heads // sizes.key_heads
    fitting = held.scores // max((visit.n_queries * visit.n_keys for visit in found), default=1)
    n_heads, n_rows = min(heads, max(together, fitting // together * together)), max(1, fitting // heads)
    for row in range(0, batch, n_rows):
        for head in range(0, heads, n_heads):
            stop = min(head + n_heads, heads)
            yield Planes(slice(row, min(row + n_rows, batch)), slice(head, stop), slice(head // shared, stop // shared))


def _together(attend: Attend, sizes: Sizes) -> int:
    """How many neighbouring heads are computed at once: those that share keys, or all that are mixed."""
    return sizes.heads if attend.mixes else sizes.heads // sizes.key_heads


def blockwise_visits(attend: Attend, query: torch.Tensor, key: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> Iterator[Visit]:
    """All of `query_visits` for every map of `planes_at_a_time`, one after the other so that keys stay in cache."""
    found = query_visits(attend, query, key, tensors, HELD)
    for planes in planes_at_a_time(found, attend, Sizes.of(query, key, key), HELD):
        for visit in found:
            yield visit._replace(planes=planes)


def output_like(query: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Uninitialised (out [B, H, Nq, Dv], lse [B, H, Nq] float32); out lies as [B, Nq, H, Dv], as models read it next."""
    batch, heads, n_queries, _ = query.shape
    out = query.new_empty(batch, n_queries, heads, value.shape[3]).transpose(1, 2)
    return out, query.new_empty(batch, heads, n_queries, dtype=torch.float32)


def laid_out(out: torch.Tensor) -> torch.Tensor:
    """out [B, H, Nq, Dv] as `output_like` would have it."""
    return out.transpose(1, 2).contiguous().transpose(1, 2)


@lru_cache(maxsize=1024)
def fused_score(attend: Attend) -> tuple[float, sympy.Expr] | None:
    """What `linear_score` says, where torch's fused attention computes the operation; else None."""
    return linear_score(attend.score) if replace(attend, sink=None).is_plain else None


class WholeCall(NamedTuple):
    """softmax(scale * qk + bias) of all queries and keys, as torch computes it in one call; bias: the name and the axes of an operand."""

    scale: float
    causal: bool
    bias: tuple[str, str] | None


@lru_cache(maxsize=1024)
def _whole_call(attend: Attend, sizes: Sizes, device: torch.device) -> WholeCall | None:
    """The one call that computes an operation; None where there is none.

    Known once for all calls of these sizes: asking takes a twentieth of an attention of 200 tokens.
    """
    linear, (static, dynamic) = fused_score(attend), split_mask(attend.mask)
    alike = sizes.heads == sizes.key_heads and sizes.head_dim == sizes.value_dim and sizes.n_queries and sizes.n_keys
    if linear is None or attend.sink is not None or dynamic != sympy.true or not alike or device.type != "cpu":
        return None
    causal = static != sympy.true
    if causal and not is_lower_triangle(static_key(attend.mask), sizes.n_queries, sizes.n_keys):
        return None
    scale, rest = linear
    if rest == 0:
        return WholeCall(scale, causal, None)
    axes = letters(rest.indices) if isinstance(rest, sympy.Indexed) else None
    return None if axes is None or (causal and "i" in axes) else WholeCall(scale, causal, (str(rest.base.label), axes))


def attend_forward(
    attend: Attend, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tensors: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [B, H, Nq, Dv] in the query's dtype, lse [B, H, Nq] float32), the definition of out being `rewrite.ir.semantics.attend`.

    lse, of the scores that a query sees: the logarithm of the softmax's denominator, the sink's part included, -inf for a query that sees
    no key; of the scores' sum for "sum", -inf where that is not positive; 0 for "none".
    """
    whole = _whole_call(attend, Sizes.of(query, key, value), query.device)
    if whole is not None:
        bias = None if whole.bias is None else aligned(tensors[whole.bias[0]], whole.bias[1]).to(query.dtype)
        out, lse = fused_attention((query, key, value), bias, whole.causal, whole.scale)
        return laid_out(out), lse.to(torch.float32).contiguous()
    by_state = through_state(attend, (query, key, value), tensors)
    if by_state is not None:
        out, lse = output_like(query, value)
        for reads, plan in by_state:
            state_forward(reads, plan, (out, lse))
        return out, lse
    linear, chosen = fused_score(attend), gathered(attend, query, key, tensors)
    if linear is not None and query.device.type == "cpu":
        return _fused(attend, linear, (query, key, value), tensors, chosen)
    out, lse = output_like(query, value)
    if chosen is None:
        out.zero_()
        lse.fill_(-torch.inf if attend.normaliser != "none" else 0.0)
    else:
        _attend_gathered(attend, None, chosen, (query, key, value), tensors, (out, lse))
    dtype = accumulation_dtype(query.dtype)
    for visit in blockwise_visits(attend, query, key, tensors) if chosen is None else chosen.plan.everywhere:
        block = ScoreBlock(attend, query, key, tensors, visit)
        block.read_dot(visit.queries(query, 2).to(dtype), visit.keys(key, 2).to(dtype))
        attention = AttentionBlock(block, tensors)
        out[visit.of_queries] = weighted_sum(attention.weights, visit.keys(value, 2).to(dtype)).to(out.dtype)
        lse[visit.of_queries] = attention.lse.to(lse.dtype)
    return out, lse


@lru_cache(maxsize=256)
def fused_visits(attend: Attend, rest: sympy.Expr, n_queries: int, n_keys: int, device: torch.device) -> tuple[Visit, ...]:
    """All at once where torch takes mask and bias as they are; blocks where the mask leaves keys out or a bias has to be made."""
    dynamic, key = split_mask(attend.mask)[1], static_key(attend.mask)
    # What is added to every query's scores alike is a row, which torch spreads by itself.
    one_row = I not in rest.free_symbols | dynamic.free_symbols
    if one_row and is_lower_triangle(key, n_queries, n_keys):
        return (Visit(slice(0, n_queries), slice(0, n_keys), None, causal=True),)
    if key != "true":
        return visits(key, n_queries, n_keys, best_plan(key, n_queries, n_keys), device)
    ready = one_row or (dynamic == sympy.true and isinstance(rest, sympy.Indexed) and letters(rest.indices) is not None)
    return visits(key, n_queries, n_keys, Plan(max(1, n_queries) if ready else FUSED_ROWS), device)


def _fused(
    attend: Attend,
    linear: tuple[float, sympy.Expr],
    operands: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    tensors: Mapping[str, torch.Tensor],
    chosen: Gathered | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale * qk + rest) by torch's fused CPU attention, which gives the log-sum-exp too."""
    (scale, rest), (query, key, value) = linear, operands
    n_queries, n_keys, width = query.shape[2], key.shape[2], value.shape[3]
    # The fused operator takes one head dim for all three; zeros change neither a dot product nor the columns that are kept.
    widest = max(query.shape[3], width)
    query, key, value = (functional.pad(t, (0, widest - t.shape[3])) if t.shape[3] < widest else t for t in (query, key, value))
    planned = fused_visits(attend, rest, n_queries, n_keys, query.device) if chosen is None else chosen.plan.everywhere
    if chosen is None and not any(visit.causal for visit in planned):
        seen = seen_keys(attend, query, key, tensors)
        planned = planned if seen is None else seen.visits(static_key(attend.mask), (n_queries, n_keys), (*CANDIDATES, FUSED_ROWS))
    if chosen is None and len(planned) == 1 and planned[0].is_whole(n_queries, n_keys):
        part, total = fused_block(ScoreBlock(attend, query, key, tensors, planned[0]), (query, key, value), scale, rest)
        return laid_out(part[..., :width]), total.to(torch.float32).contiguous()
    out, lse = output_like(query, value[..., :width])
    if chosen is not None:
        _attend_gathered(attend, linear, chosen, (query, key, value), tensors, (out, lse))
    elif sum(visit.n_queries for visit in planned) < n_queries:
        out.zero_()
        lse.fill_(-torch.inf)
    for visit in planned:
        own = visit.queries(query, 2), visit.keys(key, 2), visit.keys(value, 2)
        part, total = fused_block(ScoreBlock(attend, query, key, tensors, visit), own, scale, rest)
        out[visit.of_queries] = part[..., :width]
        lse[visit.of_queries] = total.to(lse.dtype)
    return out, lse


def _attend_gathered(
    attend: Attend,
    linear: tuple[float, sympy.Expr] | None,
    chosen: Gathered,
    operands: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    tensors: Mapping[str, torch.Tensor],
    results: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """Write out [B, H, Nq, Dv] and lse [B, H, Nq] of all queries; what `chosen` leaves to be visited otherwise is written over later.

    linear: scale and rest of the score where torch's fused attention serves, or None.
    """
    (query, key, _), (out, lse), dtype = operands, results, accumulation_dtype(operands[0].dtype)
    queries, keys, values = (chosen.rows_of(operand) for operand in operands)
    out_rows = out.new_zeros(queries.shape[0], queries.shape[1], out.shape[3])
    lse_rows = lse.new_zeros(queries.shape[0], queries.shape[1], 1)
    for visit in chosen.visits():
        block = ScoreBlock(attend, query, key, tensors, visit)
        rows, own_keys, own_values = visit.queries(queries), visit.keys(keys), visit.keys(values)
        if linear is not None:
            part, total = fused_block(block, (rows, own_keys, own_values), *linear)
        else:
            block.read_dot(rows.to(dtype), own_keys.to(dtype))
            attention = AttentionBlock(block, tensors)
            part, total = weighted_sum(attention.weights, own_values.to(dtype)), attention.lse
        # A block's filling is its first query again, with the same result.
        entries = visit.rows.flatten()
        out_rows[entries] = part[..., : out.shape[3]].transpose(1, 2).flatten(0, 1).to(out.dtype)
        lse_rows[entries] = total[..., None].transpose(1, 2).flatten(0, 1).to(lse.dtype)
    out.copy_(chosen.tensor_of(out_rows, out))
    lse.copy_(chosen.tensor_of(lse_rows, lse[..., None])[..., 0])
