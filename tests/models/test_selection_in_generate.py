"""Selections in `generate()`: beams, and turns that go on from a cache; token for token what the original gives with the tokens masked."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from rewrite import ModelCallError
from tests.models.architectures import IMAGE_TOKEN, llava, llava_inputs, rewritten
from tests.models.oracles import Survivors, attention_replaced_by, best, visual_masked_from
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


def sliding(window: int) -> Any:
    """A LLaVA whose language model's layers see `window` tokens, and whose cache keeps no more."""
    import transformers

    vision = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 56,
        "patch_size": 14,
    }
    text = {
        "model_type": "mistral", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 200, "sliding_window": window, "initializer_range": 0.15,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        text_config=text, vision_config={"model_type": "clip_vision_model", **vision}, image_token_id=IMAGE_TOKEN, image_seq_length=16
    )
    return transformers.LlavaForConditionalGeneration(config).eval()


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_layers_that_slide(kind: str) -> None:
    """Their cache keeps the last tokens alone. As long as these are all, nothing is lost; else no later call can go on."""
    inputs, options = llava_inputs(), {**GREEDY, "cache_implementation": kind}
    model = sliding(window=64)
    changed = rewritten(model, ["token_exit(layer=1)"], inputs)
    with visual_masked_from(model, 1, visual_of(inputs)):
        expected = model.generate(**inputs, **GREEDY)
    assert torch.equal(changed.generate(**inputs, **options), expected)
    assert not torch.equal(model.generate(**inputs, **GREEDY), expected)
    shorter = rewritten(sliding(window=12), ["token_exit(layer=1)"], inputs)
    told = (
        r"layers.1.self_attn: its KV cache keeps the last" if kind == "dynamic" else r"layers.1.self_attn.* in a way that is not followed"
    )
    with pytest.raises(ModelCallError, match=told):
        shorter.generate(**inputs, **options)
