"""Tokens of one grid on another."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional

from rewrite.ir.plain_operations import Axes, PlainOperation


@dataclass(frozen=True)
class GridResize(PlainOperation):
    """Tokens interpolated to another grid, bilinearly (align_corners=False): source [B, H, h*w, D] -> [B, H, h'*w', D]."""

    operands: ClassVar[tuple[str, ...]] = ("source",)

    source: str
    grid: tuple[int, int]
    size: tuple[int, int]

    def compute(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        source = tensors["source"]
        batch, heads, _, width = source.shape
        image = source.transpose(-2, -1).reshape(batch, heads * width, *self.grid)
        resized = functional.interpolate(image, size=self.size, mode="bilinear", align_corners=False)
        return resized.reshape(batch, heads, width, -1).transpose(-2, -1)

    def axes(self, given: Mapping[str, Axes]) -> Axes:
        return given["source"]._replace(tokens=math.prod(self.size))
