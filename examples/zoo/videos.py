"""Short clips of one thing that moves, grows, turns, appears or vanishes, beside things that stay; the same for a seed."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from .backgrounds import background
from .names import COLOURS, SHAPES
from .scenes import SEEDS, Thing, paint

FRAMES, SIDE = 8, 56
# Pixels that a thing moves over the clip, how much it grows, and how far it turns.
TRAVEL, GROWTH, TURN = (16, 26), (1.6, 2.2), (1.2, 2.2)
EVENTS = ("left", "right", "up", "down", "grows", "shrinks", "clockwise", "anticlockwise", "appears", "vanishes", "stays")
# Shapes that look another way when they are turned.
TURNED = ("triangle", "star", "cross", "heart", "crescent")


@dataclass(frozen=True)
class Clip:
    """frames: for each frame its things, from the back; event: what happens to one of them."""

    frames: tuple[tuple[Thing, ...], ...]
    event: str
    seed: tuple[int, ...]
    held_out: bool


def clip(split: str, index: int) -> Clip:
    """The clip of that number; validation and test have backgrounds that training never sees."""
    seed = (SEEDS[split], index, 1)
    random = np.random.default_rng(seed)
    event = EVENTS[random.integers(len(EVENTS))]
    others = [_thing(random, (9, 14), SHAPES) for _ in range(int(random.integers(0, 3)))]
    actor = _thing(random, (16, 22), TURNED if event.endswith("clockwise") else SHAPES)
    moments = _moments(random, event, actor)
    return Clip(tuple((*others, *([moment] if moment else [])) for moment in moments), event, seed, split != "train")


def _thing(random: np.random.Generator, sizes: tuple[int, int], kinds: tuple[str, ...]) -> Thing:
    size = random.uniform(*sizes)
    x, y = random.uniform(size / 2, SIDE - size / 2, 2)
    colour = list(COLOURS)[random.integers(len(COLOURS))]
    return Thing(kinds[random.integers(len(kinds))], colour, "plain", float(x), float(y), size, random.uniform(-0.26, 0.26))


def _moments(random: np.random.Generator, event: str, actor: Thing) -> list[Thing | None]:
    """The thing in each frame; None where it is not there."""
    steps = np.linspace(-0.5, 0.5, FRAMES).tolist()
    if event in ("left", "right", "up", "down"):
        travel = random.uniform(*TRAVEL)
        low, high = actor.size / 2 + travel / 2, SIDE - actor.size / 2 - travel / 2
        along = random.uniform(low, high) if low < high else SIDE / 2
        sign = -1 if event in ("left", "up") else 1
        axis = "x" if event in ("left", "right") else "y"
        return [replace(actor, **{axis: along + sign * travel * step}) for step in steps]
    if event in ("grows", "shrinks"):
        growth = math.log(random.uniform(*GROWTH)) * (1 if event == "grows" else -1)
        return [replace(actor, size=actor.size * math.exp(growth * step)) for step in steps]
    if event.endswith("clockwise"):
        turn = random.uniform(*TURN) * (1 if event == "clockwise" else -1)
        return [replace(actor, angle=actor.angle + turn * step) for step in steps]
    change = int(random.integers(2, FRAMES - 1))
    there = {"appears": lambda frame: frame >= change, "vanishes": lambda frame: frame < change, "stays": lambda frame: True}[event]
    return [actor if there(frame) else None for frame in range(FRAMES)]


def render_clip(shown: Clip) -> np.ndarray:
    """[FRAMES, SIDE, SIDE, 3] uint8."""
    random = np.random.default_rng((*shown.seed, 1))
    still = background(random, SIDE, shown.held_out)
    shades, images = random.integers(1 << 31), []
    for things in shown.frames:
        image, owner = still.copy(), np.full((SIDE, SIDE), -1, np.int8)
        for number, thing in enumerate(things):
            # The shade of a thing is that of the thing's number, in every frame.
            paint(image, owner, number, thing, np.random.default_rng((shades, number)), shown.held_out)
        image += np.float32(0.015) * random.standard_normal(image.shape, dtype=np.float32)
        images.append((np.clip(image, 0, 1) * 255).astype(np.uint8))
    return np.stack(images)
