"""Gradients of linear attention through its state, chunk by chunk from the last to the first.

Names as in `codegen.torch_state`; do[i] is the gradient of o[i], dS that of the state before a chunk, dS' after it:

    df[i] = exp(r (p - i - shift)) do[i] S^T + sum_j exp(r (j - i - shift)) (do[i] . u[j]) f[j]
    df[j] = exp(r (j - p')) u[j] dS'^T + sum_i exp(r (j - i - shift)) (do[i] . u[j]) f[i]
    du[j] = exp(r (j - p')) f[j] dS' + sum_i exp(r (j - i - shift)) (f[i] . f[j]) do[i]
    dS    = exp(r (p - p')) dS' + sum_i exp(r (p - i - shift)) f[i]^T do[i]

and the rate gets, from every exponential, its distance times what it weighs. The states before the chunks are kept, no other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from codegen.contraction_order import StatePlan, Step
from codegen.score_block import dot, sum_over_queries, weighted_sum
from codegen.tensor_reads import TensorGradients
from codegen.torch_state import ChunkScores, KeyChunk, QueryChunk, StateReads, chunk_sums, distances


class _Backward:
    """The gradients of one run, added to those of query, key and value in the accumulation dtype."""

    def __init__(
        self, reads: StateReads, received: tuple[torch.Tensor, torch.Tensor], gradients: TensorGradients, totals: Sequence[torch.Tensor]
    ) -> None:
        self.reads, self.received, self.gradients = reads, received, gradients
        self.d_query, self.d_key, self.d_value = totals
        self.d_state = torch.zeros_like(reads.new_state())
        self.d_rate = None if reads.rate is None else reads.query.new_zeros(reads.batch, reads.query.shape[1], 1, 1, dtype=reads.dtype)

    def _count(self, terms: torch.Tensor) -> None:
        """Add to the gradient of the rate: terms [B, H, .., ..], each times its distance."""
        assert self.d_rate is not None
        self.d_rate += terms.sum((2, 3), keepdim=True)

    def _give_keys(self, keys: KeyChunk, d_features: torch.Tensor, d_values: torch.Tensor) -> None:
        columns = keys.block.visit.columns
        for total, part in (
            (self.d_key, keys.gradient(d_features, self.gradients)),
            (self.d_value, keys.values_gradient(d_values, self.gradients)),
        ):
            total[self.reads.planes.batch, :, columns] += part.view(part.shape[0], total.shape[1], -1, *part.shape[2:]).sum(2)

    def through_growth(self, state: torch.Tensor, before: int, until: int, start: int) -> None:
        """Back through `StateReads.next_state`."""
        reads = self.reads
        if before == until:
            return
        for keys in reads.parts(before, until):
            d_features, d_values = keys.values @ self.d_state.transpose(-2, -1), keys.features @ self.d_state
            if reads.rate is not None:
                distance = distances(keys.block, reads.position(until - 1))
                decay = reads.decay(distance)
                d_features, d_values = d_features * decay, d_values * decay
                self._count(distance * (d_values * keys.values).sum(-1, keepdim=True))
            self._give_keys(keys, d_features, d_values)
        if reads.rate is not None and not reads.is_empty(start, before):
            grown = reads.position(before - 1) - reads.position(until - 1)
            self.d_state = self.d_state * reads.decay(grown)
            self._count(grown * (self.d_state * state).sum((2, 3), keepdim=True))

    def through_chunk(self, step: Step, state: torch.Tensor) -> None:
        """Back through the sums of a chunk; what its state receives is added to that of the state."""
        reads, queries = self.reads, self.reads.queries(step)
        own = reads.keys(slice(step.before, step.until)) if step.until > step.before else None
        scores = None if own is None else ChunkScores(reads, step, queries, own)
        sums, of_state = chunk_sums(reads, step, state, queries, scores)
        d_out, d_lse = (queries.visit.queries(t, 2).to(reads.dtype) for t in (self.received[0], self.received[1][..., None]))
        d_sums = queries.sums_gradient(sums, d_out, d_lse, self.gradients)
        d_of_state, distance = d_sums, reads.to_state(queries, step)
        if distance is not None:
            self._count(distance * (d_sums * of_state).sum(-1, keepdim=True))
            d_of_state = d_sums * reads.decay(distance)
        d_features = weighted_sum(d_of_state, state.transpose(-2, -1))
        self.d_state = self.d_state + sum_over_queries(queries.features, d_of_state, reads.heads)
        if own is not None and scores is not None:
            d_features = d_features + self._through_scores(queries, own, scores, d_sums)
        self.d_query[queries.visit.of_queries] = queries.gradient(d_features, self.gradients)

    def _through_scores(self, queries: QueryChunk, own: KeyChunk, scores: ChunkScores, d_sums: torch.Tensor) -> torch.Tensor:
        """The gradient that the queries' features get from the chunk's own keys; theirs is added."""
        d_weights = dot(d_sums, scores.values)
        if scores.distances is not None:
            self._count(scores.distances * scores.weights * d_weights)
        d_dot = scores.seen(d_weights)
        heads = self.reads.heads
        self._give_keys(own, sum_over_queries(d_dot, queries.features, heads), sum_over_queries(scores.weights, d_sums, heads))
        return weighted_sum(d_dot, scores.features)


def state_gradients(
    runs: Sequence[tuple[StateReads, StatePlan]], received: tuple[torch.Tensor, torch.Tensor], gradients: TensorGradients
) -> list[torch.Tensor]:
    """Gradients of query, key and value, shaped and typed as these are; the tensors' are added to `gradients`.

    runs: what each part of the batch reads, and its steps. received: the gradients of out [B, H, Nq, Dv] and of lse [B, H, Nq].
    """
    reads = runs[0][0]
    operands = (reads.query, reads.key, reads.value)
    totals = [torch.zeros(operand.shape, dtype=reads.dtype, device=operand.device) for operand in operands]
    for reads, plan in runs:
        _add_run(reads, plan, _Backward(reads, received, gradients, totals))
    return [total.to(operand.dtype) for total, operand in zip(totals, operands, strict=True)]


def _add_run(reads: StateReads, plan: StatePlan, backward: _Backward) -> None:
    states: list[torch.Tensor] = []
    state, start, held = reads.new_state(), 0, 0
    for step in plan.steps:
        if step.start != start:
            state, start, held = reads.new_state(), step.start, step.start
        state, held = reads.next_state(state, held, step.before, start), step.before
        states.append(state)
    for place, step in reversed(list(enumerate(plan.steps))):
        backward.through_chunk(step, states[place])
        goes_on = place > 0 and plan.steps[place - 1].start == step.start
        previous, held = (states[place - 1], plan.steps[place - 1].before) if goes_on else (reads.new_state(), step.start)
        backward.through_growth(previous, held, step.before, step.start)
        if not goes_on:
            backward.d_state = torch.zeros_like(previous)
    if backward.d_rate is not None:
        block = reads.rate_block
        backward.gradients.through(reads.form.rate, backward.d_rate, block.values, block.visit)
