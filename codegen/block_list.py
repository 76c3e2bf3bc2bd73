"""Which blocks of keys a block of queries has to visit: a static mask as a list of work.

For every block of queries, the key blocks with any visible pair are split into those seen in full, where the kernel does no mask
arithmetic, and those that the mask or the end of the keys cuts. The transposed list says the same of every block of keys: what gradients of
keys are summed over.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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


def listed_blocks(kinds: Iterable[tuple[torch.Tensor, torch.Tensor]], device: torch.device) -> BlockList:
    """The list of what is seen (in full, cut), each a row of bool per owner of a block."""
    blocks: list[torch.Tensor] = []
    starts = [0]
    for row in kinds:
        for kind in row:
            found = kind.nonzero().flatten()
            blocks.append(found)
            starts.append(starts[-1] + len(found))
    listed = torch.cat([*blocks, torch.zeros(1, dtype=torch.int64)])
    return BlockList(torch.tensor(starts, dtype=torch.int32).to(device), listed.to(torch.int32).to(device))


def _tiles(static: str, n_queries: int, n_keys: int, block: tuple[int, int], outside: bool) -> Iterator[torch.Tensor]:
    """For every block of queries what it sees, [queries, key blocks, block_k] bool; keys past the end count as `outside`."""
    block_q, block_k = block
    n_blocks = -(-n_keys // block_k)
    for _, seen in visible_rows(static, n_queries, n_keys, block_q):
        padded = functional.pad(seen, (0, n_blocks * block_k - n_keys), value=outside)
        yield padded.view(seen.shape[0], n_blocks, block_k)


@lru_cache(maxsize=128)
def block_list(static: str, n_queries: int, n_keys: int, block: tuple[int, int], device: torch.device) -> BlockList:
    """The list for a static mask (JSON text, see `codegen.masks.static_key`) on a device, for blocks of ``block = (queries, keys)``.

    Cached; the predicate is evaluated for one block of queries at a time, so that memory stays at one block of queries times n_keys.
    """
    if device.type != "cpu":
        return BlockList(*(part.to(device) for part in block_list(static, n_queries, n_keys, block, torch.device("cpu"))))
    kinds: list[tuple[torch.Tensor, torch.Tensor]] = []
    # Keys past the end count as unseen: the last block is cut unless the keys fill it.
    for tiles in _tiles(static, n_queries, n_keys, block, outside=False):
        full = tiles.all(dim=(0, 2))
        kinds.append((full, tiles.any(dim=2).any(dim=0) & ~full))
    return listed_blocks(kinds, device)


@lru_cache(maxsize=128)
def transposed_block_list(static: str, n_queries: int, n_keys: int, block: tuple[int, int], device: torch.device) -> BlockList:
    """As `block_list`, for blocks of keys: which blocks of queries see them, in full, and cut by the mask or the end of the queries.

    Cached. Beside one block of queries times n_keys, memory is two bools for each pair of blocks.
    """
    block_q, block_k = block
    full, cut = (torch.zeros(-(-n_keys // block_k), -(-n_queries // block_q), dtype=torch.bool) for _ in range(2))
    for place, tiles in enumerate(_tiles(static, n_queries, n_keys, block, outside=True)):
        # A kernel that owns keys writes nothing of those past the end, whatever it makes of them; queries past the end must add nothing.
        full[:, place] = tiles.all(dim=(0, 2)) & (tiles.shape[0] == block_q)
        inside = tiles[..., : n_keys % block_k or block_k]
        cut[:, place] = tiles.any(dim=2).any(dim=0) & ~full[:, place]
        cut[-1, place] = inside[:, -1].any() & ~full[-1, place]
    return listed_blocks(zip(full, cut, strict=True), device)
