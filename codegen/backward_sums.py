"""Where the backward kernels leave the gradients of tensors, and what is summed of them afterwards.

A tensor may be read by query, by key or by pair, and by batch and head or not, and any of its axes may be of size 1: which one is known at
the launch. By query and by key there is one number per batch, head and position, small beside the gradients of queries and keys. By pair
there would be one per batch and head; so what batches or heads share is summed in place, launch by launch, as far as memory asks for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

import torch

from rewrite.ir.errors import RewriteError
from rewrite.ir.semantics import aligned

# By pair, a cell is written once, or, where batches or heads share it, in turns.
Way = Literal["", "rows", "keys", "pairs", "turns"]

# Partial sums of a tensor by pair may take this many times the tensor, or as much as query, key and value together: whichever is more.
COPIES = 4

# Rows of cells are a multiple of this long, so that they are written 16 bytes at a time whatever the number of keys.
ROW_MULTIPLE = 16


@dataclass
class GradientSum:
    """The gradient of one tensor. way: how it is read, "" if it is not wanted. every_b, every_h: batches and heads that share a cell.

    buffer: what the kernels write, contiguous: [B, H, Nq] for "rows", [B, H, Nk] for "keys", [B / every_b, H / every_h, Nq, stride_i] by
    pair, of which the first Nk columns count.
    """

    operand: torch.Tensor
    axes: str | None
    way: Way
    buffer: torch.Tensor
    every_b: int = 1
    every_h: int = 1
    stride_i: int = 0
    n_keys: int = 0

    def result(self) -> torch.Tensor:
        """Shaped and typed as the operand."""
        whole = aligned(self.operand, self.axes or "").shape
        match self.way:
            case "rows":
                wide = self.buffer[..., None]
            case "keys":
                wide = self.buffer[..., None, :]
            case _:
                wide = self.buffer[..., : self.n_keys]
        summed = [axis for axis in range(4) if whole[axis] == 1 and wide.shape[axis] != 1]
        return (wide.sum(summed) if summed else wide).reshape(self.operand.shape).to(self.operand.dtype).contiguous()


class GradientSums:
    """One `GradientSum` per tensor, by position. turns_b, turns_h: batches and heads that are taken in turns."""

    def __init__(
        self,
        operands: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        tensors: Sequence[torch.Tensor],
        read_at: Sequence[str | None],
        wanted: Sequence[int],
        visits_all: bool,
    ) -> None:
        """operands: query, key, value. read_at: the letters of each tensor's axes, None where it gives no gradient. wanted: positions.

        visits_all: whether the kernels visit every pair; else cells that nobody visits are zero from the start.
        Raises `RewriteError` for a wanted tensor that gives none.
        """
        query, key, _ = operands
        self.sizes = {"b": query.shape[0], "h": query.shape[1], "i": query.shape[2], "j": key.shape[2]}
        self.wanted = wanted
        if any(read_at[position] is None for position in wanted):
            raise RewriteError("a gradient was asked for that these kernels do not give; codegen.has_triton_backward says which")
        ways = [self._way(tensor, axes) if n in wanted else "" for n, (tensor, axes) in enumerate(zip(tensors, read_at, strict=True))]
        by_pair = [aligned(tensor, axes or "") for tensor, axes, way in zip(tensors, read_at, ways, strict=True) if way == "pairs"]
        self.turns_b, self.turns_h = self._fewest_turns(by_pair, sum(operand.numel() for operand in operands))
        self._sums = [self._sum(*each, visits_all) for each in zip(tensors, read_at, ways, strict=True)]

    def _way(self, tensor: torch.Tensor, axes: str | None) -> Way:
        whole = {axis for axis, size in zip(axes or "", tensor.shape, strict=True) if size == self.sizes[axis]}
        return "pairs" if {"i", "j"} <= whole else "keys" if "j" in whole else "rows"

    def _cells(self, whole: torch.Tensor, turns: tuple[int, int]) -> tuple[int, int]:
        """(copies over batches, over heads) of a tensor [1 or B, 1 or H, Nq, Nk] for turns of so many batches and heads."""
        return tuple(  # type: ignore[return-value]
            -(-self.sizes[axis] // turn) if size == 1 else size for axis, size, turn in zip("bh", whole.shape[:2], turns, strict=True)
        )

    def _fewest_turns(self, by_pair: Sequence[torch.Tensor], elements: int) -> tuple[int, int]:
        """The fewest turns, doubling, at which no tensor takes more memory than it may."""
        turns = [1, 1]
        for place, axis in enumerate("bh"):
            while turns[place] < self.sizes[axis] and any(
                whole.shape[place] == 1 and self._too_large(whole, (turns[0], turns[1]), elements) for whole in by_pair
            ):
                turns[place] *= 2
        return min(turns[0], self.sizes["b"]), min(turns[1], self.sizes["h"])

    def _too_large(self, whole: torch.Tensor, turns: tuple[int, int], elements: int) -> bool:
        batches, heads = self._cells(whole, turns)
        return batches * heads * whole.shape[2] * whole.shape[3] > max(COPIES * whole.numel(), elements)

    def _sum(self, tensor: torch.Tensor, axes: str | None, way: Way, visits_all: bool) -> GradientSum:
        b, h, i, j = self.sizes.values()
        if way != "pairs":
            buffer = tensor if way == "" else torch.empty(b, h, i if way == "rows" else j, dtype=torch.float32, device=tensor.device)
            return GradientSum(tensor, axes, way, buffer)
        whole, pitch = aligned(tensor, axes or ""), -(-j // ROW_MULTIPLE) * ROW_MULTIPLE
        turns = (self.turns_b, self.turns_h)
        every_b, every_h = (turn if size == 1 else 1 for size, turn in zip(whole.shape[:2], turns, strict=True))
        copies = self._cells(whole, turns)
        # A cell that is written once, and summed with no other, needs no more digits than the tensor has.
        dtype = tensor.dtype if copies == whole.shape[:2] and every_b == every_h == 1 else torch.float32
        make = torch.empty if visits_all else torch.zeros
        buffer = make(*copies, i, pitch, dtype=dtype, device=tensor.device)
        return GradientSum(tensor, axes, "pairs" if every_b == every_h == 1 else "turns", buffer, every_b, every_h, pitch, j)

    def __getitem__(self, position: int) -> GradientSum:
        return self._sums[position]

    def turns(self) -> Iterator[tuple[int, int, int, int]]:
        """(turns_b, turns_h, turn_b, turn_h) of every launch, in order."""
        for turn_b, turn_h in product(range(self.turns_b), range(self.turns_h)):
            yield self.turns_b, self.turns_h, turn_b, turn_h

    def results(self) -> list[torch.Tensor]:
        """The gradients of the wanted tensors, in order."""
        return [self._sums[position].result() for position in self.wanted]
