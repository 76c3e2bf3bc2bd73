"""Pictures as models take them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

# Of every model here, as its preprocessor_config.json says: 0 .. 255 becomes -1 .. 1.
MEAN = STD = 0.5


def pixel_values(images: Sequence[np.ndarray] | np.ndarray) -> torch.Tensor:
    """uint8 pictures [..., H, W, 3] as float32 [..., 3, H, W] in -1 .. 1."""
    stacked = torch.from_numpy(np.ascontiguousarray(np.asarray(images))).float()
    return (stacked / 255 - MEAN).div_(STD).movedim(-1, -3).contiguous()
