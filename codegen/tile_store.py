"""Tiles that were chosen by timing, on disk beside the emitted kernels: one small JSON file for each choice.

An entry is data and never run. It counts only where it says the very key that is asked for and tiles that could have been chosen; anything
else (half a file, another version's, one put there by hand) is as good as none, and is written anew.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from codegen.cache import cache_directory, content_hash, write_whole
from codegen.tiles import Tile


@dataclass(frozen=True)
class TileKey:
    """What a choice of tiles holds for.

    kernel: its name. code: hash of its source, sites and passes left out. triton: its version. device: its name. capability: 90 for sm_90.
    dtypes: of query and of the operation's tensors. precision: of products (`codegen.launching.dot_precision`). head_dim, value_dim.
    shared: query heads per key head. rows: batch times heads, n_queries, n_keys: each rounded up to a power of two. wanted: positions of
    the tensors whose gradients are computed, of a backward.
    """

    kernel: str
    code: str
    triton: str
    device: str
    capability: int
    dtypes: tuple[str, ...]
    precision: str
    head_dim: int
    value_dim: int
    shared: int
    rows: int
    n_queries: int
    n_keys: int
    wanted: tuple[int, ...] = ()

    def facts(self) -> dict[str, object]:
        """As JSON has it."""
        return {name: list(fact) if isinstance(fact, tuple) else fact for name, fact in dataclasses.asdict(self).items()}

    @property
    def path(self) -> Path:
        return cache_directory() / f"{self.kernel}_{content_hash(json.dumps(self.facts(), sort_keys=True))}.tiles.json"


def read(key: TileKey, allowed: Sequence[Sequence[Tile]]) -> tuple[Tile, ...] | None:
    """The stored choice, or None. allowed: for each kernel of the launch the tiles that may have been chosen."""
    try:
        said = json.loads(key.path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(said, dict) or said.get("key") != key.facts() or not isinstance(said.get("tiles"), list):
        return None
    tiles = said["tiles"]
    if len(tiles) != len(allowed) or any(chosen not in map(list, choices) for chosen, choices in zip(tiles, allowed, strict=True)):
        return None
    return tuple(Tile(*map(int, chosen)) for chosen in tiles)


def publish(key: TileKey, tiles: Sequence[Tile], times: Mapping[str, float], allowed: Sequence[Sequence[Tile]]) -> tuple[Tile, ...]:
    """Store a choice and return the one that holds: where another process was first, it is that process's.

    times: milliseconds by what was timed, for whoever reads the file.
    """
    text = json.dumps({"key": key.facts(), "tiles": tiles, "milliseconds": times}, indent=1)
    write_whole(key.path, text, over=False)
    stored = read(key, allowed)
    if stored is None:
        write_whole(key.path, text, over=True)
    return stored or tuple(tiles)
