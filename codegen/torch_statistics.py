"""Statistics of an attention map in torch operators, a block of queries at a time: the map is never held.

Both ways go through the blocks of `codegen.attention_block`, whose weights are exact whatever made them. Going back, a statistic's gradient
reaches the weights as  dw = term'(w) * dresult,  and from there the operands as any attention's does.
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
from codegen.base_two import LOG2_E
from codegen.contraction_order import Sizes
from codegen.masks import static_key, visible_rows
from codegen.score_block import ScoreBlock, buffer_size, by_key_head, dot, linear_score, sum_over_queries, weighted_sum
from codegen.tensor_reads import TensorGradients, accumulation_dtype, derivative, read_block
from codegen.torch_streaming import HELD, Held, planes_at_a_time, query_visits, static_visits
from codegen.visits import Visit
from codegen.weight_form import split_visits
from rewrite.ir.expression import W, tensors_in
from rewrite.ir.semantics import evaluate_expression
from rewrite.ir.statistic import Statistic

Tensors = Mapping[str, torch.Tensor]
# A visit, and where its rows lie among those that are read.
Placed = tuple[Visit, torch.Tensor | slice]

# Where the scores lie in one buffer and nothing is made beside them: 8 MiB in float32. Matrix products of many heads at once gain more than
# scores that stay in the fastest caches; of 2 cores and 12 heads, 128 queries of at least 4 were best from 197 keys to 4096.
IN_ONE_BUFFER = Held(1 << 21, 128, 4)
# Rows whose weights are small beside the keys, so that a second copy of them, which torch's softmax makes, costs nothing.
FEW_ROWS = 64


def row_range(statistic: Statistic, n_queries: int) -> range:
    """The queries that the statistic reads."""
    start, stop = statistic.rows or (0, None)
    return range(n_queries)[start:stop]


def statistic_visits(statistic: Statistic, query: torch.Tensor, key: torch.Tensor, tensors: Tensors, held: Held) -> Sequence[Placed]:
    """The visits of the rows that are read, and where their rows lie among those."""
    sizes = Sizes.of(query, key, key)
    if split_visits(statistic.attend)[1] == sympy.true:
        return _static_visits(statistic, sizes, query.device, held)
    return _planned(statistic, query_visits(statistic.attend, query, key, tensors, held), sizes, held)


@lru_cache(maxsize=256)
def _static_visits(statistic: Statistic, sizes: Sizes, device: torch.device, held: Held) -> tuple[Placed, ...]:
    """Of a mask that reads no tensor: worked out once, which takes longer than the few rows of a small attention."""
    return _planned(statistic, static_visits(statistic.attend, sizes, device, held), sizes, held)


def _planned(statistic: Statistic, visits: Sequence[Visit], sizes: Sizes, held: Held) -> tuple[Placed, ...]:
    found = list(_cut(visits, row_range(statistic, sizes.n_queries)))
    every = planes_at_a_time([visit for visit, _ in found], statistic.attend, sizes, held)
    return tuple((visit._replace(planes=planes), place) for planes in every for visit, place in found)


def _cut(found: Sequence[Visit], rows: range) -> Iterator[Placed]:
    """Visits cut to some of the rows, and where the rows that are left lie among those; visits without any are left out."""
    for visit in found:
        if isinstance(visit.rows, slice):
            start, stop = max(visit.rows.start, rows.start), min(visit.rows.stop, rows.stop)
            if start < stop:
                seen = None if visit.seen is None else visit.seen[start - visit.rows.start : stop - visit.rows.start]
                yield visit._replace(rows=slice(start, stop), seen=seen), slice(start - rows.start, stop - rows.start)
        else:
            kept = (visit.rows >= rows.start) & (visit.rows < rows.stop)
            if kept.any():
                chosen = visit.rows[kept]
                yield visit._replace(rows=chosen, seen=None if visit.seen is None else visit.seen[kept]), chosen - rows.start


def result_shape(statistic: Statistic, query: torch.Tensor, key: torch.Tensor) -> tuple[int, int, int]:
    length = key.shape[2] if statistic.over == "queries" else len(row_range(statistic, query.shape[2]))
    return query.shape[0], query.shape[1], length


def _read_term(statistic: Statistic, block: ScoreBlock, tensors: Tensors) -> None:
    """Put what the term reads besides the attention's own tensors among the block's values."""
    for name, indices in tensors_in(statistic.term).items():
        if name not in block.values:
            part = read_block(tensors[name], indices, block.values, block.visit)
            block.values[name] = part.to(block.dtype) if part.is_floating_point() else part


def _attention(statistic: Statistic, query: torch.Tensor, key: torch.Tensor, tensors: Tensors, visit: Visit) -> AttentionBlock:
    """The attention's weights on one visit, step by step."""
    dtype = accumulation_dtype(query.dtype)
    block = ScoreBlock(statistic.attend, query, key, tensors, visit)
    block.read_dot(visit.queries(query, 2).to(dtype), visit.keys(key, 2).to(dtype))
    return AttentionBlock(block, tensors)


