"""Notes on cache entries and the stand-ins for short ones."""

from __future__ import annotations

import copy
import gc
import pickle
from typing import Any

import pytest
import torch

from rewrite import ModelCallError
from rewrite.notes import CacheNotes, Note, Slot, slots, stand_in, storage_of


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


SHORT = Note(torch.arange(3).expand(2, 3), 10)


def test_a_stand_in_has_the_full_shape_and_one_element() -> None:
    entry = torch.randn(2, 4, 3, 8, dtype=torch.float16)
    put = stand_in(entry, 10)
    assert (put.shape, put.dtype) == (torch.Size([2, 4, 10, 8]), torch.float16)
    assert put.untyped_storage().nbytes() == 2
    # Views and detached copies are told to be it; other tensors, other stand-ins too, are not.
    assert storage_of(put.detach()[:1].transpose(1, 2)) == storage_of(put)
    assert len({storage_of(put), storage_of(stand_in(entry, 10)), storage_of(entry)}) == 3


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
    notes = noted(layer, SHORT)
    assert notes.read(slot_of(layer)) is SHORT
    layer.keys = layer.keys.index_select(0, torch.tensor([1, 0]))
    assert notes.read(slot_of(layer)) is SHORT
    assert notes.read(slot_of(Layer(3))) is None


def test_a_note_on_a_bare_tensor_belongs_to_that_tensor() -> None:
    tensor = torch.randn(2, 4, 3, 8)
    notes = CacheNotes()
    notes.write([tensor], [(tensor, SHORT)])
    assert notes.read(slot_of([tensor])) is SHORT
    assert notes.read(slot_of([tensor.clone()])) is None


@pytest.mark.parametrize(
    ("tokens", "batch", "note"),
    [(2, 2, SHORT), (4, 2, SHORT), (3, 4, SHORT), (9, 2, Note(None, 10)), (10, 3, Note(None, 10, torch.zeros(2, 10)))],
    ids=["cropped", "extended", "other batch", "cropped and full", "other batch and full"],
)
def test_changed_caches_are_refused(tokens: int, batch: int, note: Note) -> None:
    layer = Layer(note.length if note.positions is None else 3)
    notes = noted(layer, note)
    layer.keys = torch.randn(batch, 4, tokens, 8)
    with pytest.raises(ModelCallError) as caught:
        notes.read(slot_of(layer))
    for words in (f"holds {tokens} tokens of {batch} sequences", "cropped, extended or its batch changed", "start again from the prompt"):
        assert words in str(caught.value)


def test_an_emptied_cache_has_no_note() -> None:
    layer = Layer(3)
    notes = noted(layer, SHORT)
    layer.keys = layer.keys[:, :, :0]
    assert notes.read(slot_of(layer)) is None


def test_notes_do_not_keep_caches_alive_and_do_not_travel() -> None:
    layer = Layer(3)
    notes = noted(layer, SHORT)
    assert len(notes.by_owner) == 1
    for other in (copy.deepcopy(notes), pickle.loads(pickle.dumps(notes))):
        assert not other.by_owner
        assert not other.by_tensor
    del layer
    gc.collect()
    assert len(notes.by_owner) == 0
