"""Visits of a mask that the data decide, without the keys that it leaves to nobody: on the CPU, where asking the data is free.

What of the keys may be seen is known tile by tile (`codegen.tile_masks`), in one batch and head or another: packed sequences, spans and
blocks take the time of what they see and not of all pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import sympy
import torch
from torch.nn import functional

from codegen.tile_masks import split_tiles, tile_mask
from codegen.visits import COST_OF_A_BLOCK, COST_OF_A_KEY, Visit, as_slice, best_plan, visits
from rewrite.ir.operations import Attend

# Queries and keys that are asked about at once: the fewest queries that a visit has, and keys that take a cache line of float32 or so.
TILE = (16, 32)

# Fewer pairs than this take some 2 ms in all, and asking would take a tenth of that.
LEAST_PAIRS = 1 << 16


class SeenKeys:
    """Which keys may be seen by which queries. tiles [query tiles, key tiles] bool, for tiles of ``TILE``."""

    def __init__(self, tiles: torch.Tensor) -> None:
        self.tiles = tiles

    def visits(self, static: str, lengths: tuple[int, int], candidates: Sequence[int]) -> tuple[Visit, ...]:
        """The visits for a static mask (as `codegen.visits.visits` takes it) and numbers of queries and keys, with the keys that any of
        their queries may see. candidates: how many queries a visit may have."""
        plan = best_plan(static, *lengths)
        block = min(plan.block, max(candidates)) if plan.ordered else self._best_block(candidates)
        planned = visits(static, *lengths, plan._replace(block=block), self.tiles.device)
        return tuple(visit for each in planned if (visit := self._narrowed(each)) is not None)

    def _best_block(self, candidates: Sequence[int]) -> int:
        """With the least estimated cost, as `codegen.visits.best_plan` estimates it."""

        def cost(block: int) -> int:
            size = min(block // TILE[0], len(self.tiles))
            groups = functional.pad(self.tiles, (0, 0, 0, -len(self.tiles) % size)).view(-1, size, self.tiles.shape[1]).any(1)
            return int(groups.sum()) * TILE[1] * (size * TILE[0] + COST_OF_A_KEY) + int(groups.any(1).sum()) * COST_OF_A_BLOCK

        return min(candidates, key=cost)

    def _narrowed(self, visit: Visit) -> Visit | None:
        """None where it has no key left."""
        device = self.tiles.device
        rows = torch.zeros(len(self.tiles), dtype=torch.bool, device=device)
        rows[visit.query_positions(device) // TILE[0]] = True
        columns = visit.key_positions(device)
        kept = self.tiles[rows].any(0)[columns // TILE[1]]
        if bool(kept.all()):
            return visit
        if not bool(kept.any()):
            return None
        return Visit(visit.rows, as_slice(columns[kept], device), None if visit.seen is None else visit.seen[:, kept])


def seen_keys(attend: Attend, query: torch.Tensor, key: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> SeenKeys | None:
    """None where the mask says nothing by the tile, or asking takes too long: on a device, and where there are few pairs."""
    split, sizes = split_tiles(attend), (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    if split.by_tile == sympy.true or query.device.type != "cpu" or 0 in sizes or sizes[2] * sizes[3] < LEAST_PAIRS:
        return None
    may = tile_mask(sympy.And(split.by_position, split.by_tile), tensors, sizes, TILE, query.device).may.flatten(0, 1).any(0)
    return SeenKeys(may.expand(-(-sizes[2] // TILE[0]), -(-sizes[3] // TILE[1])))
