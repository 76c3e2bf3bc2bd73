"""Tile sizes by architecture and head dim: how many queries and keys a program works on at once.

Three limits shape the rows. A query tile's accumulator (float32) and the score tile must fit the registers, 255 per thread, without
spilling. Keys and values in flight must fit the shared memory of a block: 99 KiB on sm_86, sm_89 and sm_120, 163 on sm_80, 227 on sm_90
and sm_100. And within both, the more queries per tile, the fewer times keys and values are read, and the more of both, the fewer
instructions for a pair. What each row uses was read off the kernels compiled for sm_80, sm_90 and sm_100;
`tests/codegen/test_compilation.py` compiles them again. `codegen.tuning` times the neighbours of a row where a user asks for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple, TypeVar

from rewrite.ir.errors import RewriteError

Crowding = Literal["none", "queries", "both"]

Row = TypeVar("Row")
Table = TypeVar("Table")


class Tile(NamedTuple):
    """Queries and keys per tile, warps per program, and tiles of keys and values in flight."""

    block_q: int
    block_k: int
    warps: int
    stages: int


# Compute capability, from which on -> head width (rounded up to a power of two) -> tile, for float16 and bfloat16.
_HALF: dict[int, dict[int, Tile]] = {
    80: {
        64: Tile(128, 64, 8, 3),  # eight warps: with four, a neighbourhood mask spills
        128: Tile(128, 32, 8, 3),  # 64 keys spill on sm_80
        256: Tile(64, 32, 8, 2),  # 128 queries spill on sm_80
    },
    # Instructions for a pair of query and key, against the tiles of sm_80: 0.79 at 64, 0.70 at 128, 0.53 at 256. sm_90 multiplies 64 rows
    # by four warps, and eight warps on 64 rows share the columns and repeat each other's work.
    90: {
        64: Tile(128, 128, 8, 3),  # with two stages, a mask by pair spills
        128: Tile(128, 64, 8, 3),  # 128 keys spill
        256: Tile(128, 32, 8, 2),  # a window spills 32 bytes, before and after the walk over keys and not in it
    },
    100: {
        64: Tile(128, 128, 8, 2),  # with three stages, groups of keys spill
        128: Tile(128, 64, 8, 3),
        256: Tile(128, 32, 8, 2),
    },
}

# The same for float32, which is multiplied without tensor cores unless TF32 was allowed: every product takes registers of its own.
_SINGLE: dict[int, Tile] = {
    64: Tile(64, 32, 8, 2),
    128: Tile(32, 32, 8, 2),
    256: Tile(16, 16, 8, 2),
}


class BackwardTiles(NamedTuple):
    """The tiles of the backward kernel whose programs own queries, and of the one whose programs own keys."""

    queries: Tile
    keys: Tile


# The backward kernels hold one accumulator or two and two score tiles. Compute capability, from which on -> head width -> tiles. On sm_90 a
# product takes 64 rows per four warps, and it is the block that a program owns that gives them: fewer, and warps share the columns and
# repeat each other's work.
_HALF_BACKWARD: dict[int, dict[int, BackwardTiles]] = {
    80: {
        64: BackwardTiles(Tile(128, 64, 8, 2), Tile(32, 128, 8, 2)),
        128: BackwardTiles(Tile(128, 32, 8, 2), Tile(32, 64, 8, 2)),  # 128 keys spill
        256: BackwardTiles(Tile(32, 32, 8, 2), Tile(32, 32, 8, 1)),
    },
    90: {
        64: BackwardTiles(Tile(128, 64, 8, 2), Tile(32, 128, 8, 2)),
        128: BackwardTiles(Tile(128, 64, 8, 2), Tile(32, 128, 8, 2)),
        256: BackwardTiles(Tile(64, 32, 8, 2), Tile(32, 32, 8, 1)),
    },
}
# With 128 keys, a sigmoid spills 24 bytes; so many take 2 to 6% fewer instructions for a pair.
_HALF_BACKWARD[100] = {**_HALF_BACKWARD[90], 64: BackwardTiles(Tile(128, 64, 8, 2), Tile(64, 64, 8, 2))}

# The same where a tile has more to hold: a tensor read by pair, the addresses of its gradient, the weights of groups.
_HALF_BACKWARD_CROWDED: dict[int, dict[int, BackwardTiles]] = {
    80: {
        64: BackwardTiles(Tile(64, 32, 8, 2), Tile(16, 128, 8, 2)),
        128: BackwardTiles(Tile(64, 32, 8, 2), Tile(16, 64, 8, 2)),
        256: BackwardTiles(Tile(32, 32, 8, 1), Tile(16, 32, 8, 1)),
    },
    90: {
        64: BackwardTiles(Tile(128, 32, 8, 2), Tile(32, 128, 8, 2)),
        128: BackwardTiles(Tile(128, 32, 8, 2), Tile(16, 128, 8, 2)),
        256: BackwardTiles(Tile(32, 32, 8, 1), Tile(16, 32, 8, 1)),
    },
}

# Keys per tile where only the kernel that owns queries is crowded: with 64, a mask of packed sequences or a sigmoid spills 8 bytes.
FEWER_KEYS = 32

_SINGLE_BACKWARD: dict[int, BackwardTiles] = {
    64: BackwardTiles(Tile(16, 32, 8, 2), Tile(32, 16, 8, 2)),
    128: BackwardTiles(Tile(32, 16, 8, 2), Tile(32, 16, 8, 2)),
    256: BackwardTiles(Tile(16, 16, 8, 2), Tile(16, 16, 8, 2)),
}

# sm_120 has no more shared memory than sm_86.
_HALF[120] = _HALF[80]
for _table in (_HALF_BACKWARD, _HALF_BACKWARD_CROWDED):
    _table[120] = _table[80]

# Scores that gather from a tensor: addresses take so many registers that the tiles of sm_90 spill up to 950 bytes, on sm_100 too, and
# three stages at 128 spill 8 on sm_80.
_HALF_GATHERED: dict[int, dict[int, Tile]] = {80: {**_HALF[80], 128: Tile(128, 32, 8, 2)}}
_HALF_GATHERED[100] = {**_HALF_GATHERED[80], 128: Tile(64, 64, 8, 2)}  # with Triton 3.7, 128 queries spill 24
_HALF_GATHERED[120] = _HALF_GATHERED[80]

# A tile of few queries has too little work for eight warps: on tensor cores a warp takes 16 of them.
FEW_QUERIES = 32
WARPS_FOR_FEW_QUERIES = 4

# tl.dot wants at least 16 in every direction.
SMALLEST_BLOCK = 16


def power_of_two(size: int) -> int:
    """The width a head is padded to: the next power of two, at least what a tensor core takes."""
    return max(SMALLEST_BLOCK, 1 << (size - 1).bit_length())


def tile_for(
    head_dim: int, value_dim: int, element_size: int, capability: int, n_queries: int | None = None, gathers: bool = False
) -> Tile:
    """The tile for a head dim, a value dim and bytes per element.

    capability: of the device, 80 for sm_80 and so on. n_queries: where there are fewer queries than the tile is high (decoding), it is
    lowered to the next power of two. gathers: whether the scores read a tensor at an expression in positions.
    """
    half = _since(_HALF_GATHERED if gathers else _HALF, capability)
    tile = _row_for(half if element_size == 2 else _SINGLE, head_dim, value_dim)
    if n_queries is None or power_of_two(n_queries) >= tile.block_q:
        return tile
    block_q = power_of_two(n_queries)
    return tile._replace(block_q=block_q, warps=WARPS_FOR_FEW_QUERIES if block_q <= FEW_QUERIES else tile.warps)


def backward_tiles(head_dim: int, value_dim: int, element_size: int, crowded: Crowding, capability: int) -> BackwardTiles:
    """The tiles of both backward kernels for a head dim, a value dim and bytes per element.

    crowded: the kernels in which a tile has more to hold than its scores. capability: of the device, 80 for sm_80 and so on.
    """
    if element_size != 2:
        return _row_for(_SINGLE_BACKWARD, head_dim, value_dim)
    tables = _HALF_BACKWARD_CROWDED if crowded == "both" else _HALF_BACKWARD
    tiles = _row_for(_since(tables, capability), head_dim, value_dim)
    if crowded != "queries":
        return tiles
    return tiles._replace(queries=tiles.queries._replace(block_k=min(tiles.queries.block_k, FEWER_KEYS)))


def _since(tables: Mapping[int, Table], capability: int) -> Table:
    """The table of the newest architecture that is not newer than the device's; the oldest for what is older than all."""
    return tables[max(first for first in tables if first <= max(capability, min(tables)))]


def _row_for(table: Mapping[int, Row], head_dim: int, value_dim: int) -> Row:
    width = max(min(table), power_of_two(max(head_dim, value_dim)))
    if width not in table:
        raise RewriteError(f"no tile for head dim {head_dim} and value dim {value_dim}: attention kernels go up to {max(table)}")
    return table[width]
