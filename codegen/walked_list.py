"""The block list of an emitted kernel: what it is made from, and how the kernel and its launch are given it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property

import sympy

from codegen.kernel_reads import KernelReads
from codegen.tile_masks import split_tiles
from rewrite.ir.expression import tensors_in, to_json
from rewrite.ir.operations import Attend


@dataclass(frozen=True)
class WalkedList:
    """By position: known on the host, the same for every batch and head. By tile: made on the device, from the operation's tensors.

    Falsy where the kernel walks over everything.
    """

    attend: Attend

    @cached_property
    def by_tile(self) -> bool:
        return bool(split_tiles(self.attend).by_tile != sympy.true)

    def __bool__(self) -> bool:
        return self.by_tile or bool(split_tiles(self.attend).by_position != sympy.true)

    @property
    def operands(self) -> list[str]:
        """Pointers among the kernel's arguments."""
        return ["starts", "blocks"] if self else []

    @property
    def sizes(self) -> list[str]:
        """Numbers among the kernel's arguments."""
        return ["per_b", "per_h"] if self.by_tile else []

    @property
    def start(self) -> str:
        """Of the kernel's own list."""
        return "own_starts" if self.by_tile else "starts"

    @property
    def found(self) -> list[str]:
        """The line that finds it, once b and h are known."""
        return ["own_starts = starts + b * per_b + h * per_h"] if self.by_tile else []

    @property
    def predicate(self) -> list[str]:
        """The line of a file that has what lists are made from."""
        split = split_tiles(self.attend)
        text = json.dumps(to_json(sympy.And(split.by_position, split.by_tile)))
        if self.by_tile:
            return [f"LISTED_MASK = {text!r}  # what lists of blocks are made from on the device, as JSON"]
        return [f"STATIC_MASK = {text!r}  # its JSON form, from which block lists are made"] if self else []

    def maker(self, transposed: bool = False) -> list[str]:
        """The function of `codegen.launching` that makes it."""
        if not self:
            return []
        return [f"{'transposed_' if transposed else ''}{'tile' if self.by_tile else 'block'}_list"]

    def made(self, tile: str, reads: KernelReads, transposed: bool = False, values: bool = True) -> list[str]:
        """The line of a launch that makes it for a tile. values: whether the launch has any."""
        if not self:
            return []
        (maker,), block = self.maker(transposed), f"({tile}.block_q, {tile}.block_k)"
        if not self.by_tile:
            return [f"    starts, blocks = {maker}(STATIC_MASK, Nq, Nk, {block}, query.device)"]
        operands = f"(query, key, {'value' if values else 'key'})"
        named = ", ".join(f"{name!r}: {reads.ids[name]}" for name in tensors_in(split_tiles(self.attend).by_tile))
        return [f"    starts, blocks, per_b, per_h = {maker}(LISTED_MASK, {{{named}}}, {operands}, {block})"]
