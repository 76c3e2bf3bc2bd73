"""Statistics of an attention map in torch operators, a block of queries at a time: the map is never held.

Both ways go through the blocks of `codegen.attention_block`, whose weights are exact whatever made them. Going back, a statistic's gradient
reaches the weights as  dw = term'(w) * dresult,  and from there the operands as any attention's does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

import sympy
import torch

from codegen.attention_block import AttentionBlock
from codegen.base_two import LOG2_E
from codegen.contraction_order import Sizes
from codegen.score_block import ScoreBlock, buffer_size, dot, linear_score, sum_over_queries, weighted_sum
from codegen.tensor_reads import TensorGradients, accumulation_dtype, derivative, read_block
from codegen.torch_streaming import planes_at_a_time, query_visits, static_visits
from codegen.visits import Visit
from codegen.weight_form import split_visits
from rewrite.ir.expression import W, tensors_in
from rewrite.ir.semantics import evaluate_expression
from rewrite.ir.statistic import Statistic

Tensors = Mapping[str, torch.Tensor]

# Rows whose weights are small beside the keys, so that a second copy of them, which torch's softmax makes, costs nothing.
FEW_ROWS = 64


def row_range(statistic: Statistic, n_queries: int) -> range:
    """The queries that the statistic reads."""
    start, stop = statistic.rows or (0, None)
    return range(n_queries)[start:stop]


def statistic_visits(
    statistic: Statistic, query: torch.Tensor, key: torch.Tensor, tensors: Tensors
) -> Sequence[tuple[Visit, torch.Tensor | slice]]:
    """The visits of the rows that are read, and where their rows lie among those."""
    if split_visits(statistic.attend)[1] == sympy.true:
        return _static_visits(statistic, Sizes.of(query, key, key), query.device)
    return _planned(statistic, query_visits(statistic.attend, query, key, tensors), Sizes.of(query, key, key))


@lru_cache(maxsize=256)
def _static_visits(statistic: Statistic, sizes: Sizes, device: torch.device) -> tuple[tuple[Visit, torch.Tensor | slice], ...]:
    """Of a mask that reads no tensor: worked out once, which takes longer than the few rows of a small attention."""
    return _planned(statistic, static_visits(statistic.attend, sizes, device), sizes)


def _planned(statistic: Statistic, visits: Sequence[Visit], sizes: Sizes) -> tuple[tuple[Visit, torch.Tensor | slice], ...]:
    found = list(_cut(visits, row_range(statistic, sizes.n_queries)))
    every = planes_at_a_time([visit for visit, _ in found], statistic.attend, sizes)
    return tuple((visit._replace(planes=planes), place) for planes in every for visit, place in found)


def _cut(found: Sequence[Visit], rows: range) -> Iterator[tuple[Visit, torch.Tensor | slice]]:
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


@lru_cache(maxsize=256)
def _plain_rows(statistic: Statistic, sizes: Sizes, device: torch.device) -> tuple[float, range] | None:
    """(scale, rows) where the result is the sum of  softmax(scale * qk)  over a few rows that see every key."""
    linear, attend = softmax_score(statistic), statistic.attend
    if linear is None or linear[1] != 0 or attend.sink is not None or split_visits(attend)[1] != sympy.true:
        return None
    if statistic.over != "queries" or statistic.term != W or sizes.heads != sizes.key_heads:
        return None
    rows = row_range(statistic, sizes.n_queries)
    read = [visit for visit, _ in _cut(static_visits(attend, sizes, device), rows)]
    whole = len(read) == 1 and read[0].seen is None and read[0].n_keys == sizes.n_keys and 0 < read[0].n_queries == len(rows) <= FEW_ROWS
    return (linear[0], rows) if whole else None


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
    most = block.hide(scores, block.hidden(), -torch.inf).amax(-1, keepdim=True)
    # Rows that see no key weigh nothing.
    empty = most == -torch.inf
    if sink is not None:
        logit = LOG2_E * block.filled(sink, most)
        most = most.maximum(logit)
    most.masked_fill_(empty, 0.0)
    total = scores.sub_(most).exp2_().sum(-1, keepdim=True)
    if sink is not None:
        total += (logit - most).exp2_()
    return block, scores, total.reciprocal_().masked_fill_(empty, 0.0)


def statistic_forward(statistic: Statistic, query: torch.Tensor, key: torch.Tensor, tensors: Tensors) -> torch.Tensor:
    """The result that `Statistic` describes. query [B, H, Nq, D], key [B, Hkv, Nk, D]; O(block x Nk) memory besides the result."""
    dtype, sizes = accumulation_dtype(query.dtype), Sizes.of(query, key, key)
    if (plain := _plain_rows(statistic, sizes, query.device)) is not None:
        scale, rows = plain
        read = query.narrow(2, rows.start, len(rows)).to(dtype) * scale
        return (read @ key.transpose(2, 3).to(dtype)).softmax(-1).sum(2)
    result = torch.zeros(result_shape(statistic, query, key), dtype=dtype, device=query.device)
    linear, over_queries = softmax_score(statistic), statistic.over == "queries"
    visits = statistic_visits(statistic, query, key, tensors)
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
    for visit, place in statistic_visits(statistic, query, key, tensors):
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