@lru_cache(maxsize=1024)
def softmax_score(statistic: Statistic) -> tuple[float, sympy.Expr] | None:
    """(scale, rest) where the weights are  softmax(scale * qk + rest),  with a sink or without."""
    return linear_score(statistic.attend.score) if replace(statistic.attend, sink=None).is_plain else None


class FewRows(NamedTuple):
    """Rows that see some key each. scale: of their scores. columns: the keys that any of them sees. partial: the stretch of the columns,
    counted among them, outside of which every row sees all; hidden: what rows do not see there, [rows, partial] bool."""

    scale: float
    rows: slice
    columns: slice
    partial: slice
    hidden: torch.Tensor | None


@lru_cache(maxsize=256)
def _few_rows(statistic: Statistic, sizes: Sizes, device: torch.device) -> FewRows | None:
    """Where the result is the sum of  softmax(scale * qk)  over a few rows under a mask that reads no tensor; None for anything else."""
    linear, attend, rows = softmax_score(statistic), statistic.attend, row_range(statistic, sizes.n_queries)
    if linear is None or linear[1] != 0 or attend.sink is not None or split_visits(attend)[1] != sympy.true:
        return None
    if statistic.over != "queries" or statistic.term != W or not 0 < len(rows) <= FEW_ROWS or not sizes.n_keys:
        return None
    static, order = static_key(split_visits(attend)[0]), torch.arange(rows.start, rows.stop)
    seen = torch.cat([part for _, part in visible_rows(static, sizes.n_queries, sizes.n_keys, order=order)])
    if not seen.any(1).all():
        return None
    columns = _stretch(seen.any(0))
    hidden = ~seen[:, columns]
    partial = _stretch(hidden.any(0))
    return FewRows(linear[0], slice(rows.start, rows.stop), columns, partial, hidden[:, partial].to(device) if hidden.any() else None)


def _stretch(of: torch.Tensor) -> slice:
    """From the first of [n] bool to the last."""
    places = of.nonzero().flatten()
    return slice(int(places[0]), int(places[-1]) + 1) if len(places) else slice(0, 0)


