"""Patches of pictures averaged cell by cell of their grid (Matryoshka multimodal models, Cai et al. 2024), at run time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pooled_patches(patches: Tensor, grid: Sequence[int], cell: int) -> Tensor:
    """patches [pictures, P, C] of which the first of each cell x cell is the mean of the cell; the others are as they were."""
    height, width = grid
    pictures, _, channels = patches.shape
    cells = patches.reshape(pictures, height // cell, cell, width // cell, cell, channels)
    means = cells.mean((2, 4)).flatten(1, 2)
    return patches.index_copy(1, torch.tensor(_firsts(grid, cell), device=patches.device), means)


def firsts_stay(patches: Tensor, grid: Sequence[int], cell: int) -> Tensor:
    """bool [pictures, P]: the first patch of each cell."""
    stay = torch.zeros(patches.shape[:2], dtype=torch.bool, device=patches.device)
    return stay.index_fill(1, torch.tensor(_firsts(grid, cell), device=patches.device), True)


def _firsts(grid: Sequence[int], cell: int) -> list[int]:
    height, width = grid
    return [row * width + column for row in range(0, height, cell) for column in range(0, width, cell)]
