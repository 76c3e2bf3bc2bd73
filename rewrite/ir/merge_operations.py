"""Tokens of a grid merged by likeness and taken apart again (ToMe for Stable Diffusion, Bolya and Hoffman 2023)."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional

from rewrite.ir.plain_operations import Axes, PlainOperation


@dataclass(frozen=True)
class TokenMatch(PlainOperation):
    """Which tokens of a grid are most like which: tokens [B, prefix + h*w, C] -> [B, h*w, 2] int64, without a gradient.

    Each cell of stride = (rows, columns) has one destination; what is left over at the right and the bottom has none. All other tokens are
    sources, and each is matched to the destination of the greatest cosine. Entry [..., 0] is the number of a token's destination (a
    destination's own), counted in raster order; entry [..., 1] the rank of a source's match, 0 for the closest, and -1 for a destination.
    Destinations lie at random in their cells, the same in every call with the same seed; seed None, and an odd number of rows in the batch
    as in the published code, puts them at the top left.
    """

    operands: ClassVar[tuple[str, ...]] = ("tokens",)

    tokens: str
    grid: tuple[int, int]
    stride: tuple[int, int]
    seed: int | None
    prefix: int = 0

    @property
    def destinations(self) -> int:
        return (self.grid[0] // self.stride[0]) * (self.grid[1] // self.stride[1])

    def places(self, batch: int) -> list[int]:
        """The destinations' positions on the grid, ascending."""
        (height, width), (down, across) = self.grid, self.stride
        drawn = None if self.seed is None or batch % 2 else random.Random(self.seed)
        places = []
        for row in range(height // down):
            for column in range(width // across):
                below, beside = (0, 0) if drawn is None else divmod(drawn.randrange(down * across), across)
                places.append((row * down + below) * width + column * across + beside)
        return sorted(places)

    def compute(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        tokens = tensors["tokens"].detach()[:, self.prefix :]
        tokens = functional.normalize(tokens.to(torch.promote_types(tokens.dtype, torch.float32)), dim=-1)
        batch, count = tokens.shape[0], math.prod(self.grid)
        places = self.places(int(batch))
        taken = set(places)
        target = torch.tensor(places, device=tokens.device)
        source = torch.tensor([token for token in range(count) if token not in taken], dtype=torch.int64, device=tokens.device)
        closest = (tokens[:, source] @ tokens[:, target].transpose(-2, -1)).max(-1)
        order = closest.values.argsort(dim=-1, descending=True, stable=True)
        rank = order.argsort(dim=-1)
        match = torch.full((batch, count, 2), -1, dtype=torch.int64, device=tokens.device)
        match[:, target, 0] = torch.arange(len(places), device=tokens.device)
        match[:, source] = torch.stack([closest.indices, rank], dim=-1)
        return match

    def axes(self, given: Mapping[str, Axes]) -> Axes:
        return Axes(1, math.prod(self.grid), 2)

    def cost(self, given: Mapping[str, Axes]) -> int:
        return (math.prod(self.grid) - self.destinations) * self.destinations * given["tokens"].width


def _merged_numbers(match: torch.Tensor, removed: int, destinations: int) -> torch.Tensor:
    """[B, N]: which merged token each token is part of: sources that are left by rank, then destinations."""
    place, rank = match.unbind(-1)
    return torch.where(rank >= removed, rank - removed, match.shape[1] - destinations - removed + place)


@dataclass(frozen=True)
class MergeTokens(PlainOperation):
    """The `removed` sources that are most like their destinations, averaged into these (destinations included).

    source [B, H, prefix + N, D], match [B, N, 2] of a `TokenMatch` with so many `destinations` -> [B, H, prefix + N - removed, D]; prefix
    tokens stay in front, or are left out.
    """

    operands: ClassVar[tuple[str, ...]] = ("source", "match")

    source: str
    match: str
    removed: int
    destinations: int
    prefix: int = 0
    keeps_prefix: bool = True

    def compute(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        source, match = tensors["source"], tensors["match"]
        tokens = source[:, :, self.prefix :].to(torch.promote_types(source.dtype, torch.float32))
        batch, heads, count, width = tokens.shape
        number = _merged_numbers(match, self.removed, self.destinations)[:, None, :, None]
        total = tokens.new_zeros(batch, heads, count - self.removed, width).scatter_add(2, number.expand_as(tokens), tokens)
        parts = tokens.new_zeros(batch, 1, count - self.removed, 1).scatter_add(2, number, tokens.new_ones(batch, 1, count, 1))
        merged = (total / parts).to(source.dtype)
        return torch.cat([source[:, :, : self.prefix], merged], dim=2) if self.keeps_prefix and self.prefix else merged

    def axes(self, given: Mapping[str, Axes]) -> Axes:
        left = given["source"].tokens - self.removed
        return given["source"]._replace(tokens=left if self.keeps_prefix else left - self.prefix)


@dataclass(frozen=True)
class UnmergeTokens(PlainOperation):
    """What `MergeTokens` merged gets what its destination has: source [B, H, prefix + N - removed, D] -> [B, H, prefix + N, D]."""

    operands: ClassVar[tuple[str, ...]] = ("source", "match")

    source: str
    match: str
    removed: int
    destinations: int
    prefix: int = 0

    def compute(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        source, match = tensors["source"], tensors["match"]
        number = _merged_numbers(match, self.removed, self.destinations)[:, None, :, None]
        tokens = source[:, :, self.prefix :].gather(2, number.expand(-1, source.shape[1], -1, source.shape[3]))
        return torch.cat([source[:, :, : self.prefix], tokens], dim=2) if self.prefix else tokens

    def axes(self, given: Mapping[str, Axes]) -> Axes:
        return given["source"]._replace(tokens=given["source"].tokens + self.removed)


@dataclass(frozen=True)
class Shortcut(PlainOperation):
    """output [B, H, N, D] plus a share of the values value [B, Hkv, N, D]."""

    operands: ClassVar[tuple[str, ...]] = ("output", "value")

    output: str
    value: str
    share: float

    def compute(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        output, value = tensors["output"], tensors["value"]
        return output + self.share * value.repeat_interleave(output.shape[1] // value.shape[1], dim=1)

    def axes(self, given: Mapping[str, Axes]) -> Axes:
        return given["output"]
