"""Exponentials are taken in base 2: of scores times log2(e)."""

from __future__ import annotations

import math

LOG2_E = math.log2(math.e)
