"""Rotary positions on a grid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional

from rewrite.ir.plain_operations import Axes, PlainOperation

# The slowest frequency is one over this, the fastest one.
BASE = 10_000.0


@dataclass(frozen=True)
class GridRotation(PlainOperation):
    """Queries or keys rotated by where they lie on a grid (RALA, Fan et al. 2025): source [B, H, prefix + h*w, D] -> likewise.

    Neighbouring channels are a pair. The first half of them turns with the row and the second with the column, the D / 4 pairs of a half
    by angles of 10000^-linspace(0, 1) a step. Prefix tokens stay as they are. D is a multiple of 4.
    """

    operands: ClassVar[tuple[str, ...]] = ("source",)

    source: str
    grid: tuple[int, int]
    prefix: int = 0

    def compute(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        source = tensors["source"]
        dtype, pairs = torch.promote_types(source.dtype, torch.float32), source.shape[-1] // 4
        step = BASE ** -torch.linspace(0, 1, pairs, dtype=dtype, device=source.device)
        rows, columns = (torch.arange(length, dtype=dtype, device=source.device)[:, None] * step for length in self.grid)
        angles = torch.cat([rows[:, None].expand(*self.grid, -1), columns.expand(*self.grid, -1)], dim=-1).flatten(0, 1)
        angles = functional.pad(angles, (0, 0, self.prefix, 0))
        real, imaginary = source.to(dtype).reshape(*source.shape[:-1], -1, 2).unbind(-1)
        cos, sin = angles.cos(), angles.sin()
        return torch.stack([real * cos - imaginary * sin, imaginary * cos + real * sin], dim=-1).flatten(-2).to(source.dtype)

    def axes(self, given: Mapping[str, Axes]) -> Axes:
        return given["source"]
