"""Block lists of masks that the data decide, made on the device: which blocks of keys a block of queries visits, and the other way round.

The lists are those of `codegen.block_list`, one for each batch and head that sees something else. Their length is bounded by the number of
tiles, and how much of it is used stands in a tensor: nothing is asked of the device, and another choice or other lengths of the sequences
run the same kernel.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

import torch

from codegen.block_list import listed_blocks
from codegen.tile_masks import tile_mask
from rewrite.ir.expression import from_json

# Floating operations of an attention that takes as long as making its list: some 30 small operators of 5 us each, against 2e14 a second,
# half of what an H100 multiplies in bfloat16. No device was measured; below this a kernel looks at every tile instead.
LEAST_WORK = 30e9


class TileList(NamedTuple):
    """Block q of batch b and head h visits what a `codegen.block_list.BlockList` says, starts being read from ``b * per_b + h * per_h`` on.

    per_b, per_h: 0 where every batch, every head visits the same.
    """

    starts: torch.Tensor
    blocks: torch.Tensor
    per_b: int
    per_h: int


Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def tile_list(predicate: str, tensors: Mapping[str, torch.Tensor], operands: Operands, block: tuple[int, int]) -> TileList:
    """The key blocks of every block of queries, for blocks of ``block = (queries, keys)``.

    predicate: what `codegen.tile_masks.tile_mask` takes, as JSON text. operands: query, key, value.
    """
    tiles = (-(-operands[0].shape[2] // block[0]), -(-operands[1].shape[2] // block[1]))
    # With one block of queries there is little to choose from, and decoding has no time for it.
    if tiles[0] == 1 or not is_worth_a_list(operands):
        return _every_tile(*tiles, operands[0].device)
    may, full = _known(predicate, tensors, operands, block)
    if operands[1].shape[2] % block[1]:
        full = torch.cat([full[..., :-1], torch.zeros_like(full[..., -1:])], -1)
    return _listed(full, may & ~full)


def transposed_tile_list(predicate: str, tensors: Mapping[str, torch.Tensor], operands: Operands, block: tuple[int, int]) -> TileList:
    """As `tile_list`, for blocks of keys: which blocks of queries see them, in full, and cut by the mask or the end of the queries."""
    tiles = (-(-operands[1].shape[2] // block[1]), -(-operands[0].shape[2] // block[0]))
    if tiles[0] == 1 or not is_worth_a_list(operands):
        return _every_tile(*tiles, operands[0].device)
    may, full = (known.transpose(2, 3) for known in _known(predicate, tensors, operands, block))
    if operands[0].shape[2] % block[0]:
        full = torch.cat([full[..., :-1], torch.zeros_like(full[..., -1:])], -1)
    return _listed(full, may & ~full)


def is_worth_a_list(operands: Operands) -> bool:
    """Whether an attention of query, key and value takes longer than its list: `LEAST_WORK`."""
    query, key, value = operands
    batch, heads, n_queries, width = query.shape
    return 2 * batch * heads * n_queries * key.shape[2] * (width + value.shape[3]) >= LEAST_WORK


def _known(
    predicate: str, tensors: Mapping[str, torch.Tensor], operands: Operands, block: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(may, must) with all their tiles, [B or 1, H or 1, query tiles, key tiles]."""
    query, key, _ = operands
    sizes = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    known = tile_mask(from_json(json.loads(predicate)), tensors, sizes, block, query.device)
    may, must = (each.expand(*each.shape[:2], -(-sizes[2] // block[0]), -(-sizes[3] // block[1])) for each in known)
    may, must = torch.broadcast_tensors(may, must)  # type: ignore[no-untyped-call]
    return may, must


def _listed(full: torch.Tensor, cut: torch.Tensor) -> TileList:
    """The list of what is seen in full and cut, each [B or 1, H or 1, owners, walked] bool."""
    batch, heads, owners, walked = full.shape
    kinds = torch.stack([full, cut], 3)
    chosen = kinds.flatten()
    place = chosen.cumsum(0, dtype=torch.int32)
    starts = torch.cat([place.new_zeros(1), place.view(-1, walked)[:, -1]])
    # What is not chosen goes to one place behind all.
    target = torch.where(chosen, place - 1, chosen.numel()).long()
    numbers = torch.arange(walked, dtype=torch.int32, device=full.device).expand(kinds.shape).flatten()
    blocks = numbers.new_zeros(chosen.numel() + 1).scatter_(0, target, numbers)
    return TileList(starts, blocks, 2 * owners * heads if batch > 1 else 0, 2 * owners if heads > 1 else 0)


@lru_cache(maxsize=128)
def _every_tile(owners: int, walked: int, device: torch.device) -> TileList:
    """Every tile, each to be looked at pair by pair."""
    none, every = torch.zeros(walked, dtype=torch.bool), torch.ones(walked, dtype=torch.bool)
    return TileList(*listed_blocks([(none, every)] * owners, device), 0, 0)
