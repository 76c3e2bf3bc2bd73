"""Graph breaks in words: why Dynamo ended a graph, and where in the user's code."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Break:
    """Why a graph ended, and the place in the model's code: file:line."""

    reason: str
    where: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


def break_of(reason: Any) -> Break | None:
    """A `GraphCompileReason` of Dynamo's in short; None where the graph ended because the traced function did."""
    if reason is None or not reason.graph_break:
        return None
    lines = [line.strip() for line in str(reason.reason).splitlines() if line.strip()]
    explained = next((line.removeprefix("Explanation: ") for line in lines if line.startswith("Explanation: ")), None)
    frame = reason.user_stack[-1] if reason.user_stack else None
    where = f"{_short(frame.filename)}:{frame.lineno}" if frame is not None else "an unknown place"
    return Break(explained or (lines[0] if lines else "unknown"), where)


@contextlib.contextmanager
def collected_breaks() -> Iterator[list[Break]]:
    """The breaks that captures meet meanwhile, each once, in the list when the context ends."""
    reasons = torch._dynamo.utils.graph_break_reasons
    before, found = len(reasons), list[Break]()
    try:
        yield found
    finally:
        told = (break_of(reason) for reason in reasons[before:])
        found += dict.fromkeys(one for one in told if one is not None)


def _short(path: str) -> str:
    """A file's path without where packages are installed, or where the user works."""
    _, installed, inside = path.rpartition(f"site-packages{os.sep}")
    if installed:
        return inside
    relative = os.path.relpath(path)
    return path if relative.startswith(os.pardir) else relative
