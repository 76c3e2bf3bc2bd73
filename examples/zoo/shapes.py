"""The outlines of shapes as signed distances, and scikit-learn's digits, so that either becomes a mask with smooth edges at any size.

A shape fills about the square -1 .. 1; a distance is positive inside. All arrays are float32 of one shape, that of the pixels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from .names import DIGITS

# Of the digits, those that no training sees: every fourth.
HELD_OUT = 4
# How far a mask reaches beyond the square -1 .. 1, so that a turned square has its corners.
REACH = 1.4


def _box(x: np.ndarray, y: np.ndarray, width: float, height: float) -> np.ndarray:
    return np.minimum(width - np.abs(x), height - np.abs(y))


def _disc(x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    return radius - np.hypot(x, y)


def _folded(x: np.ndarray, y: np.ndarray, points: int, inner: float) -> np.ndarray:
    """A polygon with `points` corners on the unit circle, pointing up, and as many at radius `inner` between them."""
    half = math.pi / points
    angle = np.abs((np.arctan2(x, -y) + half) % (2 * half) - half)
    radius = np.hypot(x, y)
    ax, bx, by = 1.0, inner * math.cos(half), inner * math.sin(half)
    normal = math.hypot(by, ax - bx)
    return (by * ax - by * radius * np.cos(angle) - (ax - bx) * radius * np.sin(angle)) / normal


def _heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    lobes = np.maximum(_disc(x - 0.45, y + 0.35, 0.52), _disc(x + 0.45, y + 0.35, 0.52))
    below = np.minimum((0.98 - np.abs(x) - y) * math.sqrt(0.5), y + 0.4)
    return np.maximum(lobes, np.minimum(below, 0.93 - np.abs(x)))


OUTLINES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": lambda x, y: _disc(x, y, 0.95),
    "square": lambda x, y: _box(x, y, 0.82, 0.82),
    "triangle": lambda x, y: _folded(x, y - 0.2, 3, 0.5),
    "star": lambda x, y: _folded(x, y, 5, 0.42),
    "cross": lambda x, y: np.maximum(_box(x, y, 0.92, 0.3), _box(x, y, 0.3, 0.92)),
    "ring": lambda x, y: 0.22 - np.abs(np.hypot(x, y) - 0.73),
    "heart": _heart,
    "crescent": lambda x, y: np.minimum(_disc(x, y, 0.95), -_disc(x - 0.5, y, 0.8)),
}


@functools.cache
def digit_images(held_out: bool) -> dict[str, np.ndarray]:
    """scikit-learn's handwritten digits by name, each [number, 8, 8] in 0 .. 1: those for training, or those held out."""
    found = load_digits()
    chosen = (np.arange(len(found.target)) % HELD_OUT == 0) == held_out
    return {name: (found.images[chosen & (found.target == value)] / 16).astype(np.float32) for value, name in enumerate(DIGITS)}


def coordinates(size: float, angle: float) -> tuple[np.ndarray, np.ndarray]:
    """x and y of the pixels around a thing of `size` pixels across, turned by `angle` radians; [side, side] each."""
    side = 2 * math.ceil(size / 2 * REACH) + 1
    steps = (np.arange(side, dtype=np.float32) - side // 2) * np.float32(2 / size)
    cos, sin = np.float32(math.cos(angle)), np.float32(math.sin(angle))
    return steps[None] * cos + steps[:, None] * sin, steps[:, None] * cos - steps[None] * sin


def shape_mask(kind: str, size: float, angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Coverage [side, side] in 0 .. 1 of a shape, and of the shape with an edge of a pixel around it."""
    distance = OUTLINES[kind](*coordinates(size, angle)) * (size / 2)
    return np.clip(distance + 0.5, 0, 1), np.clip(distance + 1.5, 0, 1)


def digit_mask(image: np.ndarray, size: float, angle: float) -> tuple[np.ndarray, np.ndarray]:
    """The same for a digit's picture [8, 8]."""
    side = 2 * math.ceil(size / 2 * REACH) + 1
    picture = Image.fromarray((np.pad(image, 2) * 255).astype(np.uint8))
    # Twelve pixels with the margin are 1.5 times the digit, which is drawn a little larger than its size: its ink leaves the sides empty.
    grown = round(1.5 * 1.15 * size)
    picture = picture.resize((grown, grown), Image.Resampling.BICUBIC).rotate(-math.degrees(angle), Image.Resampling.BILINEAR)
    low = (grown - side) // 2
    ink = np.asarray(picture.crop((low, low, low + side, low + side)), dtype=np.float32) / 255
    # Strokes are as strong as their middle from half of it on, and fade over a pixel or so; where there is no ink there is no edge either.
    slope = max(3.0, size / 8)
    return np.clip((ink - 0.45) * slope + 0.5, 0, 1), np.clip((ink - 0.45) * slope + 1.2, 0, 1)
