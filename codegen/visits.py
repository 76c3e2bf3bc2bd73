"""What the torch lowering visits: blocks of queries, each with the keys that any of them sees.

The finer the blocks, the fewer keys are visited in vain; the coarser, the fewer calls and copies. The block size with the least
estimated cost is taken, from the static mask alone.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from codegen.masks import visible_rows

# Block sizes considered: below 32 queries a matrix product no longer amortises its keys, above 256 the score block leaves the cache.
CANDIDATES = (32, 64, 128, 256)

# Costs in pairs (query, key), measured on 2 CPU cores with 12 heads of 64: a pair takes 30 ns, copying a key and a value 1 us, the calls
# for a block 100 us.
COST_OF_A_KEY = 32
COST_OF_A_BLOCK = 4000


class Visit(NamedTuple):
    """A block of queries and its keys.

    rows: the queries. columns: the keys that any of them sees, a slice where they are consecutive, else positions [n] int64.
    seen: which of them each query sees [rows, columns] bool, or None if every query sees all.
    """

    rows: slice
    columns: slice | torch.Tensor
    seen: torch.Tensor | None

    def keys(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        """The tensor at the visited keys; an axis of size 1 is left as it is."""
        if tensor.shape[axis] == 1:
            return tensor
        if isinstance(self.columns, slice):
            return tensor.narrow(axis, self.columns.start, self.columns.stop - self.columns.start)
        return tensor.index_select(axis, self.columns)

    def queries(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        """The tensor at the block's queries; an axis of size 1 is left as it is."""
        return tensor if tensor.shape[axis] == 1 else tensor.narrow(axis, self.rows.start, self.rows.stop - self.rows.start)

    def key_positions(self, device: torch.device) -> torch.Tensor:
        if isinstance(self.columns, slice):
            return torch.arange(self.columns.start, self.columns.stop, device=device)
        return self.columns


@lru_cache(maxsize=256)
def best_block(static: str, n_queries: int, n_keys: int) -> int:
    """The block size among `CANDIDATES` that the estimated cost is least for."""
    cost = dict.fromkeys(CANDIDATES, 0)
    for _, seen in visible_rows(static, n_queries, n_keys, max(CANDIDATES)):
        for block in CANDIDATES:
            for part in torch.split(seen, block):
                cost[block] += int(part.any(0).sum()) * (len(part) + COST_OF_A_KEY) + COST_OF_A_BLOCK
    return min(cost, key=cost.__getitem__)


def _columns(needed: torch.Tensor, device: torch.device) -> slice | torch.Tensor:
    """Positions where `needed` [n_keys] bool holds."""
    found = needed.nonzero().flatten()
    if len(found) and int(found[-1] - found[0]) == len(found) - 1:
        return slice(int(found[0]), int(found[-1]) + 1)
    return found.to(device)


@lru_cache(maxsize=128)
def visits(static: str, n_queries: int, n_keys: int, block: int, device: torch.device) -> tuple[Visit, ...]:
    """The visits for a static mask (JSON text, see `codegen.masks.static_key`), `block` queries each; queries that see no key are in none.

    Cached. Memory is one bool per pair visited, those of equal blocks shared (the inside of a window mask repeats itself).
    """
    if static == "true":
        return tuple(Visit(slice(i, min(i + block, n_queries)), slice(0, n_keys), None) for i in range(0, n_queries, block) if n_keys)
    shared: dict[tuple[torch.Size, bytes], torch.Tensor] = {}
    found: list[Visit] = []
    for first, seen in visible_rows(static, n_queries, n_keys, block):
        needed = seen.any(0)
        if not needed.any():
            continue
        part = seen[:, needed]
        rows = slice(first, first + len(seen))
        if part.all():
            found.append(Visit(rows, _columns(needed, device), None))
            continue
        key = part.shape, part.numpy().tobytes()
        if key not in shared:
            shared[key] = part.to(device)
        found.append(Visit(rows, _columns(needed, device), shared[key]))
    return tuple(found)
