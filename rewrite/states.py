"""A KV cache entry in whose place something else is kept: fewer tokens, or a state.

Where tokens left, the entry is shorter than the model's code expects; linear attention needs of all earlier keys and values nothing but
their state. What the cache object then holds for keys, and for values, is an entry of the right batch and full length that takes one number
for each row, expanded: enough for code that asks a cache how long it is, between calls too. The number is the row's own, so that whatever
moves the rows of an entry (the reordering of beam search, repeating rows for several samples) says how to move those of what is kept. The
note of what the entry stands for is an attribute of the tensor, which copies of a cache take with them; where the entry was moved, it is
that of the object that holds it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from rewrite.ir.errors import ModelCallError
from rewrite.notes import Note, slots
from rewrite.tokens.marks import unmarked

# The entry's type is one that no model computes attention in, so that an entry which comes to a model that does not know of it is an
# error in its first product, and the imaginary part tells such an entry from any other tensor.
_DTYPE, _MARK = torch.complex64, 19.0
_ATTRIBUTE = "rewrite_note"


def stand_in(note: Note) -> torch.Tensor:
    """The entry [B, 1, N, 1] for what a call left, in the place of [B, H, N, D]."""
    batch = note.stored.shape[0]
    rows = torch.arange(batch, device=note.stored.device, dtype=torch.float32)
    entry = torch.complex(rows, torch.full_like(rows, _MARK)).reshape(batch, 1, 1, 1).expand(batch, 1, note.length, 1)
    return with_note(entry, note)


def with_note(entry: torch.Tensor, note: Note) -> torch.Tensor:
    """The entry itself, with what is known of it, which its copies take along."""
    setattr(entry, _ATTRIBUTE, note)
    return entry


def note_of(entry: torch.Tensor) -> Note | None:
    """What an entry that was not moved stands for, or what is known of it."""
    found: Note | None = getattr(entry, _ATTRIBUTE, None)
    return found


def is_stand_in(tensor: torch.Tensor) -> bool:
    """Whether the tensor was made by `stand_in`, or cut or moved from one."""
    if tensor.dtype != _DTYPE or tensor.ndim != 4 or tensor.shape[1] != 1 or tensor.shape[3] != 1 or not tensor.numel():
        return False
    # Of an entry that was not moved nothing is asked of the device.
    return note_of(tensor) is not None or float(tensor.flatten()[0].imag) == _MARK


def cached_tokens(cache: Any) -> list[int]:
    """How many tokens a KV cache holds of each layer, in order; 0 where a state stands for them.

    Where tokens left, the entries say that they have the full length, which the model's code counts on. cache: an object or a sequence
    with the entries [B, H, N, D] in it, as a model returns it; of one whose rows were moved since, the full length is told. Of a cache of
    fixed length the places are counted, less those whose tokens left.
    """
    by_owner: dict[int, torch.Tensor] = {}
    for slot in slots(cache):
        if slot.tensor.ndim == 4:
            by_owner.setdefault(id(slot.owner), slot.tensor)
    notes = [(entry, note_of(entry)) for entry in by_owner.values()]
    return [_count(entry, note) for entry, note in notes]


def _count(entry: torch.Tensor, note: Note | None) -> int:
    if note is None:
        return entry.shape[2]
    if note.marked:
        return int(unmarked(entry).sum(1).max())
    return 0 if note.kept is None else note.kept.shape[2]


class Followed:
    """The notes of one call's entries as their rows lie now. Entries that shared positions go on sharing them."""

    def __init__(self) -> None:
        self._moved: dict[tuple[int, tuple[int, ...]], tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(self, entry: torch.Tensor, note: Note | None) -> Note:
        """The note of an entry; `note` is that of the object that holds it.

        Raises `ModelCallError` where the entry is not of the length that was left in it, or nothing is known of it.
        """
        own = note_of(entry)
        known = own or note
        if known is None or not known.replaced or entry.shape[2] != known.length:
            noted = None if known is None or not known.replaced else known.length
            told = "comes from another cache" if noted is None else f"was cropped or extended from {noted} tokens"
            raise ModelCallError(
                f"a KV cache entry of {entry.shape[2]} tokens {told}; it stands for a state or for fewer tokens, which cannot be "
                "cut or extended outside the model: start again from the prompt with a new cache"
            )
        if known.lost:
            raise ModelCallError(
                f"{known.lost}: its KV cache keeps the last tokens alone (a sliding window that the prompt is longer than), and some of "
                "these had left: no later call can go on from it; use prompts that the window holds, or rewrite without this pass"
            )
        if own is not None:
            return own
        rows = tuple(entry[:, 0, 0, 0].real.long().tolist())
        if rows == tuple(range(known.stored.shape[0])):
            return known
        batch = known.stored.shape[0]

        def moved(tensor: torch.Tensor | None) -> torch.Tensor | None:
            # Of one row where all rows have the same.
            return tensor if tensor is None or tensor.shape[0] != batch else self._at(tensor, rows)

        return replace(
            known,
            kept=moved(known.kept),
            positions=moved(known.positions),
            groups=moved(known.groups),
            sinks=moved(known.sinks),
            state=moved(known.state),
            seen=moved(known.seen),
        )

    def _at(self, tensor: torch.Tensor, rows: tuple[int, ...]) -> torch.Tensor:
        key = id(tensor), rows
        if key not in self._moved:
            # Held, so that no other tensor takes its number.
            self._moved[key] = tensor, tensor.index_select(0, torch.tensor(rows, device=tensor.device))
        return self._moved[key][1]


def whole_entry(note: Note) -> torch.Tensor:
    """What the model's code is to see for the entry: [B, H, N, D] that holds one element."""
    assert note.entry is not None
    heads, width, dtype = note.entry
    return torch.zeros((), dtype=dtype, device=note.stored.device).expand(note.stored.shape[0], heads, note.length, width)