def _sum_of_few(few: FewRows, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """The result [B, H, Nk], in the accumulation dtype."""
    (batch, heads, _, _), n_keys, dtype = query.shape, key.shape[2], accumulation_dtype(query.dtype)
    read = by_key_head(query[:, :, few.rows], key.shape[1]).flatten(0, 1).to(dtype)
    keys = key[:, :, few.columns].flatten(0, 1).to(dtype)
    # Nothing is added; but a product alone takes no factor, and to multiply the rows takes another call.
    scores = torch.baddbmm(read.new_empty(()), read, keys.transpose(1, 2), beta=0, alpha=few.scale)
    scores = scores.view(batch, heads, -1, keys.shape[1])
    if few.hidden is not None:
        scores[..., few.partial].masked_fill_(few.hidden, -torch.inf)
    weights = scores.softmax(-1)
    received = weights[:, :, 0] if weights.shape[2] == 1 else weights.sum(2)
    behind = n_keys - few.columns.stop
    return functional.pad(received, (few.columns.start, behind)) if few.columns.start or behind else received


def _softmax(
    statistic: Statistic,
    linear: tuple[float, sympy.Expr],
    operands: tuple[torch.Tensor, torch.Tensor],
    tensors: Tensors,
    visit: Visit,
    buffer: torch.Tensor,
) -> tuple[ScoreBlock, torch.Tensor, torch.Tensor]:
    """A visit, its weights without their denominator, in the buffer, and the factors [B, H, rows, 1] that they lack."""
    query, key = operands
    block, (scale, rest), sink = ScoreBlock(statistic.attend, query, key, tensors, visit), linear, statistic.attend.sink
    scores = dot(visit.queries(query, 2).to(block.dtype) * (LOG2_E * scale), visit.keys(key, 2).to(block.dtype), buffer)
    if rest != 0:
        scores += LOG2_E * block.evaluate(rest)
    hidden = block.hidden()
    if hidden is not None and visit.seen is not None and split_visits(statistic.attend)[1] == sympy.true:
        # A number to a pair, the same of all maps, and the smaller one taken is five times as fast as filling by a mask.
        limit = scores.new_full(visit.seen[:, visit.partial].shape, torch.inf).masked_fill_(hidden[0, 0, :, visit.partial], -torch.inf)
        part = scores[..., visit.partial]
        torch.minimum(part, limit, out=part)
    else:
        block.hide(scores, hidden, -torch.inf)
    # Of a row that sees no key all weights are 0 so, and not what -inf - -inf makes.
    most = scores.amax(-1, keepdim=True).clamp_(min=torch.finfo(block.dtype).min)
    if sink is not None:
        logit = LOG2_E * block.filled(sink, most)
        most = most.maximum(logit)
    total = scores.sub_(most).exp2_().sum(-1, keepdim=True)
    if sink is not None:
        total += (logit - most).exp2_()
    # The largest score of any other row makes 1, or its sink does.
    return block, scores, total.clamp_(min=1.0).reciprocal_()


def statistic_forward(statistic: Statistic, query: torch.Tensor, key: torch.Tensor, tensors: Tensors) -> torch.Tensor:
    """The result that `Statistic` describes. query [B, H, Nq, D], key [B, Hkv, Nk, D]; O(block x Nk) memory besides the result."""
    dtype, sizes = accumulation_dtype(query.dtype), Sizes.of(query, key, key)
    if (few := _few_rows(statistic, sizes, query.device)) is not None:
        return _sum_of_few(few, query, key)
    result = torch.zeros(result_shape(statistic, query, key), dtype=dtype, device=query.device)
    linear, over_queries = softmax_score(statistic), statistic.over == "queries"
    visits = statistic_visits(statistic, query, key, tensors, HELD if linear is None else IN_ONE_BUFFER)
    # Memory that is given back between visits comes back page by page, which takes as long as the exponentials.
    most = 0 if linear is None else buffer_size((visit for visit, _ in visits), sizes.batch, sizes.heads)
    buffer = query.new_empty(most, dtype=dtype)
    for visit, place in visits:
        if linear is None:
            attention = _attention(statistic, query, key, tensors, visit)
            block, weights = attention.block, attention.weights
        else:
            block, weights, factors = _softmax(statistic, linear, (query, key), tensors, visit, buffer)
            if over_queries and statistic.term == W:
                result[*visit.planes[:2], visit.columns] += (factors.transpose(2, 3) @ weights)[:, :, 0]
                continue
            weights *= factors
        terms = weights
        if statistic.term != W:
            _read_term(statistic, block, tensors)
            block.values["w"] = weights
            terms = block.filled(statistic.term, weights)
        if over_queries:
            result[*visit.planes[:2], visit.columns] += terms.sum(2)
        else:
            result[*visit.planes[:2], place] = terms.sum(3)
    return result


def statistic_gradients(
    statistic: Statistic, received: torch.Tensor, query: torch.Tensor, key: torch.Tensor, tensors: Tensors, wanted: Sequence[str]
) -> list[torch.Tensor]:
    """Gradients of query, key and the tensors named in `wanted`, from that of the result; shaped and typed as these are."""
    dtype = accumulation_dtype(query.dtype)
    d_query, d_key = (torch.zeros(operand.shape, dtype=dtype, device=operand.device) for operand in (query, key))
    gradients = TensorGradients(statistic.tensors(), tensors, wanted)
    slope = derivative(statistic.term, W)
    for visit, place in statistic_visits(statistic, query, key, tensors, HELD):
        attention = _attention(statistic, query, key, tensors, visit)
        _read_term(statistic, attention.block, tensors)
        values, weights = attention.block.values, attention.weights
        d_terms = visit.pairs(received[:, :, None]) if statistic.over == "queries" else received[*visit.planes[:2], place][..., None]
        d_terms = d_terms.to(dtype).expand(weights.shape)
        # To the term w is the final weight, to the attention's own weight expression the normalised one.
        final = {**values, "w": weights}
        gradients.through(statistic.term, d_terms, final, visit)
        d_weights = d_terms * torch.as_tensor(evaluate_expression(slope, final), dtype=dtype, device=weights.device)
        d_dot = attention.dot_gradient(d_weights, weights.new_zeros(*weights.shape[:3], 1), gradients)
        keys = visit.keys(key, 2).to(dtype)
        d_query[visit.of_queries] = weighted_sum(d_dot, keys)
        d_key[visit.of_keys] += sum_over_queries(d_dot, visit.queries(query, 2).to(dtype), keys.shape[1])
    return [d_query.to(query.dtype), d_key.to(key.dtype), *(gradient.result() for gradient in gradients)]
