"""Confidence intervals of shares."""

from __future__ import annotations

import math

# Standard deviations of a normal distribution that 95 % lie within.
Z = 1.959964


def wilson(share: float, number: int) -> tuple[float, float]:
    """The 95 % score interval of a share of `number` samples (Wilson 1927); inside 0 .. 1 also at its ends."""
    centre = share + Z**2 / (2 * number)
    spread = Z * math.sqrt(share * (1 - share) / number + Z**2 / (4 * number**2))
    scale = 1 + Z**2 / number
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)
