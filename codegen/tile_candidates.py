"""The tiles that are worth timing beside the table's: its row with one thing changed."""

from __future__ import annotations

from codegen.tiles import SMALLEST_BLOCK, Tile, power_of_two

# What a block may grow to: 256 queries by 64 keys still compile without spills for sm_90 at head dim 64.
LARGEST_BLOCK = 256
WARPS = (4, 8)
# In flight: one is no overlap of loading and multiplying at all, four leave no shared memory for anything.
STAGES = (1, 2, 3, 4)


def neighbours(tile: Tile, n_queries: int, n_keys: int) -> tuple[Tile, ...]:
    """The tile itself, first, and every tile that differs from it by half or twice the queries or keys, by a stage, or by the warps.

    Half or twice the queries come with half or twice the warps too, so that a warp keeps its rows. Blocks do not grow beyond the
    powers of two that hold `n_queries` and `n_keys`.
    """
    half_q, twice_q = tile.block_q // 2, tile.block_q * 2
    found = [
        *(tile._replace(block_q=size) for size in (half_q, twice_q)),
        tile._replace(block_q=half_q, warps=tile.warps // 2),
        tile._replace(block_q=twice_q, warps=tile.warps * 2),
        *(tile._replace(block_k=size) for size in (tile.block_k // 2, tile.block_k * 2)),
        *(tile._replace(warps=warps) for warps in WARPS),
        *(tile._replace(stages=tile.stages + change) for change in (-1, 1)),
    ]
    highest = max(tile.block_q, min(LARGEST_BLOCK, power_of_two(n_queries)))
    widest = max(tile.block_k, min(LARGEST_BLOCK, power_of_two(n_keys)))
    possible = [
        each
        for each in found
        if SMALLEST_BLOCK <= each.block_q <= highest
        and SMALLEST_BLOCK <= each.block_k <= widest
        and each.warps in WARPS
        and each.stages in STAGES
    ]
    return tuple(dict.fromkeys((tile, *possible)))
