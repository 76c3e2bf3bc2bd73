"""Tiles and chunks of the kernels that carry a state."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from codegen.contraction_order import best_chunk
from codegen.split_keys import LEAST_BLOCKS, multiprocessors
from codegen.tiles import power_of_two
from rewrite.ir.errors import RewriteError


class StateTile(NamedTuple):
    """Queries, keys and columns of a state per tile, warps per program, tiles in flight. chunk: queries per chunk, None for the best."""

    block_q: int
    block_k: int
    block_v: int
    warps: int
    stages: int
    chunk: int | None = None


# Head width (rounded up to a power of two) -> tile, for float16 and bfloat16. A state's columns are cut so that its rows fit the registers.
_HALF: dict[int, StateTile] = {
    64: StateTile(64, 64, 64, 8, 2),  # with four warps, features of several terms spill
    128: StateTile(64, 64, 64, 8, 2),
    256: StateTile(32, 32, 32, 8, 1),
}
# The same where a tile of queries goes through the chunks in which their keys end (`codegen.interval_kernel`): the walk in a walk takes
# registers, and Hopper's products of 64 rows more of them.
_INTERVALS: dict[int, StateTile] = {
    64: StateTile(32, 64, 64, 8, 1),
    128: StateTile(32, 64, 64, 8, 2),
    256: StateTile(16, 32, 16, 8, 1),
}
# The same for float32, multiplied without tensor cores unless TF32 was allowed.
_SINGLE: dict[int, StateTile] = {
    64: StateTile(32, 32, 32, 8, 1),
    128: StateTile(16, 16, 32, 8, 1),
    256: StateTile(16, 16, 16, 8, 1),
}

# Entries of a state that a program carries over the chunks.
CARRIED = 1024
# In multiply-adds: an entry of a chunk's state is written, read, written and read again, sixteen bytes, while a device that does 500
# products a nanosecond and moves 3.3 bytes in it would have done 2400.
COST_OF_AN_ENTRY = 2400
# A chunk is walked over by tiles, and its longest walk should not keep a device waiting.
LARGEST_CHUNK = 256


def state_tile(head_dim: int, value_dim: int, element_size: int, intervals: bool = False) -> StateTile:
    """The tile for a head dim, a value dim and bytes per element; intervals: of the kernels for these."""
    half = _INTERVALS if intervals else _HALF
    table, width = half if element_size == 2 else _SINGLE, max(64, power_of_two(head_dim))
    if width not in table:
        raise RewriteError(f"no tile for head dim {head_dim}: kernels that carry a state go up to {max(table)}")
    tile = table[width]
    return tile._replace(block_v=min(tile.block_v, power_of_two(value_dim)))


def device_chunk(features: int, columns: int, tile: StateTile) -> int:
    """Queries per chunk: where the cost is least, as a power of two that tiles divide."""
    if tile.chunk is not None:
        return tile.chunk
    best = best_chunk(features, columns, COST_OF_AN_ENTRY * features * columns)
    return max(tile.block_q, tile.block_k, min(LARGEST_CHUNK, 1 << round(math.log2(best))))


def piece_of_keys(heads: int, n_keys: int, tile: StateTile, device: torch.device) -> int:
    """Keys that a program sums into a state of its own: as many pieces as fill the device."""
    if tile.chunk is not None:
        return tile.chunk
    blocks = max(1, -(-n_keys // tile.block_k))
    pieces = max(1, min(multiprocessors(device) // max(1, heads), blocks // LEAST_BLOCKS))
    return -(-blocks // pieces) * tile.block_k
