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
from codegen.score_block import ScoreBlock, dot, linear_score, sum_over_queries, weighted_sum
from codegen.tensor_reads import TensorGradients, accumulation_dtype, derivative, read_block
from codegen.torch_streaming import planes_at_a_time, query_visits
from codegen.visits import Visit
from rewrite.ir.expression import W, tensors_in
from rewrite.ir.semantics import evaluate_expression
from rewrite.ir.statistic import Statistic

Tensors = Mapping[str, torch.Tensor]


def row_range(statistic: Statistic, n_queries: int) -> range:
    """The queries that the statistic reads."""
    start, stop = statistic.rows or (0, None)
    return range(n_queries)[start:stop]


def statistic_visits(
    statistic: Statistic, query: torch.Tensor, key: torch.Tensor, tensors: Tensors
) -> Iterator[tuple[Visit, torch.Tensor | slice]]:
    """The visits of the rows that are read, and where their rows lie among those."""
    found = list(_cut(query_visits(statistic.attend, query, key, tensors), row_range(statistic, query.shape[2])))
    for planes in planes_at_a_time([visit for visit, _ in found], statistic.attend, query, key):
        for visit, place in found:
            yield visit._replace(planes=planes), place


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
def uses_lse(statistic: Statistic) -> bool:
    """Whether the weights are  exp(scale * qk + rest - lse)  with the log-sum-exp that the attention itself saves."""
    return replace(statistic.attend, sink=None).is_plain and linear_score(statistic.attend.score) is not None


def _exponentials(
    statistic: Statistic, query: torch.Tensor, key: torch.Tensor, tensors: Tensors, visit: Visit, lse: torch.Tensor
) -> tuple[ScoreBlock, torch.Tensor]:
    """A visit and its weights, in one product and one exponential; rows that see no key weigh nothing."""
    block = ScoreBlock(statistic.attend, query, key, tensors, visit)
    scale, rest = linear_score(statistic.attend.score) or (1.0, sympy.Integer(0))
    scores = dot(visit.queries(query, 2).to(block.dtype) * (LOG2_E * scale), visit.keys(key, 2).to(block.dtype))
    if rest != 0:
        scores += LOG2_E * block.evaluate(rest)
    block.hide(scores, block.hidden(), -torch.inf)
    own = visit.queries(lse, 2)[..., None]
    scores -= LOG2_E * own.masked_fill(own == -torch.inf, torch.inf)
    return block, scores.exp2_()


def statistic_forward(
    statistic: Statistic, query: torch.Tensor, key: torch.Tensor, tensors: Tensors, lse: torch.Tensor | None = None
) -> torch.Tensor:
    """The result that `Statistic` describes. query [B, H, Nq, D], key [B, Hkv, Nk, D]; O(block x Nk) memory besides the result.

    lse: the attention's own [B, H, Nq] float32, which saves the normalisation where `uses_lse`. It is not used where it would lose digits:
    for float64 operands, and in low precision where a bias was rounded before it was made.
    """
    result = torch.zeros(result_shape(statistic, query, key), dtype=accumulation_dtype(query.dtype), device=query.device)
    exact = query.dtype == torch.float32 or (query.dtype != torch.float64 and not statistic.attend.score.atoms(sympy.Indexed))
    known = lse if exact and uses_lse(statistic) else None
    for visit, place in statistic_visits(statistic, query, key, tensors):
        if known is not None:
            block, weights = _exponentials(statistic, query, key, tensors, visit, known)
        else:
            attention = _attention(statistic, query, key, tensors, visit)
            block, weights = attention.block, attention.weights
        terms = weights
        if statistic.term != W:
            _read_term(statistic, block, tensors)
            block.values["w"] = weights
            terms = block.filled(statistic.term, weights)
        if statistic.over == "queries":
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
