"""Passes in a language model with visual tokens: forward, every gradient of a training step, and token for token in `generate()`.

One model holds many passes, each in a layer of its own. What it must compute is the original model, with its own KV cache, in which
attention is what each pass's reference says.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn

from rewrite import Site, parse_pass, rewrite
from tests.models.architectures import IMAGE_TOKEN, llava, llava_inputs, rewritten, same_gradients
from tests.models.oracles import PassesByLayer, attention_replaced_by
from tests.models.test_passes_on_models import recognised_sites

GREEDY: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
PIXELS = 28
SIZES: dict[str, int] = {"vision_layers": 1, "image_size": PIXELS}

# The passes by layer. sink_redistribution has a first layer, and leaves the last one alone.
EVERY = (
    "calibrate(beta=0.1, threshold=0.05, layers=(0,))",
    "composite(layers=(1,))",
    "head_reinforce(factor=2.5, layers=(2,))",
    "neighborhood(window=6, layers=(3,))",
    "relu_attention(layers=(4,))",
    "sigmoid(layers=(5,))",
    "temperature(kind='position', value=0.2, layers=(6,))",
    "sink_redistribution(rho=0.6, summ=0.1, tau=2.2, first_layer=7)",
    "window(window=6, sinks=5, layers=(8,))",
)
MUTUAL = ("modality_mutual(layers=(0,))", "relu_attention(relu_heads=(0, 2), layers=(1,))")
CASES = [(EVERY, "eager"), (MUTUAL, "sdpa")]


@functools.cache
def sites_of(layers: int) -> list[Site]:
    """The sites of the oracle, whose shapes do not depend on how much is padding."""
    return recognised_sites(llava("sdpa", layers=layers, **SIZES), llava_inputs(PIXELS))


def model_and_oracle(texts: tuple[str, ...], implementation: str, padding: int) -> tuple[nn.Module, nn.Module, Any, Any]:
    """(the model, an equal one of fused attention, inputs, the oracle's attention)."""
    inputs = llava_inputs(PIXELS, padding=padding)
    model, oracle = llava(implementation, layers=len(texts), **SIZES), llava("sdpa", layers=len(texts), **SIZES)
    visual, layers = inputs["input_ids"] == IMAGE_TOKEN, oracle.model.language_model.layers
    attention = PassesByLayer([parse_pass(text) for text in texts], sites_of(len(texts)), visual, layers)
    assert sorted(str(one) for one in attention.chosen.values()) == sorted(texts)
    return model, oracle, inputs, attention


@pytest.mark.parametrize(("texts", "implementation"), CASES, ids=["every", "mutual"])
def test_in_generate(texts: tuple[str, ...], implementation: str) -> None:
    """Two prompts, one padded on the left; heads that share keys."""
    model, oracle, inputs, attention = model_and_oracle(texts, implementation, padding=3)
    changed = rewritten(model, texts, inputs)
    language = [site.passes for site in changed.rewrite_report.sites if "language_model" in site.qualified_name]
    assert language == [(text,) for text in texts]
    with torch.no_grad():
        before, actual = model(**inputs).logits, changed(**inputs).logits
        with attention_replaced_by(attention):
            expected = oracle(**inputs).logits
    real, largest = inputs["attention_mask"].bool(), expected.abs().max()
    assert (actual - expected)[real].abs().max() <= 1e3 * torch.finfo(torch.float32).eps * largest
    assert (actual - before)[real].abs().max() > 1e-3 * largest
    with attention_replaced_by(attention):
        tokens = oracle.generate(**inputs, **GREEDY)
    assert torch.equal(changed.generate(**inputs, **GREEDY), tokens)
    assert not torch.equal(model.generate(**inputs, **GREEDY), tokens)


@pytest.mark.parametrize(("texts", "implementation"), CASES, ids=["every", "mutual"])
def test_in_training(texts: tuple[str, ...], implementation: str) -> None:
    model, oracle, inputs, attention = model_and_oracle(texts, implementation, padding=0)
    inputs |= {"use_cache": False}
    changed = rewrite(model.train(), texts, example_inputs=inputs)
    with attention_replaced_by(attention):
        oracle.train()(**inputs).logits.square().mean().backward()
    changed(**inputs).logits.square().mean().backward()
    same_gradients(changed, oracle)
