"""Starts a vision transformer with attention that prefers what is near, which a small one learns slowly from few pictures.

Positions begin as sines and cosines of row and column (and time), and keys as the queries are, so that tokens of alike positions attend to
each other (Trockman and Kolter 2023, "Mimetic Initialization of Self-Attention Layers", find the same product in trained models).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

# Of a position's sines and cosines; patches are embedded at about the same size.
AMPLITUDE = 0.5
# Of the queries and keys: the score of a token with itself is about 4.
SCALE = 1.3


@torch.no_grad()
def start_locally(positions: torch.Tensor, grid: tuple[int, ...], attentions: list[tuple[nn.Linear, nn.Linear]]) -> None:
    """positions: the parameter [1, 1 + patches, C] of a CLS token and a grid. attentions: (query, key) projection of each layer."""
    positions[0, 1:] = _waves(grid, positions.shape[-1])
    for query, key in attentions:
        query.weight.mul_(SCALE)
        key.weight.copy_(query.weight)


def _waves(grid: tuple[int, ...], width: int) -> torch.Tensor:
    """[patches, width]: as many sines and cosines along each axis, of periods from 4 patches to 4 times the axis."""
    each = width // (2 * len(grid))
    columns = []
    for axis, length in enumerate(grid):
        periods = torch.from_numpy(np.geomspace(4, 4 * length, each))
        places = torch.arange(length).reshape([-1 if other == axis else 1 for other in range(len(grid))]).expand(grid).flatten()
        angles = 2 * torch.pi * places[:, None] / periods
        columns += [angles.sin(), angles.cos()]
    waves = torch.cat(columns, -1)
    return AMPLITUDE * nn.functional.pad(waves, (0, width - waves.shape[-1]))
