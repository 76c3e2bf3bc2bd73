"""Tile sizes by head dim: how many queries and keys a program works on at once.

The rows are by the bytes of one key row, since shared memory holds whole rows: 128 bytes is head dim 64 in bfloat16 or 32 in float32.
Three limits shape them. A query tile's accumulator (fp32) and the score tile must fit the registers
without spilling, 255 per thread. Keys and values in flight must fit 99 KiB of shared memory, what sm_86 and sm_89 give a block (sm_80
gives 163, sm_90 227). And within both, the more queries per tile, the fewer times keys and values are read.
"""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """Queries and keys per tile, warps per program, and tiles of keys and values in flight."""

    block_q: int
    block_k: int
    warps: int
    stages: int


# Bytes per key row (rounded up to a power of two) -> tile.
_TILES: dict[int, Tile] = {
    128: Tile(128, 64, 8, 3),  # eight warps: with four, a neighbourhood mask spills
    256: Tile(128, 32, 8, 3),  # 64 keys spill on sm_80
    512: Tile(64, 32, 4, 2),
    1024: Tile(32, 16, 4, 2),  # float32 at head dim 256, without tensor cores
}

# tl.dot wants at least 16 in every direction.
SMALLEST_BLOCK = 16


def power_of_two(size: int) -> int:
    """The width a head is padded to: the next power of two, at least what a tensor core takes."""
    return max(SMALLEST_BLOCK, 1 << (size - 1).bit_length())


def tile_for(head_dim: int, value_dim: int, element_size: int, n_queries: int | None = None) -> Tile:
    """The tile for a head dim, a value dim and bytes per element.

    n_queries: where there are fewer queries than the tile is high (decoding), it is lowered to the next power of two.
    """
    width = max(128, power_of_two(max(head_dim, value_dim)) * element_size)
    tile = _TILES[min(width, max(_TILES))]
    return tile if n_queries is None else tile._replace(block_q=min(tile.block_q, power_of_two(n_queries)))
