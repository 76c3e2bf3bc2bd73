"""Decoding by recurrence: what is generated over states is what the whole sequence at once says, token for token."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from rewrite import ModelCallError, rewrite
from tests.models.test_linear_on_models import drawn, llama

PASSES = ["lightning(scale='site', layers=(0,))", "hedgehog(features=6, layers=(1,))"]


def prompt(length: int) -> dict[str, torch.Tensor]:
    """Two rows, one of them padded on the left."""
    ids = torch.randint(3, 60, (2, length), generator=torch.Generator().manual_seed(2))
    return {"input_ids": ids, "attention_mask": (torch.arange(length) >= torch.tensor([[0], [3]])).long()}


@pytest.fixture(scope="module")
def changed() -> nn.Module:
    """A decay and a state for each query head in the first layer; a learned feature map, a sum and shared states in the second."""
    torch.manual_seed(0)
    model = rewrite(llama(), PASSES, example_inputs=prompt(12))
    drawn(model)
    return model


def generated(model: nn.Module, inputs: dict[str, torch.Tensor], new: int = 4, **options: Any) -> Any:
    return model.generate(**inputs, max_new_tokens=new, do_sample=False, return_dict_in_generate=True, **options)


def without_cache(model: nn.Module, inputs: dict[str, torch.Tensor], new: int = 4, **options: Any) -> torch.Tensor:
    tokens: torch.Tensor = model.generate(**inputs, max_new_tokens=new, do_sample=False, use_cache=False, **options)
    return tokens


def bytes_of(cache: Any) -> tuple[int, int]:
    """(of what the cache's entries hold, of the states behind them)."""
    entries = [entry for layer in cache.layers for entry in (layer.keys, layer.values)]
    states = {id(entry.rewrite_note.state): entry.rewrite_note.state for entry in entries}
    return sum(entry.untyped_storage().nbytes() for entry in entries), sum(state.nbytes for state in states.values())


def continued(tokens: torch.Tensor, inputs: dict[str, torch.Tensor], new: int) -> dict[str, torch.Tensor]:
    """The inputs of a second turn: all so far and some tokens more."""
    more = torch.randint(3, 60, (2, new), generator=torch.Generator().manual_seed(3))
    ids, seen = torch.cat([tokens, more], 1), inputs["attention_mask"]
    return {"input_ids": ids, "attention_mask": torch.cat([seen, seen.new_ones(2, ids.shape[1] - seen.shape[1])], 1)}


def test_two_turns_on_one_cache_and_on_a_copy_of_it(changed: nn.Module) -> None:
    """A long prompt, which itself goes through the state; no key of an earlier token is anywhere, and what is kept does not grow."""
    inputs = prompt(300)
    first = generated(changed, inputs)
    assert torch.equal(first.sequences, without_cache(changed, inputs))
    cache = first.past_key_values
    assert cache.get_seq_length() == 303
    # A complex number for each row of an entry; lightning has four states of 8 x 8 in float32, hedgehog two of 12 x 9.
    wanted = (4 * 2 * 8, 2 * 4 * (4 * 8 * 8 + 2 * 12 * 9))
    assert bytes_of(cache) == wanted
    second = continued(first.sequences, inputs, 5)
    expected = without_cache(changed, second)
    for each in (copy.deepcopy(cache), cache):
        again = generated(changed, second, past_key_values=each)
        assert torch.equal(again.sequences, expected)
        assert bytes_of(again.past_key_values) == wanted
        assert each.get_seq_length() == 312


def test_beams_take_their_states_with_them(changed: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    inputs, orders = prompt(12), []
    reordered = transformers.DynamicCache.reorder_cache

    def reorder(cache: Any, beams: torch.Tensor) -> None:
        orders.append(beams.tolist())
        reordered(cache, beams)

    monkeypatch.setattr("transformers.DynamicCache.reorder_cache", reorder)
    found = generated(changed, inputs, new=6, num_beams=3)
    assert any(order != sorted(order) for order in orders), "beams were never reordered"
    assert torch.equal(found.sequences, without_cache(changed, inputs, new=6, num_beams=3))


def test_a_cache_that_a_state_cannot_follow_is_refused(changed: nn.Module) -> None:
    """Cropped; with another mask than it was filled with; in another model."""
    inputs = prompt(12)
    step = {"input_ids": torch.tensor([[5], [6]]), "attention_mask": torch.ones(2, 13, dtype=torch.int64)}
    with torch.no_grad():
        cache = changed(**inputs).past_key_values
        with pytest.raises(ModelCallError, match="hides other tokens of the cache"):
            changed(**step, past_key_values=copy.deepcopy(cache))
        with pytest.raises((RuntimeError, ValueError)):
            llama()(**step, past_key_values=copy.deepcopy(cache))
        cache.crop(-2)
        with pytest.raises(ModelCallError, match="cropped or extended from 12 tokens"):
            changed(input_ids=step["input_ids"], attention_mask=step["attention_mask"][:, :11], past_key_values=cache)


def test_keys_are_kept_where_they_are_needed(changed: nn.Module) -> None:
    """Under gradients, and where the mask (here two packed texts) is more than order and padding: pair by pair, as ever."""
    inputs = prompt(12)
    texts = torch.arange(12) // 7
    packed = ((texts[:, None] == texts) & torch.ones(12, 12).tril().bool()).expand(2, 1, 12, 12)
    with torch.no_grad():
        cache = changed(input_ids=inputs["input_ids"], attention_mask=packed).past_key_values
    kept = changed(**inputs).past_key_values
    for each in (cache, kept):
        assert {layer.keys.dtype for layer in each.layers} == {torch.float32}
        assert each.layers[1].keys.shape == (2, 2, 12, 8)
    step, seen = torch.tensor([[5], [6]]), torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.int64)], 1)
    with torch.no_grad():
        actual = changed(input_ids=step, attention_mask=seen, past_key_values=kept).logits
        expected = changed(input_ids=torch.cat([inputs["input_ids"], step], 1), attention_mask=seen, use_cache=False).logits
    assert (actual[:, -1] - expected[:, -1]).abs().max() <= 1e3 * torch.finfo(torch.float32).eps * expected.abs().max()
