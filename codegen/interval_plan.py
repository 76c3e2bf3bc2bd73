"""How the torch lowering goes through the states of segments: steps as for one state, from segment to segment.

The lengths of the segments are data and read here, on the CPU. A segment that is longer than a chunk has a state, which grows as that of a
whole row does; shorter ones are multiplied pair by pair, as many in one step as a chunk has keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from codegen.contraction_order import Sizes, StatePlan, Step, best_chunk_of, best_limited_chunk, counts_of, is_cheaper
from codegen.intervals import Intervals
from codegen.state_form import StateForm


class Places(NamedTuple):
    """Some rows of the batch, whose queries see intervals. key_order [Nk]: the position of the key at each place. begins, ends [Nq]: of
    each query. All int64 on the CPU."""

    batch: slice
    key_order: torch.Tensor
    begins: torch.Tensor
    ends: torch.Tensor


Runs = list[tuple[Places, StatePlan]]


def interval_plan(form: StateForm, sizes: Sizes, found: Intervals) -> Runs | None:
    """The steps of every row of the batch; None where pair by pair is cheaper."""
    runs = interval_steps(form, sizes, found, best_limited_chunk(form, sizes))
    pairs = int((found.ends - found.begins).clamp(min=0).sum(1).float().mean())
    diagonal = sum(plan.counts["diagonal"] for _, plan in runs) // len(runs)
    return runs if is_cheaper(sizes, counts_of(form, sizes, diagonal), pairs) else None


def interval_steps(form: StateForm, sizes: Sizes, found: Intervals, chunk: int) -> Runs:
    """The same with `chunk` queries at a time, or as many as may be where the state has all keys of their segment."""
    rows = chunk if form.limit is not None or form.order is not None else max(chunk, best_chunk_of(form, sizes))
    key_order, _, query_order, begins, ends = (each.long() for each in found)
    runs: Runs = []
    for row in range(len(key_order)):
        batch = slice(row, row + 1) if len(key_order) > 1 else slice(0, sizes.batch)
        steps = tuple(_steps(query_order[row], begins[row], ends[row], chunk, rows))
        by_position = (torch.empty_like(query_order[row]).scatter_(0, query_order[row], each[row]) for each in (begins, ends))
        diagonal = sum(step.n_rows * (step.until - step.before) for step in steps)
        runs.append((Places(batch, key_order[row], *by_position), StatePlan(steps, counts_of(form, sizes, diagonal))))
    return runs


def _steps(order: torch.Tensor, begins: torch.Tensor, ends: torch.Tensor, chunk: int, rows: int) -> Iterator[Step]:
    """Of one row of the batch; order, begins, ends [Nq]: as `Intervals` has them. Queries that see no key are in none.

    chunk: keys of shorter segments in a step. rows: queries of a longer one.
    """
    seeing = ends > begins
    order, begins, ends = order[seeing], begins[seeing], ends[seeing]
    starts, counts = torch.unique_consecutive(begins, return_counts=True)
    first, at, gathered = 0, 0, 0
    for start, count in zip(starts.tolist(), counts.tolist(), strict=True):
        n_keys = int(ends[at + count - 1]) - start
        if at > first and gathered + n_keys > chunk:
            yield _together(order, begins, ends, first, at)
            first, gathered = at, 0
        at, gathered = at + count, gathered + n_keys
        if n_keys > chunk:
            for row in range(first, at, rows):
                last = min(row + rows, at) - 1
                yield Step(order[row : last + 1], int(ends[row]), int(ends[last]), start)
            first, gathered = at, 0
    if at > first:
        yield _together(order, begins, ends, first, at)


def _together(order: torch.Tensor, begins: torch.Tensor, ends: torch.Tensor, first: int, stop: int) -> Step:
    """Whole segments, pair by pair."""
    start = int(begins[first])
    return Step(order[first:stop], start, int(ends[stop - 1]), start)
