"""What scenes are made of, as tables: the kinds of things, their colours, their textures and the places of the picture."""

from __future__ import annotations

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "crescent")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
KINDS = SHAPES + DIGITS

# RGB in 0 .. 1, of the middle of what is drawn: each thing varies by a few hundredths.
COLOURS = {
    "red": (0.86, 0.12, 0.12),
    "green": (0.13, 0.62, 0.18),
    "blue": (0.15, 0.25, 0.88),
    "yellow": (0.95, 0.87, 0.12),
    "purple": (0.58, 0.15, 0.68),
    "cyan": (0.20, 0.84, 0.88),
    "white": (0.97, 0.97, 0.97),
    "black": (0.05, 0.05, 0.05),
}

# Of shapes; digits are plain.
TEXTURES = ("plain", "striped", "dotted")

# [row][column] of the picture in thirds.
PLACES = (
    ("top-left", "top", "top-right"),
    ("left", "middle", "right"),
    ("bottom-left", "bottom", "bottom-right"),
)
