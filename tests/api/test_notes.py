"""Notes on cache entries and the stand-ins for short ones."""

from __future__ import annotations

import copy
import gc
import pickle
from typing import Any

import pytest
import torch

from rewrite import ModelCallError
from rewrite.notes import CacheNotes, Note, Slot, slots, storage_of
from rewrite.states import Followed, cached_tokens, is_stand_in, stand_in, whole_entry


class Layer:
    """A cache layer as transformers has it."""

    def __init__(self, tokens: int, batch: int = 2) -> None:
        self.keys = torch.randn(batch, 4, tokens, 8)


def noted(layer: Layer, note: Note) -> CacheNotes:
    notes = CacheNotes()
    notes.write({"layers": [layer]}, [(layer.keys, note)])
    return notes


def slot_of(value: Any) -> Slot:
    (slot,) = slots(value)
    return slot


def short(batch: int = 2, kept: int = 3, length: int = 10) -> Note:
    """Some tokens left: row b keeps those from b on, with numbers that tell which row and token it was."""
    positions = torch.arange(kept) + torch.arange(batch)[:, None]
    entry = (torch.arange(batch)[:, None] * 100.0 + positions)[:, None, :, None].expand(batch, 4, kept, 8).to(torch.float16)
    return Note(positions, length, kept=entry, entry=(4, 8, torch.float16))


WHOLE = Note(None, 3)


def test_a_stand_in_has_the_full_length_and_one_number_a_row() -> None:
    put = stand_in(short())
    assert (put.shape[0], put.shape[2]) == (2, 10)
    assert put.untyped_storage().nbytes() == 2 * put.element_size()
    assert is_stand_in(put)
    assert is_stand_in(put.clone()[:1])
    assert not is_stand_in(torch.randn(2, 1, 10, 1))
    seen = whole_entry(short())
    assert (seen.shape, seen.dtype) == (torch.Size([2, 4, 10, 8]), torch.float16)
    assert seen.untyped_storage().nbytes() == 2
    # Views and detached copies are told to be it; other tensors, other stand-ins too, are not.
    assert storage_of(seen.detach()[:1].transpose(1, 2)) == storage_of(seen)
    assert storage_of(whole_entry(short())) != storage_of(seen)


def test_rows_that_are_moved_take_what_is_kept_along() -> None:
    note = short()
    followed, rows = Followed(), torch.tensor([1, 1, 0])
    moved = [followed(stand_in(note).index_select(0, rows), other) for other in (note, Note(note.positions, 10, kept=note.kept))]
    assert moved[0].kept is not None
    assert moved[0].kept[:, 0, :, 0].tolist() == [[101, 102, 103], [101, 102, 103], [0, 1, 2]]
    assert moved[0].positions is moved[1].positions  # one selection stays one
    assert moved[0].positions is not None
    assert moved[0].positions.tolist() == [[1, 2, 3], [1, 2, 3], [0, 1, 2]]
    # A copy of a cache, which nobody saw being made, takes its note along.
    assert Followed()(copy.deepcopy(stand_in(note)), None).positions is not None


def test_a_stand_in_that_was_cut_or_is_not_known_is_refused() -> None:
    for entry, note in ((stand_in(short())[:, :, :7], short()), (stand_in(short()).clone(), None)):
        with pytest.raises(ModelCallError, match="start again from the prompt"):
            Followed()(entry, note)


def test_what_a_cache_has_of_its_tokens() -> None:
    layers = [Layer(10), Layer(10)]
    layers[1].keys = stand_in(short())
    assert cached_tokens({"layers": layers}) == [10, 3]


def test_slots_reach_nested_containers_once_and_leave_modules_alone() -> None:
    layer, shared = Layer(3), [torch.zeros(1)]
    value = {"cache": [layer, layer], "pair": (torch.zeros(2),), "a": shared, "b": shared, "module": torch.nn.Linear(2, 2), "text": "x"}
    found = list(slots(value))
    assert [tuple(slot.tensor.shape) for slot in found] == [(2, 4, 3, 8), (2,), (1,)]
    assert [slot.put is not None for slot in found] == [True, False, True]
    value["self"] = value
    assert len(list(slots(value))) == 3


def test_putting_into_a_slot() -> None:
    layer = Layer(3)
    fresh = torch.zeros(1)
    for value, read in ((layer, lambda: layer.keys), ([layer.keys], None), ({"key": layer.keys}, None)):
        slot = slot_of(value)
        assert slot.put is not None
        slot.put(fresh)
        assert (read() if read else next(slots(value)).tensor) is fresh


def test_a_note_belongs_to_the_layer_and_survives_reordering() -> None:
    layer = Layer(3)
    notes = noted(layer, WHOLE)
    assert notes.read(slot_of(layer)) is WHOLE
    layer.keys = layer.keys.index_select(0, torch.tensor([1, 0]))
    assert notes.read(slot_of(layer)) is WHOLE
    assert notes.read(slot_of(Layer(3))) is None


def test_a_note_on_a_bare_tensor_belongs_to_that_tensor() -> None:
    tensor = torch.randn(2, 4, 3, 8)
    notes = CacheNotes()
    notes.write([tensor], [(tensor, WHOLE)])
    assert notes.read(slot_of([tensor])) is WHOLE
    assert notes.read(slot_of([tensor.clone()])) is None


@pytest.mark.parametrize(
    ("tokens", "batch", "note"),
    [(9, 2, Note(None, 10)), (11, 2, Note(None, 10)), (10, 3, Note(None, 10, torch.zeros(2, 10)))],
    ids=["cropped", "extended", "other batch"],
)
def test_changed_caches_are_refused(tokens: int, batch: int, note: Note) -> None:
    layer = Layer(note.length)
    notes = noted(layer, note)
    layer.keys = torch.randn(batch, 4, tokens, 8)
    with pytest.raises(ModelCallError) as caught:
        notes.read(slot_of(layer))
    for words in (f"holds {tokens} tokens of {batch} sequences", "cropped, extended or its batch changed", "start again from the prompt"):
        assert words in str(caught.value)


def test_an_emptied_cache_has_no_note() -> None:
    layer = Layer(3)
    notes = noted(layer, WHOLE)
    layer.keys = layer.keys[:, :, :0]
    assert notes.read(slot_of(layer)) is None


def test_notes_do_not_keep_caches_alive_and_do_not_travel() -> None:
    layer = Layer(3)
    notes = noted(layer, WHOLE)
    assert len(notes.by_owner) == 1
    for other in (copy.deepcopy(notes), pickle.loads(pickle.dumps(notes))):
        assert not other.by_owner
        assert not other.by_tensor
    del layer
    gc.collect()
    assert len(notes.by_owner) == 0
