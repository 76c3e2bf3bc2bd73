"""How the keys of a few tiles of queries are shared out, so that a device is busy whatever there is to decode.

Sanovar et al. 2024, "LeanAttention" (after the stream-K products of Osama et al. 2023): the key blocks of all tiles, laid end to end, form
one run, and each program walks over an equal share of it. A share may begin within one tile and end within another; what a program knows of
a tile is a partial maximum, sum and accumulator, and the associative rule of the online softmax joins those in the order of the run:

    m = max_p m_p,    l = sum_p exp(m_p - m) l_p,    a = sum_p exp(m_p - m) a_p.

Neighbours in the run differ in their program or in their tile, so that (program + tile) counts them: that is where a partial result lies,
and neither a table nor an atomic is needed. Shares follow from sizes alone; where a list says which blocks a tile visits, from its length.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from codegen.block_list import block_list
from codegen.group_walks import shared_weights
from rewrite.ir.operations import Attend

# A partial result, written and read again in float32, moves about as many bytes as this many blocks of keys and values (128 queries, blocks
# of 64 keys, one head dim): a program with less to do does not pay for it.
LEAST_BLOCKS = 4
# Tiles per multiprocessor from which they are left whole: the last of three turns is a third of the work at most, and there are as many
# partial results as tiles.
MOST_TURNS = 2
# Accumulators of a program, one for each weight that groups of keys may have: with 16 queries three fit the registers.
MOST_WEIGHTS = 3


def reason_against_split(attend: Attend) -> str | None:
    """Why the keys of a tile stay with one program, in words, or None."""
    weights = 1 if attend.groups is None else len(shared_weights(attend.groups))
    if not 1 <= weights <= MOST_WEIGHTS:
        return f"its groups have {weights} weights other than 0, and a program has accumulators for 1 to {MOST_WEIGHTS}"
    return None


class Owners(NamedTuple):
    """tiles: [visits] int32, the block of queries that makes each visit of a `BlockList`. longest: visits of the one that makes most."""

    tiles: torch.Tensor
    longest: int


@lru_cache(maxsize=128)
def list_owners(static: str, n_queries: int, n_keys: int, block: tuple[int, int], device: torch.device) -> Owners:
    """Who makes the visits of the block list with these arguments. Cached."""
    starts = block_list(static, n_queries, n_keys, block, torch.device("cpu")).starts
    counts = starts[2::2] - starts[:-2:2]
    tiles = torch.arange(len(counts), dtype=torch.int32).repeat_interleave(counts)
    return Owners(tiles.to(device), int(counts.max()))


@lru_cache(maxsize=16)
def multiprocessors(device: torch.device) -> int:
    """Of a CUDA device; 1 anywhere else."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def units_for(tiles: int, total: int, longest: int, device: torch.device) -> int:
    """Programs that share a run of `total` key blocks, or 0 where every tile is better left whole.

    tiles: blocks of queries, of all heads. longest: key blocks of the tile that has most. Left whole, tiles take turns on the
    multiprocessors, and a turn takes as long as its longest tile.
    """
    processors = multiprocessors(device)
    units = min(processors, total // LEAST_BLOCKS)
    if units < 2 or tiles > MOST_TURNS * processors:
        return 0
    return units if -(-total // units) + LEAST_BLOCKS <= -(-tiles // processors) * longest else 0


def partial_results(places: int, kinds: int, rows: int, *width: int, device: torch.device) -> torch.Tensor:
    """What programs leave of rows or of accumulators: [places, kinds, rows] or [places, kinds, rows, width] float32, not initialised."""
    return torch.empty(places, kinds, rows, *width, dtype=torch.float32, device=device)
