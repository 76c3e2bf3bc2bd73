"""Linear attention through its state in torch operators: chunk by chunk of queries, neither a map nor a state of every token.

With f the features of queries and keys (`codegen.state_form`), u the values (times what their weight says, and a one beside them where a
sum is needed), r the rate of the decay, and S the state of the keys before a chunk, as seen from the last of them, p:

    o[i] = exp(r (p - i - shift)) f[i] S + sum_{j of the chunk, seen} exp(r (j - i - shift)) (f[i] . f[j]) u[j]
    S'   = exp(r (p - p')) S + sum_{p < j <= p'} exp(r (j - p')) f[j] u[j]^T

Without a limit the first state holds all keys, and chunks have none of their own. Where queries see segments of the keys, the state begins
anew with each of them, and distances are between positions, places being of the keys as they are sorted (`codegen.interval_plan`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import sympy
import torch

from codegen.base_two import LOG2_E
from codegen.contraction_order import FEATURES_AT_A_TIME, StatePlan, Step, limits
from codegen.interval_plan import Places
from codegen.normalise import divided
from codegen.score_block import ScoreBlock, dot, sum_over_queries, weighted_sum
from codegen.state_form import Feature, StateForm, state_form
from codegen.tensor_reads import TensorGradients, accumulation_dtype, derivative
from codegen.visits import Planes, Visit, as_slice
from rewrite.ir.expression import TOTAL
from rewrite.ir.operations import Attend
from rewrite.ir.semantics import evaluate_expression

_NONE = slice(0, 0)


class _Side:
    """Features of some of the queries or of the keys, in the accumulation dtype, and the way back through them.

    features [B, heads, n, F]; values: what expressions read there, with positions along axis 2 of queries and 3 of keys.
    """

    def __init__(self, rows: torch.Tensor, terms: list[tuple[Feature, sympy.Expr]], seen: Any, block: ScoreBlock, along: int) -> None:
        """rows [B, heads, n, D]. terms: every feature and its factor on this side. seen: the predicate of this side. along: 2 or 3."""
        self.rows, self.terms, self.block, self.along = rows, terms, block, along
        parts = [self.times(factor, rows if feature.dot else rows.new_ones(1, 1, 1, 1)) for feature, factor in terms]
        whole = [part if feature.dot else part.expand(*rows.shape[:3], 1) for part, (feature, _) in zip(parts, terms, strict=True)]
        self.features = whole[0] if len(whole) == 1 else torch.cat(whole, -1)
        self.hidden = None if seen == sympy.true else ~self._standing(torch.as_tensor(block.evaluate(seen), device=rows.device))
        if self.hidden is not None:
            self.features = self.features.masked_fill(self.hidden, 0.0)

    def _standing(self, value: torch.Tensor) -> torch.Tensor:
        """A value [.., .., n, 1] or [.., .., 1, n] as [.., .., n, 1]; one of less axes is the same everywhere."""
        value = value.reshape((1,) * (4 - value.dim()) + value.shape)
        return value if self.along == 2 else value.transpose(2, 3)

    def value_of(self, expression: sympy.Expr) -> torch.Tensor:
        """[.., .., n or 1, 1]."""
        found = torch.as_tensor(self.block.evaluate(expression), dtype=self.block.dtype, device=self.rows.device)
        return self._standing(found)

    def times(self, factor: sympy.Expr, terms: torch.Tensor) -> torch.Tensor:
        """terms [B, heads, n, ..] times an expression of this side."""
        return terms if factor == 1 else terms * (float(factor) if factor.is_number else self.value_of(factor))

    def through(self, factor: sympy.Expr, received: torch.Tensor, gradients: TensorGradients) -> None:
        """Add what reaches the tensors through a factor whose gradient is received [B, heads, n, 1]."""
        if not factor.is_number:
            received = received if self.along == 2 else received.transpose(2, 3)
            gradients.through(factor, received, self.block.values, self.block.visit)

    def gradient(self, d_features: torch.Tensor, gradients: TensorGradients) -> torch.Tensor:
        """The gradient of the rows [B, heads, n, D]; the tensors' is added."""
        if self.hidden is not None:
            d_features = d_features.masked_fill(self.hidden, 0.0)
        d_rows, start = torch.zeros_like(self.rows), 0
        for feature, factor in self.terms:
            part = d_features[..., start : start + (self.rows.shape[3] if feature.dot else 1)]
            start += part.shape[3]
            if feature.dot:
                d_rows += self.times(factor, part)
            self.through(factor, (part * self.rows).sum(-1, keepdim=True) if feature.dot else part, gradients)
        return d_rows


