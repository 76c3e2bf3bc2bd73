"""Rendered scenes and their descriptions: a few things of which one is the largest, on a cluttered background; the same for a seed.

Scene number `index` of a split is drawn from a generator seeded by both, so that any scene can be made again by itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from .backgrounds import background
from .names import COLOURS, DIGITS, PLACES, SHAPES, TEXTURES
from .shapes import coordinates, digit_images, digit_mask, shape_mask

SIZE = 112
# Pixels across. The largest thing of a scene is a LARGE one, alone; the others are smaller, down to two patches of 8 pixels.
LARGE, MEDIUM = (34, 54), (15, 26)
# Of a small thing: shapes can be told at fewer pixels than digits.
SMALL_SHAPE, SMALL_DIGIT = (11, 15), (14, 16)
MOST_OTHERS = 5
# Textures can be told from this many pixels on.
TEXTURED = 20
SEEDS = {"train": 1, "validation": 2, "test": 3}


@dataclass(frozen=True)
class Thing:
    """One thing: its centre and diameter in pixels, its turn in radians. drawing: which of the digit's pictures; 0 for shapes."""

    kind: str
    colour: str
    texture: str
    x: float
    y: float
    size: float
    angle: float = 0.0
    drawing: int = 0

    @property
    def place(self) -> str:
        row, column = (min(2, int(3 * at / SIZE)) for at in (self.y, self.x))
        return PLACES[row][column]


@dataclass(frozen=True)
class Scene:
    """Things from the back to the front; the largest is the main one. `seed` draws the background and the shades."""

    things: tuple[Thing, ...]
    seed: tuple[int, ...]
    held_out: bool

    @property
    def main(self) -> Thing:
        return max(self.things, key=lambda thing: thing.size)


@dataclass(frozen=True)
class Rendered:
    """image [SIZE, SIZE, 3] uint8; owner [SIZE, SIZE] int8: the number of the thing that each pixel shows, -1 for the background."""

    image: np.ndarray
    owner: np.ndarray


def scene(split: str, index: int) -> Scene:
    """The scene of that number. Validation and test have backgrounds and digits that training never sees."""
    seed = (SEEDS[split], index)
    random = np.random.default_rng(seed)
    held_out = split != "train"
    while True:
        sizes = [LARGE] + [MEDIUM if random.random() < 0.5 else None for _ in range(int(random.integers(1, MOST_OTHERS + 1)))]
        things = [_thing(random, size, held_out) for size in sizes]
        placed = _placed(random, things)
        if placed is not None:
            order = random.permutation(len(placed))
            return Scene(tuple(placed[number] for number in order), seed, held_out)


def _thing(random: np.random.Generator, sizes: tuple[int, int] | None, held_out: bool) -> Thing:
    """A thing not placed yet; sizes None is a small one."""
    shape = random.random() < 0.55
    kind = (SHAPES if shape else DIGITS)[random.integers(len(SHAPES if shape else DIGITS))]
    low, high = sizes or (SMALL_SHAPE if shape else SMALL_DIGIT)
    size = random.uniform(low, high)
    colour = list(COLOURS)[random.integers(len(COLOURS))]
    texture = TEXTURES[random.integers(len(TEXTURES))] if shape and size >= TEXTURED else "plain"
    drawing = 0 if shape else int(random.integers(len(digit_images(held_out)[kind])))
    return Thing(kind, colour, texture, 0, 0, size, random.uniform(-0.26, 0.26), drawing)


def _placed(random: np.random.Generator, things: list[Thing]) -> list[Thing] | None:
    """The things where they overlap by a little at most; None where no place was found."""
    placed: list[Thing] = []
    for thing in things:
        margin = thing.size / 2 + 1
        for x, y in random.uniform(margin, SIZE - margin, (20, 2)):
            # Centres as far apart as the radii, less an eighth of the smaller diameter.
            if all(math.hypot(x - o.x, y - o.y) > (thing.size + o.size) / 2 - min(thing.size, o.size) / 8 for o in placed):
                placed.append(replace(thing, x=float(x), y=float(y)))
                break
        else:
            return None
    return placed


def render(shown: Scene) -> Rendered:
    """The picture of a scene, and which thing each pixel shows."""
    random = np.random.default_rng((*shown.seed, 1))
    image = background(random, SIZE, shown.held_out)
    owner = np.full((SIZE, SIZE), -1, np.int8)
    for number, thing in enumerate(shown.things):
        paint(image, owner, number, thing, random, shown.held_out)
    image += np.float32(0.015) * random.standard_normal(image.shape, dtype=np.float32)
    return Rendered((np.clip(image, 0, 1) * 255).astype(np.uint8), owner)


def paint(image: np.ndarray, owner: np.ndarray, number: int, thing: Thing, random: np.random.Generator, held_out: bool) -> None:
    """One thing on top of what is there; image [H, W, 3] in 0 .. 1 and owner [H, W] are changed."""
    if thing.kind in DIGITS:
        inside, around = digit_mask(digit_images(held_out)[thing.kind][thing.drawing], thing.size, thing.angle)
    else:
        inside, around = shape_mask(thing.kind, thing.size, thing.angle)
    colour = np.clip(np.array(COLOURS[thing.colour]) + random.uniform(-0.04, 0.04, 3), 0, 1).astype(np.float32)
    # An edge of the other brightness, so that no background hides a thing.
    edge = np.float32(0.0 if colour.mean() > 0.35 else 0.75)
    side = len(inside)
    top, left = round(thing.y) - side // 2, round(thing.x) - side // 2
    (y0, y1), (x0, x1) = ((max(0, at), min(len(owner), at + side)) for at in (top, left))
    cut = (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left))
    inside, around = inside[cut][..., None], around[cut][..., None]
    filled = colour * (1 - _pattern(thing)[cut][..., None] * np.float32(0.55)) if thing.texture != "plain" else colour
    if thing.texture != "plain" and thing.colour == "black":
        filled = colour + _pattern(thing)[cut][..., None] * np.float32(0.4)
    part = image[y0:y1, x0:x1]
    part += (around * np.float32(0.7)) * (edge - part)
    part += inside * (filled - part)
    owner[y0:y1, x0:x1][inside[..., 0] > 0.5] = number


def _pattern(thing: Thing) -> np.ndarray:
    """Where a texture is darker, [side, side] in 0 .. 1."""
    x, y = coordinates(thing.size, thing.angle)
    # A period of 7 pixels at least, or a third of the thing.
    waves = math.pi * thing.size / max(7.0, thing.size / 3)
    if thing.texture == "striped":
        return (np.sin(waves * (x + y) * 0.7) > 0).astype(np.float32)
    return ((np.sin(waves * x) * np.sin(waves * y)) > 0.35).astype(np.float32)
