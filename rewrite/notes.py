"""What a KV cache does not say of itself: which of its tokens are left, and which group of keys each belongs to.

A rewritten prefill returns cache entries of fewer tokens than the model's code expects, or whose tokens were sorted into groups. The
model's own code must see the shapes it would have seen; so what the cache holds for a short entry stands in for it (`rewrite.states`), and
the rewritten graph reads the real entry behind that. Notes belong to the object that holds the entry (a cache layer), so that reordering
for beam search, which replaces the tensor, keeps them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from rewrite.ir.errors import ModelCallError

# How deep caches nest in the arguments of a call: arguments, cache, its list of layers, a layer, its tensor, and one to spare.
_DEPTH = 6


@dataclass(frozen=True)
class Note:
    """What is known of one cache entry.

    positions: [B, K] place that each token had in the full sequence, or None where none left. length: the full sequence's length.
    kept: [B, H, K, D], the entry itself where tokens left, None where the cache holds it.
    groups: [B, n] group of each of the first n tokens (later ones were generated: text, group 0), or None.
    sinks: [B, H, n] likewise, one where a token draws attention in a head, or None.
    state: [B, Hs, F, V] what stands for the keys and values, seen: [B, length] which keys it holds, or None.
    entry: heads, width and dtype that the model's code expects, where the cache holds a stand-in.
    lost: the site whose entry no later call can go on from, as the cache keeps a part of what some tokens left; or "".
    marked: the cache has a fixed length, and marks in the places of tokens that left (`rewrite.tokens.marks`).
    padded: rows keep different numbers, and in the places of padding `kept` has marks.
    """

    positions: torch.Tensor | None
    length: int
    groups: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    state: torch.Tensor | None = None
    seen: torch.Tensor | None = None
    entry: tuple[int, int, torch.dtype] | None = None
    kept: torch.Tensor | None = None
    marked: bool = False
    padded: bool = False
    lost: str = ""

    @property
    def replaced(self) -> bool:
        """Whether the cache holds a stand-in for the entry."""
        return self.kept is not None or self.state is not None

    @property
    def stored(self) -> torch.Tensor:
        """What is kept instead of the entry."""
        stored = self.kept if self.kept is not None else self.state
        assert stored is not None
        return stored


@dataclass(eq=False)
class Slot:
    """A place in a call's arguments or results that holds a tensor, and how to put another there."""

    owner: Any
    key: Any
    tensor: torch.Tensor
    put: Callable[[torch.Tensor], None] | None


def slots(value: Any) -> Iterator[Slot]:
    """Every tensor inside nested containers and plain objects (modules and tensors' own attributes are not entered)."""
    seen: set[int] = set()

    def walk(value: Any, depth: int) -> Iterator[Slot]:
        if depth > _DEPTH or id(value) in seen or isinstance(value, str | bytes | int | float | torch.nn.Module | type | None):
            return
        seen.add(id(value))
        entries: list[tuple[Any, Any]]
        writable = True
        if isinstance(value, dict):
            entries = list(value.items())
        elif isinstance(value, list):
            entries = list(enumerate(value))
        elif isinstance(value, tuple):
            entries, writable = list(enumerate(value)), False
        elif hasattr(value, "__dict__"):
            entries = list(vars(value).items())
        else:
            return
        for key, entry in entries:
            if isinstance(entry, torch.Tensor):
                yield Slot(value, key, entry, _setter(value, key) if writable else None)
            else:
                yield from walk(entry, depth + 1)

    yield from walk(value, 0)


def _setter(owner: Any, key: Any) -> Callable[[torch.Tensor], None]:
    def put(tensor: torch.Tensor) -> None:
        if isinstance(owner, dict | list):
            owner[key] = tensor
        else:
            vars(owner)[key] = tensor

    return put


@dataclass
class CacheNotes:
    """The notes of one rewritten model, by the object that holds the entry, and by the tensor where that object cannot be referred to."""

    by_owner: weakref.WeakKeyDictionary[Any, dict[Any, Note]] = field(default_factory=weakref.WeakKeyDictionary)
    by_tensor: dict[int, tuple[weakref.ref[torch.Tensor], Note]] = field(default_factory=dict)

    def write(self, results: Any, produced: list[tuple[torch.Tensor, Note]]) -> None:
        """Note what a call produced, wherever in its arguments or results the entries now lie."""
        wanted = {id(tensor): note for tensor, note in produced}
        for slot in slots(results):
            note = wanted.get(id(slot.tensor))
            if note is None:
                continue
            try:
                self.by_owner.setdefault(slot.owner, {})[slot.key] = note
            except TypeError:
                self.by_tensor[id(slot.tensor)] = (weakref.ref(slot.tensor), note)

    def of(self, slot: Slot) -> Note | None:
        """What was noted of the entry that a place held, whatever it holds now."""
        try:
            return self.by_owner.get(slot.owner, {}).get(slot.key)
        except TypeError:
            reference, known = self.by_tensor.get(id(slot.tensor), (None, None))
            return known if reference is not None and reference() is slot.tensor else None

    def read(self, slot: Slot) -> Note | None:
        """The note of a cache entry; raises `ModelCallError` where the entry is no longer the one that was noted."""
        note = self.of(slot)
        if note is None or note.replaced or slot.tensor.ndim != 4:
            return None
        batch, _, entries, _ = slot.tensor.shape
        rows = [tensor.shape[0] for tensor in (note.groups, note.sinks) if tensor is not None]
        if entries == 0:
            return None
        if entries != note.length or any(count not in (1, batch) for count in rows):
            raise ModelCallError(
                f"a KV cache entry holds {entries} tokens of {batch} sequences, but the rewritten model left {note.length} tokens of "
                f"{max(rows, default=batch)} in it; it was cropped, extended or its batch changed outside the model, which cannot be "
                "followed: start again from the prompt with a new cache"
            )
        return note

    def __deepcopy__(self, memo: dict[int, Any]) -> CacheNotes:
        return CacheNotes()

    def __reduce__(self) -> tuple[type[CacheNotes], tuple[()]]:
        return CacheNotes, ()


def storage_of(tensor: torch.Tensor) -> int:
    """What tells a stand-in from any other tensor, through views and detached copies of it."""
    return tensor.untyped_storage().data_ptr()
