"""Dense labels of a scene: per pixel the kind of what is there, and per patch kind, colour and texture."""

from __future__ import annotations

import numpy as np

from .names import COLOURS, KINDS, TEXTURES
from .scenes import SIZE, Rendered, Scene

PATCH = 8
GRID = SIZE // PATCH
BACKGROUND = 0
# Pixels of a patch that a thing has to cover to be what the patch shows: an eighth of its 64.
COVERED = 8


def pixel_kinds(shown: Scene, rendered: Rendered) -> np.ndarray:
    """[SIZE, SIZE] int64: 0 for the background, and 1 more than the kind's number in KINDS."""
    table = np.array([BACKGROUND, *(KINDS.index(thing.kind) + 1 for thing in shown.things)])
    return table[rendered.owner.astype(np.int64) + 1]


def patch_owners(rendered: Rendered, number: int) -> np.ndarray:
    """[GRID, GRID] int64: of `number` things the one that each patch shows most of, or -1."""
    patches = rendered.owner.reshape(GRID, PATCH, GRID, PATCH).transpose(0, 2, 1, 3).reshape(GRID, GRID, -1)
    counts = (patches[..., None] == np.arange(number, dtype=np.int8)).sum(2)
    return np.where(counts.max(-1) >= COVERED, counts.argmax(-1), -1)


def patch_labels(shown: Scene, rendered: Rendered) -> np.ndarray:
    """[3, GRID, GRID] int64: kind, colour and texture of what each patch shows, each 0 for the background and 1 more than its number."""
    names = [(BACKGROUND, BACKGROUND, BACKGROUND)]
    for thing in shown.things:
        names.append((KINDS.index(thing.kind) + 1, list(COLOURS).index(thing.colour) + 1, TEXTURES.index(thing.texture) + 1))
    return np.array(names).T[:, patch_owners(rendered, len(shown.things)) + 1]
