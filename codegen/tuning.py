"""Tiles chosen by timing on the device, for whoever asks for it; by default the table of `codegen.tiles` alone decides.

The tuner times the table's tile and its neighbours (`codegen.tile_candidates`) on the operands of a launch, once for each kernel, device
and bucket of sizes, and keeps the winner on disk (`codegen.tile_store`). At one tile a kernel gives the same results to the last bit; at
another its sums run in another order.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from types import TracebackType
from typing import Any, ClassVar, NamedTuple

import torch

from codegen.compilation import CompiledKernel
from codegen.tile_candidates import neighbours
from codegen.tile_store import TileKey, publish, read
from codegen.tiles import Tile
from rewrite.ir.errors import RewriteError

VARIABLE = "REWRITE_AUTOTUNE"
_WORDS = {"1": True, "true": True, "on": True, "0": False, "false": False, "off": False, "": False}

# Timings of one kernel differ by about this much from run to run: less is no reason to leave the table.
LEAST_GAIN = 0.02
# Milliseconds of warming up and of timing for each candidate: a few hundred runs of a kernel that takes 0.1 ms.
_WARM_UP, _TIMED = 10, 40


class Autotuning:
    """The switch behind `rewrite.autotune`: sets at construction, and as a context manager sets back."""

    _asked: ClassVar[bool | None] = None

    def __init__(self, enabled: bool = True) -> None:
        self._before = Autotuning._asked
        Autotuning._asked = bool(enabled)

    def __enter__(self) -> Autotuning:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        Autotuning._asked = self._before

    @classmethod
    def is_on(cls) -> bool:
        """Whether tiles are chosen by timing. Raises `RewriteError` where REWRITE_AUTOTUNE is neither on nor off."""
        if cls._asked is not None:
            return cls._asked
        said = os.environ.get(VARIABLE, "")
        if said.lower() not in _WORDS:
            raise RewriteError(f"{VARIABLE}={said!r} is neither on nor off; set it to 1 or 0")
        return _WORDS[said.lower()]


class DeviceFacts(NamedTuple):
    """name: of the device. capability: 90 for sm_90. shared_memory: bytes that a program may have."""

    name: str
    capability: int
    shared_memory: int


@lru_cache(maxsize=16)
def cuda_facts(index: int) -> DeviceFacts:
    from triton.runtime import driver

    major, minor = torch.cuda.get_device_capability(index)
    limit = driver.active.utils.get_device_properties(index)["max_shared_mem"]
    return DeviceFacts(torch.cuda.get_device_name(index), 10 * major + minor, limit)


def _facts(device: torch.device) -> DeviceFacts:
    return cuda_facts(torch.cuda.current_device() if device.index is None else device.index)


def _median_milliseconds(run: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return float(do_bench(run, warmup=_WARM_UP, rep=_TIMED, return_mode="median"))


def _is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


@dataclass(frozen=True)
class Launch:
    """What the tuner is to know of one launch.

    key: see `TileKey`. shared_memory: bytes that a program may have. table: the table's tile of each of its kernels. run: launches them
    with given tiles; compiled: one of them (by its place) ahead of time, at a tile.
    """

    key: TileKey
    shared_memory: int
    table: tuple[Tile, ...]
    run: Callable[[tuple[Tile, ...]], Any]
    compiled: Callable[[int, Tile], CompiledKernel]


@dataclass
class Tuner:
    """One process's choices. facts: of a device; timer: milliseconds of a call; capturing: whether a CUDA graph is being captured."""

    facts: Callable[[torch.device], DeviceFacts] = _facts
    timer: Callable[[Callable[[], object]], float] = _median_milliseconds
    capturing: Callable[[], bool] = _is_capturing
    _chosen: dict[TileKey, tuple[Tile, ...]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def tiles(self, launch: Launch) -> tuple[Tile, ...]:
        """The tiles to launch with: chosen before, by this process or another, or now; the table's where now is no time for it."""
        chosen = self._chosen.get(launch.key)
        if chosen is not None:
            return chosen
        with self._lock:
            chosen = self._chosen.get(launch.key)
            if chosen is None:
                allowed = [neighbours(tile, launch.key.n_queries, launch.key.n_keys) for tile in launch.table]
                chosen = read(launch.key, allowed)
                if chosen is None:
                    if self.capturing():
                        return launch.table
                    chosen, times = self._search(launch, allowed)
                    chosen = publish(launch.key, chosen, times, allowed)
                self._chosen[launch.key] = chosen
            return chosen

    def _search(self, launch: Launch, allowed: Sequence[Sequence[Tile]]) -> tuple[tuple[Tile, ...], dict[str, float]]:
        """The best tiles, one kernel of the launch after the other, and the milliseconds of everything that was timed."""
        from triton import OutOfResources

        best = launch.table
        fastest = self.timer(partial(launch.run, best))
        times = {_said(best): fastest}
        for place, candidates in enumerate(allowed):
            start = best
            for tile in candidates:
                tiles = (*start[:place], tile, *start[place + 1 :])
                if _said(tiles) in times or not _fits(launch, place, tile):
                    continue
                try:
                    taken = self.timer(partial(launch.run, tiles))
                except OutOfResources:  # a launch is compiled for the alignment of its operands, and may take more than ahead of time
                    continue
                times[_said(tiles)] = taken
                if taken < fastest * (1 - LEAST_GAIN):
                    best, fastest = tiles, taken
        return best, times


def _said(tiles: Sequence[Tile]) -> str:
    """``128x64 8 warps 3 stages``, joined by " + "."""
    return " + ".join(f"{tile.block_q}x{tile.block_k} {tile.warps} warps {tile.stages} stages" for tile in tiles)


def _fits(launch: Launch, place: int, tile: Tile) -> bool:
    """Whether the kernel compiles at a tile, without spills and within the device's shared memory."""
    from triton.errors import TritonError

    try:
        compiled = launch.compiled(place, tile)
    except (TritonError, RuntimeError):  # what the compiler cannot take is no candidate; its passes fail with a RuntimeError
        return False
    return compiled.spills == 0 and compiled.shared_memory <= launch.shared_memory


TUNER = Tuner()
