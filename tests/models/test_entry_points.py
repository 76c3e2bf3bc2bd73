"""Rewriting takes hold wherever a model is entered: methods, `forward` by name, encoders alone, a language model in `generate()`."""

from __future__ import annotations

import copy
import inspect
import pickle
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from rewrite import rewrite
from rewrite.ir.errors import ModelCallError, NotApplicableError
from tests.api.small import PASSES, close, deit, images, run
from tests.models.architectures import rewritten
from tests.models.corpus.transformers_bridged import BRIDGED
from tests.models.corpus.transformers_dual import DUAL
from tests.models.corpus.transformers_language import LANGUAGE
from tests.models.corpus.transformers_parts import PICTURE
from tests.models.oracles import visual_masked_from


def without_gradients(function: Any, *arguments: Any) -> Any:
    with torch.no_grad():
        return function(*arguments)


@pytest.fixture(scope="module")
def changed() -> nn.Module:
    return rewritten(deit(), PASSES, {"x": images()})


def test_features_and_head(changed: nn.Module) -> None:
    model, inputs = deit(), images()
    expected = run(changed, inputs)
    features = without_gradients(changed.forward_features, inputs)
    assert close(without_gradients(changed.forward_head, features), expected)
    assert not close(features, without_gradients(model.forward_features, inputs), 1e4)


def test_forward_by_name(changed: nn.Module) -> None:
    assert torch.equal(without_gradients(changed.forward, images()), run(changed, images()))


def test_intermediates_layer_by_layer(changed: nn.Module) -> None:
    final, intermediates = without_gradients(changed.forward_intermediates, images())
    assert close(final, without_gradients(changed.forward_features, images()))
    assert len(intermediates) == 2


def test_methods_look_as_they_were(changed: nn.Module) -> None:
    model = deit()
    for name in ("forward", "forward_features", "forward_intermediates"):
        assert inspect.signature(getattr(changed, name)) == inspect.signature(getattr(model, name))
        assert getattr(changed, name).__func__ is getattr(model, name).__func__
        assert getattr(changed, name).__self__ is changed
        assert getattr(changed, name).__name__ == name
    assert list(changed.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
def test_copies_keep_their_ways_in(changed: nn.Module, again: Any) -> None:
    twin = again(changed)
    features = without_gradients(changed.forward_features, images())
    assert torch.equal(without_gradients(twin.forward_features, images()), features)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.count_nonzero(without_gradients(twin.forward_features, images())) == 0
    assert torch.equal(without_gradients(changed.forward_features, images()), features)


def test_a_part_called_before_the_model_is_refused() -> None:
    """Without example inputs nothing is known before the first call, and a part called earlier would run as it is, unsaid."""
    model, inputs = deit(), images()
    waiting = rewrite(model, PASSES)
    with pytest.raises(ModelCallError, match=r"blocks was called before the model was, .* 2 attention sites .*example_inputs"):
        without_gradients(waiting.forward_features, inputs)
    patches = without_gradients(model.patch_embed, inputs)
    assert torch.equal(without_gradients(waiting.patch_embed, inputs), patches)
    expected = run(rewritten(model, PASSES, {"x": inputs}), inputs)
    for again in (copy.deepcopy(waiting), waiting):
        assert torch.equal(run(again, inputs), expected)
        assert close(without_gradients(again.forward_head, without_gradients(again.forward_features, inputs)), expected)


def test_encoders_of_a_clip() -> None:
    entry = next(entry for entry in DUAL if entry.name == "clip")
    model, inputs = entry.build("sdpa"), dict(entry.inputs(2))
    twin = rewritten(model, ["neighborhood(window=3)"], inputs)
    with torch.no_grad():
        together = twin(**inputs)
        pictures = twin.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output
        theirs = model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output
        texts = twin.get_text_features(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).pooler_output
    assert close(pictures / pictures.norm(dim=-1, keepdim=True), together.image_embeds)
    assert not close(pictures, theirs, 1e4)
    assert close(texts / texts.norm(dim=-1, keepdim=True), together.text_embeds)


def test_vision_tower_of_a_llava_alone() -> None:
    entry = next(entry for entry in LANGUAGE if entry.name == "llava")
    model, inputs = entry.build("sdpa"), dict(entry.inputs(2))
    twin = rewritten(model, ["neighborhood(window=3)"], inputs)
    with torch.no_grad():
        alone = twin.model.vision_tower(inputs["pixel_values"]).last_hidden_state
        theirs = model.model.vision_tower(inputs["pixel_values"]).last_hidden_state
        by_method = twin.model.vision_tower.forward(inputs["pixel_values"]).last_hidden_state
    assert torch.equal(alone, by_method)
    assert not close(alone, theirs, 1e4)


def test_a_language_model_that_generate_calls_directly() -> None:
    """BLIP-2's `generate()` merges the picture in its own code and calls its language model, never `forward`; with beams too."""
    entry = next(entry for entry in BRIDGED if entry.name == "blip-2")
    model, inputs = entry.build("sdpa"), dict(entry.inputs(2))
    twin = rewritten(model, ["token_exit(layer=1)"], inputs)
    # The oracle looks for the layers elsewhere.
    holder = SimpleNamespace(model=SimpleNamespace(language_model=model.language_model.model.decoder))
    for options in ({}, {"num_beams": 3}):
        visual = (inputs["input_ids"] == PICTURE).repeat_interleave(options.get("num_beams", 1), 0)
        with visual_masked_from(holder, 1, visual):
            expected = model.generate(**inputs, max_new_tokens=6, do_sample=False, **options)
        assert torch.equal(twin.generate(**inputs, max_new_tokens=6, do_sample=False, **options), expected)
        assert not torch.equal(model.generate(**inputs, max_new_tokens=6, do_sample=False, **options), expected)


class Nested(nn.Module):
    """An attention, and around it modules that each hold it and one more: as many ways in as there are levels."""

    def __init__(self, levels: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.inner = Nested(levels - 1) if levels > 1 else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return x if self.inner is None else self.inner(x)


def test_ways_in_many_levels_deep() -> None:
    """Dynamo traces a call within a call by frames of its own, and each way in adds calls to its level."""
    model, tokens = Nested(16).eval(), torch.randn(2, 9, 16)
    limit = sys.getrecursionlimit()
    changed = rewritten(model, ["window(window=4, sinks=1)"], {"x": tokens})
    assert changed.rewrite_report.counts()["rewritten"] == 16
    assert not close(without_gradients(changed, tokens), without_gradients(model, tokens), 1e4)
    assert sys.getrecursionlimit() == limit


@pytest.mark.parametrize("beams", [1, 2])
def test_a_decoder_over_patches_that_left(beams: int) -> None:
    """`generate()` calls the encoder by itself, and repeats what it gave for the beams."""
    import transformers

    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    vision = transformers.ViTConfig(image_size=32, patch_size=8, **small)
    text = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50, is_decoder=True, add_cross_attention=True)
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(vision, text)
    config.decoder_start_token_id = config.pad_token_id = 1
    torch.manual_seed(0)
    model = transformers.VisionEncoderDecoderModel(config).eval()
    pixels = torch.randn(2, 3, 32, 32)
    changed = rewritten(
        model, ["evit(keep=0.5, layers=(0,), fuse=False)"], {"pixel_values": pixels, "decoder_input_ids": torch.ones(2, 3).long()}
    )
    with torch.no_grad(), pytest.raises(NotApplicableError, match=r"attends to what another part of the model gave .* left there by evit"):
        changed.generate(pixel_values=pixels, num_beams=beams, do_sample=False, max_new_tokens=2, decoder_start_token_id=1, pad_token_id=1)
