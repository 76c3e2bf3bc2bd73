"""Which blocks of keys a block of queries has to visit: a static mask as a list of work.

For every block of queries, the key blocks with any visible pair are split into those seen in full, where the kernel does no mask
arithmetic, and those that the mask or the end of the keys cuts.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch.nn import functional

from codegen.masks import visible_rows


class BlockList(NamedTuple):
    """Query block q visits ``blocks[starts[2q] : starts[2q+1]]`` in full and ``blocks[starts[2q+1] : starts[2q+2]]`` with the mask.

    starts: [2 * number of query blocks + 1] int32. blocks: [visits] int32, at least one entry so that its address is valid.
    """

    starts: torch.Tensor
    blocks: torch.Tensor


@lru_cache(maxsize=128)
def block_list(static: str, n_queries: int, n_keys: int, block: tuple[int, int], device: torch.device) -> BlockList:
    """The list for a static mask (JSON text, see `codegen.masks.static_key`) on a device, for blocks of ``block = (queries, keys)``.

    Cached; the predicate is evaluated for one block of queries at a time, so that memory stays at one block of queries times n_keys.
    """
    block_q, block_k = block
    n_blocks = -(-n_keys // block_k)
    outside = n_blocks * block_k - n_keys
    blocks: list[torch.Tensor] = []
    starts = [0]
    for _, seen in visible_rows(static, n_queries, n_keys, block_q):
        # Keys past the end count as unseen: the last block is cut unless the keys fill it.
        tiles = functional.pad(seen, (0, outside)).view(seen.shape[0], n_blocks, block_k)
        full = tiles.all(dim=(0, 2))
        partial = tiles.any(dim=2).any(dim=0) & ~full
        for kind in (full, partial):
            found = kind.nonzero().flatten()
            blocks.append(found)
            starts.append(starts[-1] + len(found))
    listed = torch.cat([*blocks, torch.zeros(1, dtype=torch.int64)])
    return BlockList(torch.tensor(starts, dtype=torch.int32).to(device), listed.to(torch.int32).to(device))
