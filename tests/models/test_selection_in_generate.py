"""Selections in `generate()`: beams, and turns that go on from a cache; token for token what the original gives with the tokens masked."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from rewrite import ModelCallError
from tests.models.architectures import IMAGE_TOKEN, llava, llava_inputs, rewritten
from tests.models.oracles import Survivors, attention_replaced_by, best
from tests.models.test_llava import GREEDY, visual_of
from tests.models.test_selection import TEXT, spread_keeps


def test_a_second_turn_where_no_layer_has_every_token() -> None:
    """It is another call of `generate()`, which asks a copy of the first one's cache for its length."""
    inputs = llava_inputs()
    changed, plain = rewritten(llava("sdpa"), ["diverse(keep=12)"], inputs), llava("sdpa")

    def turns(model: Any) -> torch.Tensor:
        options = {**GREEDY, "return_dict_in_generate": True, "eos_token_id": None}
        first = model.generate(**inputs, **options)
        ids = torch.cat([first.sequences, torch.tensor([[17, 23, 42], [5, 6, 7]])], 1)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, ids.shape[1] - inputs["attention_mask"].shape[1]), value=1)
        cache = copy.deepcopy(first.past_key_values)  # a prompt's cache is kept for other questions
        second = model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, **options)
        return second.sequences  # type: ignore[no-any-return]

    with attention_replaced_by(Survivors(TEXT, before={0: spread_keeps(plain, visual_of(inputs), 12)})):
        expected = turns(plain)
    assert torch.equal(turns(changed), expected)
    assert not torch.equal(turns(llava("sdpa")), expected)


def test_a_vision_tower_that_runs_ahead_and_beams_over_two_pictures_a_row() -> None:
    """`generate()` calls the tower first and the language model with the features, which it repeats for the beams, picture by picture."""
    inputs, beams = llava_inputs(), 3
    ids = torch.cat([inputs["input_ids"], inputs["input_ids"][:, 5:]], dim=1)
    ids[1, 30:33], ids[1, 33:49] = 7, IMAGE_TOKEN
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, ids.shape[1] - inputs["attention_mask"].shape[1]), value=1)
    pictures = torch.randn(4, 3, 56, 56, generator=torch.Generator().manual_seed(5))
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": pictures}
    visual = visual_of(inputs).repeat_interleave(beams, 0)
    oracle = Survivors(TEXT)

    def keeps(weights: torch.Tensor, alive: torch.Tensor) -> torch.Tensor:
        score = oracle.weights[1][:, :, 0, 1:].mean(1)
        chosen = best(score, torch.ones_like(score, dtype=torch.bool), 8).reshape(2, 32).repeat_interleave(beams, 0)
        return alive & ~visual.masked_scatter(visual, ~chosen)

    oracle.before[0] = keeps
    changed = rewritten(llava("sdpa"), ["cls_prune(keep=0.5)"], inputs)
    with attention_replaced_by(oracle):
        expected = llava("sdpa").generate(**inputs, **GREEDY, num_beams=beams)
    assert torch.equal(changed.generate(**inputs, **GREEDY, num_beams=beams), expected)
    assert not torch.equal(llava("sdpa").generate(**inputs, **GREEDY, num_beams=beams), expected)
    # Features that nobody scored cannot be chosen among.
    features = changed.get_image_features(pictures, return_dict=True)
    features.pooler_output = [feature.clone() for feature in features.pooler_output]
    with pytest.raises(ModelCallError, match=r"call the model itself with its pictures"), torch.no_grad():
        changed(input_ids=ids, attention_mask=mask, mm_encoder_outputs={"image": features})


def test_a_static_cache_is_refused() -> None:
    inputs = llava_inputs()
    changed = rewritten(llava("sdpa"), ["fastv"], inputs)
    with pytest.raises(ModelCallError, match=r"layers.3.self_attn runs without fastv.*use one that grows"):
        changed.generate(**inputs, **GREEDY, cache_implementation="static")
