"""Tiles chosen by timing: what is timed, what wins and how it is kept. Timer and device are made up. That launches take the choice is in
test_interpreter."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import attention_forms as forms
import pytest
import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode

from codegen import Autotuning
from codegen.compilation import CompiledKernel
from codegen.tile_candidates import neighbours
from codegen.tiles import Tile
from codegen.tuned_launch import attention_launch
from codegen.tuning import LEAST_GAIN, DeviceFacts, Tuner
from rewrite import autotune
from rewrite.ir import RewriteError

H100 = DeviceFacts("a device", 90, 227 * 1024)
TABLE, OTHER = Tile(128, 64, 8, 3), Tile(64, 64, 4, 3)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    chosen = tmp_path / "kernels"
    monkeypatch.setenv("REWRITE_CACHE_DIR", str(chosen))
    return chosen


def made(tile: Tile, spills: int = 0, shared: int = 1024) -> CompiledKernel:
    return CompiledKernel("sm_90", torch.float16, 64, 128, spills, shared, str(tile), b"")


class Timed:
    """A launch that takes as long as `times` says of its tiles, and 10 ms at others; what was timed is kept."""

    def __init__(self, times: dict[tuple[Tile, ...], float], tables: tuple[Tile, ...] = (TABLE,), **key: Any) -> None:
        self.times, self.now, self.seen = times, tables, list[tuple[Tile, ...]]()
        operand = torch.empty(1, 2, 200, 64, dtype=torch.float16)
        known = attention_launch(forms.plain().to_json(), (operand,) * 3, (), (operand, operand), H100)
        self.launch = replace(known, key=replace(known.key, **key), table=tables, run=self.run, compiled=self.compiled)

    def run(self, tiles: tuple[Tile, ...]) -> None:
        self.now = tiles

    def compiled(self, place: int, tile: Tile) -> CompiledKernel:
        return made(tile)

    def timer(self, run: Callable[[], object]) -> float:
        run()
        self.seen.append(self.now)
        return self.times.get(self.now, 10.0)

    def tiles(self, **options: Any) -> tuple[Tile, ...]:
        """As a process of its own chooses."""
        return Tuner(lambda device: H100, self.timer, **options).tiles(self.launch)


def test_neighbours_differ_in_one_thing_and_fit_the_sizes() -> None:
    found = neighbours(TABLE, 4096, 4096)
    assert found[0] == TABLE
    assert OTHER in found
    assert TABLE._replace(block_k=128) in found
    assert len(set(found)) == len(found) > 5
    for tile in found[1:]:
        changed = {name for name in Tile._fields if getattr(tile, name) != getattr(TABLE, name)}
        assert len(changed) == 1 or changed == {"block_q", "warps"}
    # A step of decoding: the table has lowered its tile to what holds the query.
    assert {tile.block_q for tile in neighbours(Tile(16, 64, 4, 3), 1, 4096)} == {16}
    assert {tile.block_k for tile in neighbours(Tile(128, 32, 8, 3), 512, 20)} == {16, 32}


def test_the_fastest_wins_and_the_table_where_nothing_gains() -> None:
    first = Timed({(TABLE,): 1.0, (OTHER,): 0.5, (TABLE._replace(stages=2),): 0.7})
    assert first.tiles() == (OTHER,)
    assert set(first.seen) == {(tile,) for tile in neighbours(TABLE, 256, 256)}
    close = Timed({(TABLE,): 1.0, (OTHER,): 1.0 - 0.9 * LEAST_GAIN}, head_dim=32)
    assert close.tiles() == (TABLE,)


def test_every_kernel_of_a_launch_is_chosen_in_turn() -> None:
    keys = Tile(32, 128, 8, 2)
    best = keys._replace(block_q=16)
    pair = Timed({(TABLE, keys): 3.0, (OTHER, keys): 2.0, (OTHER, best): 1.0, (TABLE, best): 0.1}, (TABLE, keys))
    assert pair.tiles() == (OTHER, best)
    assert (TABLE, best) not in pair.seen


def test_what_spills_or_does_not_fit_or_compile_is_not_timed() -> None:
    timed = Timed({(TABLE,): 1.0})
    wide, deep, few = TABLE._replace(block_k=128), TABLE._replace(stages=4), TABLE._replace(warps=4)

    def compiled(place: int, tile: Tile) -> CompiledKernel:
        if tile == few:
            raise RuntimeError("PassManager::run failed")
        return made(tile, spills=8 if tile == wide else 0, shared=H100.shared_memory + (tile == deep))

    def run(tiles: tuple[Tile, ...]) -> None:
        if tiles == (OTHER,):
            raise triton.OutOfResources(300_000, H100.shared_memory, "shared memory")
        timed.run(tiles)

    timed.launch = replace(timed.launch, compiled=compiled, run=run)
    timed.times[(OTHER,)] = 0.1
    assert timed.tiles() == (TABLE,)
    assert not {(wide,), (deep,), (few,), (OTHER,)} & set(timed.seen)
    assert len(timed.seen) > 2


def test_a_choice_is_kept_and_what_is_no_entry_is_made_anew(folder: Path) -> None:
    assert Timed({(OTHER,): 1.0}).tiles() == (OTHER,)
    (path,) = folder.glob("*.tiles.json")
    kept = path.read_text()
    again = Timed({(TABLE,): 1.0})
    assert again.tiles() == (OTHER,)
    assert not again.seen
    entry = json.loads(kept)
    strange = [
        *("", "{", "[]", "null", kept[:-20], "[" * 100_000),
        json.dumps(entry | {"key": entry["key"] | {"device": "another"}}),
        *(json.dumps(entry | {"tiles": tiles}) for tiles in ([], [[256, 256, 8, 3]], [[64, 64, 4]], [list(OTHER)] * 2, "x", [["64"] * 4])),
    ]
    for text in strange:
        path.write_text(text)
        fresh = Timed({(OTHER,): 1.0})
        assert fresh.tiles() == (OTHER,), text
        assert fresh.seen, text
        assert json.loads(path.read_text())["tiles"] == [list(OTHER)]
    path.write_bytes(b"\xff\xfe")
    assert Timed({(OTHER,): 1.0}).tiles() == (OTHER,)
    assert not [each for each in folder.iterdir() if each.suffix == ".tmp"]


def test_a_choice_holds_for_its_key_alone(folder: Path) -> None:
    Timed({}).tiles()
    fact: dict[str, Any] = {"code": "0" * 16, "triton": "3.0.0", "device": "another", "capability": 80, "dtypes": ("bfloat16",)}
    fact |= {"precision": "ieee", "head_dim": 80, "shared": 4, "rows": 64, "n_queries": 16, "n_keys": 4096, "wanted": (0,)}
    for name, value in fact.items():
        assert Timed({}, **{name: value}).launch.key != Timed({}).launch.key
        other = Timed({}, **{name: value})
        other.tiles()
        assert other.seen, name
    assert len(list(folder.glob("*.tiles.json"))) == 1 + len(fact)

    def key(batch: int, n_queries: int, n_keys: int, sites: tuple[str, ...] = ()) -> object:
        forms_json = forms.causal().to_json()
        query, other = (torch.empty(batch, 4, n, 64, dtype=torch.float16) for n in (n_queries, n_keys))
        return attention_launch(forms_json, (query, other, other), (), (query, query), H100).key

    assert key(3, 130, 250) == key(4, 256, 256) != key(5, 256, 256)
    assert key(4, 256, 256) != key(4, 257, 256)


def test_of_two_at_once_one_choice_holds(folder: Path) -> None:
    """Each process prefers another tile, and both have timed before either writes."""
    for round_ in range(10):
        barrier = threading.Barrier(2)

        def choose(tile: Tile, round_: int = round_, barrier: threading.Barrier = barrier) -> tuple[Tile, ...]:
            timed = Timed({(tile,): 1.0}, head_dim=round_)
            last = neighbours(TABLE, 256, 256)[-1]

            def timer(run: Callable[[], object]) -> float:
                taken = timed.timer(run)
                if timed.seen[-1] == (last,):
                    barrier.wait(10)
                return taken

            return Tuner(lambda device: H100, timer).tiles(timed.launch)

        with ThreadPoolExecutor(2) as pool:
            one, other = pool.map(choose, (OTHER, TABLE._replace(stages=2)))
        assert one == other
    assert len(list(folder.glob("*.tiles.json"))) == 10


def test_nothing_is_timed_while_a_graph_is_captured(folder: Path) -> None:
    timed, capturing = Timed({(OTHER,): 1.0}), [True]
    tuner = Tuner(lambda device: H100, timed.timer, lambda: capturing[0])
    assert tuner.tiles(timed.launch) == (TABLE,)
    assert not timed.seen
    assert not list(folder.glob("*.tiles.json"))
    capturing[0] = False
    assert tuner.tiles(timed.launch) == (OTHER,)
    capturing[0] = True
    assert tuner.tiles(timed.launch) == (OTHER,)


def test_nothing_is_timed_under_fake_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("codegen.tuning.TUNER.timer", lambda run: pytest.fail("timed"))
    with autotune(), FakeTensorMode():
        operand = torch.empty(1, 2, 8, 16, device="cuda", dtype=torch.float16)
        out, _ = torch.ops.rewrite.attend(operand, operand, operand, [], forms.plain().to_json())
    assert out.shape == operand.shape


def test_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REWRITE_AUTOTUNE", raising=False)
    assert not Autotuning.is_on()
    with autotune():
        assert Autotuning.is_on()
        with autotune(False):
            assert not Autotuning.is_on()
        assert Autotuning.is_on()
    assert not Autotuning.is_on()
    monkeypatch.setenv("REWRITE_AUTOTUNE", "1")
    assert Autotuning.is_on()
    with autotune(False):
        assert not Autotuning.is_on()
    monkeypatch.setenv("REWRITE_AUTOTUNE", "maybe")
    with pytest.raises(RewriteError, match=r"REWRITE_AUTOTUNE='maybe'.*1 or 0"):
        Autotuning.is_on()


def test_candidates_are_what_compiles() -> None:
    """For one small kernel, really compiled: everything that is timed compiles without spills and within the limit, and little is left."""
    operand = torch.empty(1, 1, 16, 16, dtype=torch.float16)
    known = attention_launch(forms.plain().to_json(), (operand,) * 3, (), (operand, operand), H100)
    seen: list[tuple[Tile, ...]] = []
    ahead: dict[Tile, CompiledKernel] = {}

    def compiled(place: int, tile: Tile) -> CompiledKernel:
        ahead[tile] = known.compiled(place, tile)
        return ahead[tile]

    launch = replace(known, run=seen.append, compiled=compiled)
    tuner = Tuner(lambda device: H100, lambda run: [run(), 1.0][1], lambda: False)
    assert tuner.tiles(launch) == launch.table
    assert len(seen) > 3
    assert all(ahead[tile].spills == 0 < ahead[tile].shared_memory <= H100.shared_memory for (tile,) in seen[1:])
    assert all(ahead[tile].target == "sm_90" for (tile,) in seen[1:])
    # A device with no shared memory to speak of has no candidate but the table's own.
    little = Tuner(lambda device: H100, lambda run: [run(), 1.0][1], lambda: False)
    seen.clear()
    little.tiles(replace(launch, shared_memory=0, key=replace(launch.key, device="little")))
    assert seen == [launch.table]
