"""What the torch lowering visits: blocks of queries, each with the keys that any of them sees.

The finer the blocks, the fewer keys are visited in vain; the coarser, the fewer calls and copies. The order and the block size with the
least estimated cost are taken, from the static mask alone.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from codegen.masks import visible_rows
from codegen.query_order import query_order

# Block sizes considered: below 32 queries a matrix product no longer amortises its keys, above 256 the score block leaves the cache.
CANDIDATES = (32, 64, 128, 256)

# Costs in pairs (query, key), measured on 2 CPU cores with 12 heads of 64: a pair takes 30 ns, copying a key and a value 1 us, the calls
# for a block 100 us.
COST_OF_A_KEY = 32
COST_OF_A_BLOCK = 4000


class Plan(NamedTuple):
    """Queries per block, and whether they are taken in the order of `codegen.query_order` instead of their own."""

    block: int
    ordered: bool = False


class Planes(NamedTuple):
    """Some of the maps of one call, which has one per batch row and head: as slices, key_heads of those that the heads read."""

    batch: slice = slice(None)
    heads: slice = slice(None)
    key_heads: slice = slice(None)


class Visit(NamedTuple):
    """A block of queries and its keys.

    rows: the queries, a slice where they are consecutive, else positions [n] int64. columns: the keys that any of them sees, likewise.
    seen: which of them each query sees [rows, columns] bool, or None if every query sees all. causal: instead of `seen`, where rows and
    columns are all there are: every query sees the keys up to its own. planes: the batch rows and heads that are visited.
    partial: the stretch of the columns, counted among them, outside of which every query sees all.
    """

    rows: slice | torch.Tensor
    columns: slice | torch.Tensor
    seen: torch.Tensor | None
    causal: bool = False
    planes: Planes = Planes()
    partial: slice = slice(None)

    @property
    def n_queries(self) -> int:
        return _length(self.rows)

    @property
    def n_keys(self) -> int:
        return _length(self.columns)

    def is_whole(self, n_queries: int, n_keys: int) -> bool:
        """Whether these are all queries and all keys."""
        return isinstance(self.rows, slice) and self.n_queries == n_queries and self.columns == slice(0, n_keys)

    @property
    def of_queries(self) -> tuple[slice, slice, slice | torch.Tensor]:
        """Where the block's queries lie in [B, H, Nq, ...]."""
        return self.planes.batch, self.planes.heads, self.rows

    @property
    def of_keys(self) -> tuple[slice, slice, slice | torch.Tensor]:
        """Where the visited keys lie in [B, Hkv, Nk, ...]."""
        return self.planes.batch, self.planes.key_heads, self.columns

    def keys(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        """[B, Hkv, ...] at the visited keys; an axis of size 1 is left as it is."""
        batch, heads, _ = self.of_keys
        return _take(_take(_take(tensor, 0, batch), 1, heads), axis, self.columns)

    def queries(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        """[B, H, ...] at the block's queries; an axis of size 1 is left as it is."""
        batch, heads, _ = self.of_queries
        return _take(_take(_take(tensor, 0, batch), 1, heads), axis, self.rows)

    def pairs(self, tensor: torch.Tensor) -> torch.Tensor:
        """[B, H, Nq, Nk] at the visited pairs; an axis of size 1 is left as it is."""
        return _take(self.queries(tensor, 2), 3, self.columns)

    def key_positions(self, device: torch.device) -> torch.Tensor:
        return _positions(self.columns, device)

    def query_positions(self, device: torch.device) -> torch.Tensor:
        return _positions(self.rows, device)


def _length(chosen: slice | torch.Tensor) -> int:
    return int(chosen.stop - chosen.start) if isinstance(chosen, slice) else len(chosen)


def _take(tensor: torch.Tensor, axis: int, chosen: slice | torch.Tensor) -> torch.Tensor:
    length = tensor.shape[axis]
    if not isinstance(chosen, slice):
        return tensor if length == 1 else tensor.index_select(axis, chosen)
    if length == 1 or chosen.start is None or (chosen.start == 0 and chosen.stop == length):
        return tensor
    return tensor.narrow(axis, chosen.start, chosen.stop - chosen.start)


def _positions(chosen: slice | torch.Tensor, device: torch.device) -> torch.Tensor:
    return torch.arange(chosen.start, chosen.stop, device=device) if isinstance(chosen, slice) else chosen


@lru_cache(maxsize=256)
def best_plan(static: str, n_queries: int, n_keys: int) -> Plan:
    """The plan with the least estimated cost for a static mask (JSON text, see `codegen.masks.static_key`)."""
    if static == "true":
        return Plan(max(CANDIDATES))
    cost: dict[Plan, int] = {}
    for order in (None, query_order(static, n_queries, n_keys)):
        for _, seen in visible_rows(static, n_queries, n_keys, max(CANDIDATES), order):
            for block in CANDIDATES:
                plan = Plan(block, order is not None)
                for part in torch.split(seen, block):
                    visited = int(part.any(0).sum()) * (len(part) + COST_OF_A_KEY) + COST_OF_A_BLOCK
                    cost[plan] = cost.get(plan, 0) + visited
    return min(cost, key=cost.__getitem__, default=Plan(max(CANDIDATES)))


def as_slice(positions: torch.Tensor, device: torch.device) -> slice | torch.Tensor:
    """Increasing positions as a slice where they are consecutive."""
    if len(positions) and bool((positions.diff() == 1).all()):
        return slice(int(positions[0]), int(positions[-1]) + 1)
    return positions.to(device)


@lru_cache(maxsize=128)
def visits(static: str, n_queries: int, n_keys: int, plan: Plan, device: torch.device) -> tuple[Visit, ...]:
    """The visits for a static mask (JSON text, see `codegen.masks.static_key`); queries that see no key are in none.

    Cached. Memory is one bool per pair visited, those of equal blocks shared (the inside of a window mask repeats itself).
    """
    block = plan.block
    if static == "true":
        return tuple(Visit(slice(i, min(i + block, n_queries)), slice(0, n_keys), None) for i in range(0, n_queries, block) if n_keys)
    shared: dict[tuple[torch.Size, bytes], torch.Tensor] = {}
    found: list[Visit] = []
    order = query_order(static, n_queries, n_keys) if plan.ordered else None
    for queries, seen in visible_rows(static, n_queries, n_keys, block, order):
        needed = seen.any(0)
        if not needed.any():
            continue
        part = seen[:, needed]
        rows, columns = as_slice(queries, device), as_slice(needed.nonzero().flatten(), device)
        if part.all():
            found.append(Visit(rows, columns, None))
            continue
        key = part.shape, part.numpy().tobytes()
        if key not in shared:
            shared[key] = part.to(device)
        some = (~part.all(0)).nonzero().flatten()
        found.append(Visit(rows, columns, shared[key], partial=slice(int(some[0]), int(some[-1]) + 1)))
    return tuple(found)
