"""A KV cache entry in whose place a state is kept.

Linear attention needs of all earlier keys and values nothing but their state. What the cache object then holds for keys, and for values, is
an entry of the right batch and length that takes one number for each row, expanded: enough for code that asks a cache how long it is. The
number is the row's own, so that whatever moves the rows of an entry (the reordering of beam search, repeating rows for several samples)
says how to move those of the state. The note of what the entry stands for is an attribute of the tensor, which copies of a cache take with
them; where the entry was moved, it is that of the object that holds it.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from rewrite.ir.errors import ModelCallError
from rewrite.notes import Note

# The entry's type is one that no model computes attention in, so that an entry which comes to a model that does not know of it is an
# error in its first product, and the imaginary part tells such an entry from any other tensor.
_DTYPE, _MARK = torch.complex64, 19.0
_ATTRIBUTE = "rewrite_note"


def state_entry(note: Note) -> torch.Tensor:
    """The entry [B, 1, N, 1] for what a call left, in the place of [B, H, N, D]."""
    assert note.state is not None
    batch = note.state.shape[0]
    rows = torch.arange(batch, device=note.state.device, dtype=torch.float32)
    entry = torch.complex(rows, torch.full_like(rows, _MARK)).reshape(batch, 1, 1, 1).expand(batch, 1, note.length, 1)
    setattr(entry, _ATTRIBUTE, note)
    return entry


def note_of(entry: torch.Tensor) -> Note | None:
    """What an entry that was not moved stands for."""
    found: Note | None = getattr(entry, _ATTRIBUTE, None)
    return found


def is_state_entry(tensor: torch.Tensor) -> bool:
    """Whether the tensor was made by `state_entry`, or cut or moved from one."""
    if tensor.dtype != _DTYPE or tensor.ndim != 4 or tensor.shape[1] != 1 or tensor.shape[3] != 1 or not tensor.numel():
        return False
    # Of an entry that was not moved nothing is asked of the device.
    return note_of(tensor) is not None or float(tensor.flatten()[0].imag) == _MARK


def followed(entry: torch.Tensor, note: Note | None) -> Note:
    """The note of an entry as its rows lie now. note: of the object that holds the entry.

    Raises `ModelCallError` where the entry is not of the length that was left in it, or nothing is known of it.
    """
    own = note_of(entry)
    known = own or note
    if known is None or known.state is None or entry.shape[2] != known.length:
        told = "comes from another cache" if known is None or known.state is None else f"was cut or extended from {known.length} tokens"
        raise ModelCallError(
            f"a KV cache entry of {entry.shape[2]} tokens {told}; a state stands for its keys, of which none can be taken out or put in "
            "outside the model: start again from the prompt with a new cache"
        )
    if own is not None:
        return own
    rows = entry[:, 0, 0, 0].real.long().to(known.state.device)
    assert known.seen is not None
    return replace(known, state=known.state.index_select(0, rows), seen=known.seen.index_select(0, rows))


def whole_entry(note: Note) -> torch.Tensor:
    """What the model's code is to see for the entry: [B, H, N, D] that holds one element."""
    assert note.state is not None
    assert note.entry is not None
    heads, width, dtype = note.entry
    return torch.zeros((), dtype=dtype, device=note.state.device).expand(note.state.shape[0], heads, note.length, width)