class QueryChunk(_Side):
    """The features [B, H, n, F] of a chunk of queries, and what becomes of its sums."""

    def __init__(self, rows: torch.Tensor, form: StateForm, block: ScoreBlock, visit: Visit) -> None:
        super().__init__(rows, [(feature, feature.query) for feature in form.features], form.seen_queries, block, along=2)
        self.visit = visit
        self.form, self.denominator = form, block.attend.denominator

    def _of_total(self, expression: sympy.Expr, total: torch.Tensor) -> torch.Tensor:
        value = evaluate_expression(expression, {**self.block.values, "total": total})
        return torch.as_tensor(value, dtype=total.dtype, device=total.device).expand_as(total)

    def finished(self, sums: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(out [B, H, n, Dv], lse [B, H, n]) of the sums [B, H, n, V]."""
        if not self.form.totals:
            return self.times(self.form.result, sums), sums.new_zeros(sums.shape[:3])
        total = sums[..., -1:]
        out = divided(sums[..., :-1], self._of_total(self.denominator, total))
        return self.times(self.form.result, out), total[..., 0].clamp(min=0.0).log()

    def sums_gradient(self, sums: torch.Tensor, d_out: torch.Tensor, d_lse: torch.Tensor, gradients: TensorGradients) -> torch.Tensor:
        """The gradient of the sums from that of out and of lse [B, H, n, 1]; the tensors' is added."""
        d_terms = self.times(self.form.result, d_out)
        if not self.form.totals:
            self.through(self.form.result, (d_out * sums).sum(-1, keepdim=True), gradients)
            return d_terms
        total = sums[..., -1:]
        denominator, slope = self._of_total(self.denominator, total), self._of_total(derivative(self.denominator, TOTAL), total)
        shares = divided(sums[..., :-1], denominator)
        self.through(self.form.result, (d_out * shares).sum(-1, keepdim=True), gradients)
        d_total = divided(d_lse, total.clamp(min=0.0)) - slope * divided((d_terms * shares).sum(-1, keepdim=True), denominator)
        return torch.cat([divided(d_terms, denominator), d_total], -1)


class KeyChunk(_Side):
    """The features [B, Hs, m, F] of some keys, and their values [B, Hs, m, V]."""

    def __init__(self, rows: torch.Tensor, values: torch.Tensor, form: StateForm, block: ScoreBlock) -> None:
        super().__init__(rows, [(feature, feature.key) for feature in form.features], form.seen_keys, block, along=3)
        self.form, self.plain = form, values
        self.values = self.times(form.value, values)
        if form.totals:
            self.values = torch.cat([self.values.expand_as(values), values.new_ones(*values.shape[:3], 1)], -1)

    def values_gradient(self, d_values: torch.Tensor, gradients: TensorGradients) -> torch.Tensor:
        """The gradient of the values as they were given, [B, Hs, m, Dv]; the tensors' is added."""
        d_values = d_values[..., : self.plain.shape[3]]
        self.through(self.form.value, (d_values * self.plain).sum(-1, keepdim=True), gradients)
        return self.times(self.form.value, d_values)


class StateReads:
    """What the chunks of one call read, or of some rows of its batch.

    heads: how many have a state of their own. rate [B or 1, H or 1, 1, 1], or None without a decay. batch: how many rows.
    """

    def __init__(
        self,
        attend: Attend,
        operands: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        tensors: Mapping[str, torch.Tensor],
        places: Places | None = None,
    ) -> None:
        """operands: query, key, value. places: where queries see intervals of the keys, the rows of the batch and the order of these."""
        form = state_form(attend)
        assert isinstance(form, StateForm)
        self.attend, self.form, self.tensors = attend, form, tensors
        self.query, self.key, self.value = operands
        self.dtype = accumulation_dtype(self.query.dtype)
        self.heads = self.key.shape[1] if form.shares_keys else self.query.shape[1]
        self.places, self.planes = places, Planes() if places is None else Planes(places.batch)
        self.batch = len(range(self.query.shape[0])[self.planes.batch])
        limited = limits(form, self.query.shape[2], self.key.shape[2]) if places is None else places.ends
        self.limits = limited.to(self.query.device)
        self.rate_block = self.block(Visit(_NONE, _NONE, None, planes=self.planes))
        self.rate = None if form.rate == 0 else self._of_head(form.rate)
        self.shift = int(torch.as_tensor(self.rate_block.evaluate(form.shift)))

    def _of_head(self, expression: sympy.Expr) -> torch.Tensor:
        found = torch.as_tensor(self.rate_block.evaluate(expression), dtype=self.dtype, device=self.query.device)
        return found.reshape((1,) * (4 - found.dim()) + found.shape)

    def block(self, visit: Visit) -> ScoreBlock:
        return ScoreBlock(self.attend, self.query, self.key, self.tensors, visit)

    def queries(self, step: Step) -> QueryChunk:
        rows = step.rows if isinstance(step.rows, slice) else step.rows.to(self.query.device)
        visit = Visit(rows, _NONE, None, planes=self.planes)
        return QueryChunk(visit.queries(self.query, 2).to(self.dtype), self.form, self.block(visit), visit)

    def position(self, place: int) -> int:
        """Of the key at a place."""
        return place if self.places is None else int(self.places.key_order[place])

    def keys(self, columns: slice) -> KeyChunk:
        """columns: places."""
        chosen = columns if self.places is None else as_slice(self.places.key_order[columns], self.query.device)
        visit = Visit(_NONE, chosen, None, planes=self.planes)
        rows, values = (
            visit.keys(t, 2).to(self.dtype).repeat_interleave(self.heads // t.shape[1], dim=1) for t in (self.key, self.value)
        )  # fmt: skip
        return KeyChunk(rows, values, self.form, self.block(visit))

    def parts(self, first: int, last: int) -> Iterator[KeyChunk]:
        """Keys first <= j < last, as many at a time as a cache holds."""
        wide = self.batch * self.heads * max(self.form.width(self.key.shape[3]), self.value.shape[3])
        block = max(1, FEATURES_AT_A_TIME // wide)
        for at in range(first, last, block):
            yield self.keys(slice(at, min(at + block, last)))

    def decay(self, distance: torch.Tensor | int) -> torch.Tensor:
        """exp(rate * distance)."""
        assert self.rate is not None
        found: torch.Tensor = (self.rate * distance * LOG2_E).exp2()
        return found

    def new_state(self) -> torch.Tensor:
        """[B, Hs, F, V]: the state of no keys."""
        columns = self.value.shape[3] + self.form.totals
        return self.query.new_zeros(self.batch, self.heads, self.form.width(self.key.shape[3]), columns, dtype=self.dtype)

    def is_empty(self, start: int, before: int) -> bool:
        """Whether a segment's state holds no key yet. That of a whole row may hold keys in front of the call's."""
        return self.places is not None and start == before

    def next_state(self, state: torch.Tensor, before: int, until: int, start: int = 0) -> torch.Tensor:
        """The state of the keys start <= j < until from that of j < before."""
        if before == until:
            return state
        if self.rate is not None and not self.is_empty(start, before):
            state = state * self.decay(self.position(before - 1) - self.position(until - 1))
        for keys in self.parts(before, until):
            features = keys.features
            if self.rate is not None:
                features = features * self.decay(distances(keys.block, self.position(until - 1)))
            state = state + sum_over_queries(features, keys.values, self.heads)
        return state

    def to_state(self, queries: QueryChunk, step: Step) -> torch.Tensor | None:
        """Distances [1, 1, n, 1] of the last key of a state to the queries of a chunk, negative to those that come later."""
        if self.rate is None or self.is_empty(step.start, step.before):
            return None
        found: torch.Tensor = self.position(step.before - 1) - self.shift - queries.block.values["i"]
        return found

    def hidden(self, step: Step) -> torch.Tensor:
        """[n, m]: which of a step's queries do not see which of its own keys."""
        rows = step.rows if isinstance(step.rows, slice) else step.rows.to(self.limits.device)
        columns = torch.arange(step.before, step.until, device=self.limits.device)
        hidden = columns >= self.limits[rows][:, None]
        return hidden if self.places is None else hidden | (columns < self.places.begins[rows][:, None])


def distances(block: ScoreBlock, last: int) -> torch.Tensor:
    """[1, 1, m, 1]: of keys to a key."""
    found: torch.Tensor = (block.values["j"] - last).transpose(2, 3)
    return found


class ChunkScores:
    """What the queries of a chunk and its own keys weigh, [B, H, n, m], zero where a query does not see a key.

    decays: by distance, or None. hidden: [n, m].
    """

    def __init__(self, reads: StateReads, step: Step, queries: QueryChunk, keys: KeyChunk) -> None:
        columns = keys.block.values["j"][..., : step.until - step.before]
        self.features = keys.features[:, :, : step.until - step.before]
        self.values = keys.values[:, :, : step.until - step.before]
        self.hidden = reads.hidden(step)
        self.distances = None if reads.rate is None else (columns - queries.block.values["i"] - reads.shift).masked_fill(self.hidden, 0)
        self.decays = None if self.distances is None else reads.decay(self.distances)
        self.weights = self.seen(dot(queries.features, self.features))

    def seen(self, terms: torch.Tensor) -> torch.Tensor:
        """The terms [B, H, n, m] as they decay, zero where hidden."""
        return (terms if self.decays is None else terms * self.decays).masked_fill(self.hidden, 0.0)


def chunk_sums(
    reads: StateReads, step: Step, state: torch.Tensor, queries: QueryChunk, scores: ChunkScores | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """([B, H, n, V] of a chunk, the part of it that the state gives)."""
    of_state = weighted_sum(queries.features, state)
    distance = reads.to_state(queries, step)
    if distance is not None:
        of_state = of_state * reads.decay(distance)
    return (of_state if scores is None else of_state + weighted_sum(scores.weights, scores.values)), of_state


def state_forward(
    reads: StateReads, plan: StatePlan, results: tuple[torch.Tensor, torch.Tensor], before: torch.Tensor | None = None
) -> tuple[torch.Tensor, int]:
    """Write out [B, H, Nq, Dv] and lse [B, H, Nq]; the last state, and how many of the keys it holds.

    before: the state of keys in front of those of the call, of which every query sees all.
    """
    out, lse = results
    if reads.places is not None:
        out[reads.planes.batch] = 0.0
        lse[reads.planes.batch] = -torch.inf if reads.form.totals else 0.0
    state, start, held = reads.new_state() if before is None else before, 0, 0
    for step in plan.steps:
        if step.start != start:
            state, start, held = reads.new_state(), step.start, step.start
        state, held = reads.next_state(state, held, step.before, start), step.before
        queries = reads.queries(step)
        own = reads.keys(slice(step.before, step.until)) if step.until > step.before else None
        scores = None if own is None else ChunkScores(reads, step, queries, own)
        found, total = queries.finished(chunk_sums(reads, step, state, queries, scores)[0])
        out[queries.visit.of_queries] = found.to(out.dtype)
        lse[queries.visit.of_queries] = total.to(lse.dtype)
    return state, held
