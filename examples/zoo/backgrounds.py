"""What lies behind the things of a scene: photographs that installed packages ship, gradients and noise, under a clutter of lines."""

from __future__ import annotations

import functools
from pathlib import Path

import matplotlib
import numpy as np
import skimage
from PIL import Image, ImageDraw
from sklearn.datasets import load_sample_images

# Of scikit-image's data folder, what is in colour and in the package itself.
PHOTOGRAPHS = (
    "coffee.png", "chelsea.png", "rocket.jpg", "hubble_deep_field.jpg", "ihc.png", "retina.jpg", "motorcycle_left.png", "brick.png",
    "gravel.png", "grass.png",
)  # fmt: skip
# No training sees these two.
HELD_OUT_PHOTOGRAPHS = ("astronaut.png",)
# Pixels of a photograph's shorter side: a picture shows most of it, or a part.
SIDES = (128, 256)


@functools.cache
def photographs(held_out: bool) -> tuple[np.ndarray, ...]:
    """Photographs [H, W, 3] uint8, each at two scales; for training, or held out."""
    folder = Path(skimage.__file__).parent / "data"
    found = [Image.open(folder / name) for name in (HELD_OUT_PHOTOGRAPHS if held_out else PHOTOGRAPHS)]
    if held_out:
        found.append(Image.open(Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"))
    else:
        found += [Image.fromarray(picture) for picture in load_sample_images().images]
    return tuple(np.asarray(one.convert("RGB").resize([side * to // min(one.size) for side in one.size])) for one in found for to in SIDES)


def background(random: np.random.Generator, size: int, held_out: bool) -> np.ndarray:
    """A picture [size, size, 3] in 0 .. 1, float32: half of them photographs."""
    kind = random.random()
    if kind < 0.5:
        picture = _photograph(random, size, held_out)
    elif kind < 0.75:
        corners = random.random((2, 2, 3), dtype=np.float32)
        along = np.linspace(0, 1, size, dtype=np.float32)
        rows = corners[0] + along[:, None, None] * (corners[1] - corners[0])
        picture = rows[:, :1] + along[None, :, None] * (rows[:, 1:] - rows[:, :1])
    else:
        coarse = random.integers(0, 256, (int(random.integers(3, 15)),) * 2 + (3,), dtype=np.uint8)
        picture = np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BILINEAR), dtype=np.float32) / 255
    # Less contrast than the things have.
    picture = picture * np.float32(random.uniform(0.5, 0.85)) + np.float32(random.uniform(0, 0.2))
    return _cluttered(random, picture)


def _photograph(random: np.random.Generator, size: int, held_out: bool) -> np.ndarray:
    all_of_them = photographs(held_out)
    photo = all_of_them[random.integers(len(all_of_them))]
    top, left = (int(random.integers(0, side - size + 1)) for side in photo.shape[:2])
    crop = photo[top : top + size, left : left + size]
    return (crop[:, ::-1] if random.random() < 0.5 else crop).astype(np.float32) / 255


def _cluttered(random: np.random.Generator, picture: np.ndarray) -> np.ndarray:
    """Up to eight thin lines and specks of any colour."""
    number = int(random.integers(0, 9))
    if not number:
        return picture
    size = len(picture)
    drawn = Image.fromarray((np.clip(picture, 0, 1) * 255).astype(np.uint8))
    pen = ImageDraw.Draw(drawn)
    ends, reach = random.integers(0, size, (number, 2)), random.integers(-30, 31, (number, 2))
    colours = random.integers(0, 256, (number, 3))
    for (x, y), (dx, dy), colour in zip(ends.tolist(), reach.tolist(), colours.tolist(), strict=True):
        pen.line((x, y, x + dx, y + dy), fill=tuple(colour))
    return np.asarray(drawn, dtype=np.float32) / 255
