"""Passes of the family redistribute on real models: forward, training, and token for token in `generate()`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from passes import Calibrate
from rewrite import Pass, parse_pass, rewrite
from tests.models.architectures import (
    IMAGE_TOKEN,
    IMPLEMENTATIONS,
    call,
    images,
    llava,
    llava_inputs,
    outputs,
    rewritten,
    same_gradients,
    timm_model,
)
from tests.models.oracles import attention_replaced_by, by_reference
from tests.models.test_passes_on_models import agrees, recognised_sites

LAYERS = 3
deit = timm_model("deit_tiny_patch16_224", depth=LAYERS, num_classes=8, img_size=96)
pictures = images(96, name="x")

BY_HEAD = "relu_attention(relu_heads=((0, 2), (1,), ()))"
VISION = [(text, "sdpa") for text in ("temperature(value=1.5)", "temperature(kind='position', value=0.2)", "sigmoid")]
VISION += [(BY_HEAD, implementation) for implementation in IMPLEMENTATIONS]


@pytest.mark.parametrize(("text", "implementation"), VISION)
def test_pass_equals_its_reference(text: str, implementation: str) -> None:
    one: Pass = parse_pass(text)
    model, inputs = deit("sdpa"), pictures()
    sites = recognised_sites(model, inputs)
    with torch.no_grad(), attention_replaced_by(by_reference(one, sites)):
        expected = outputs(model(**inputs))
    changed = rewritten(deit(implementation), [text], inputs)
    assert changed.rewrite_report.counts()["rewritten"] == LAYERS
    actual = call(changed, inputs)
    agrees(actual, expected, LAYERS)
    assert any((got - was).abs().max() > 1e-4 * was.abs().max() for got, was in zip(actual, call(model, inputs), strict=True))


@pytest.mark.parametrize("text", ["sigmoid", BY_HEAD])
def test_gradients_in_training(text: str) -> None:
    model, inputs = deit("sdpa").train(), pictures()
    sites = recognised_sites(model, inputs)
    changed = rewrite(model, [text], example_inputs=inputs)
    with attention_replaced_by(by_reference(parse_pass(text), sites)):
        model(**inputs).square().mean().backward()
    changed(**inputs).square().mean().backward()
    same_gradients(changed, model)


def test_beta_of_every_layer_is_learnt() -> None:
    text = "temperature(kind='position', value=0.5, learnable=True)"
    model, inputs = deit("sdpa").train(), pictures()
    sites = recognised_sites(model, inputs)
    changed = rewrite(model, [text], example_inputs=inputs)
    added = {name: value for name, value in changed.named_parameters() if name.startswith("rewrite_added.")}
    assert [value.tolist() for value in added.values()] == [[0.5]] * LAYERS
    betas = {site.name: torch.full((1,), 0.5, requires_grad=True) for site in sites}
    parameters = {"parameters": lambda site: {"temperature_beta": betas[site.name]}}
    with attention_replaced_by(by_reference(parse_pass(text), sites, **parameters)):
        model(**inputs).square().mean().backward()
    changed(**inputs).square().mean().backward()
    same_gradients(changed, model)
    for (name, value), beta in zip(added.items(), betas.values(), strict=True):
        assert value.grad is not None, name
        assert beta.grad is not None
        # A sum over 3 heads, 37 queries and keys of two pictures, of either sign.
        assert abs(float(value.grad - beta.grad)) <= 256 * torch.finfo(torch.float32).eps * max(1e-2, float(beta.grad.abs())), name
    before = [value.item() for value in added.values()]
    torch.optim.SGD(changed.parameters(), lr=1.0).step()
    assert all(value.item() != was for value, was in zip(added.values(), before, strict=True))


SMALL: dict[str, int] = {"layers": 2, "vision_layers": 1, "image_size": 28}
GREEDY: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
HEADS = "head_reinforce(factor=2.5)"


def decoded_by_reference(one: Pass, oracle: nn.Module, sites: list[Any], inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The prompt and the tokens that follow, each from a forward over the whole sequence with the pass's reference as attention."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    for _ in range(GREEDY["max_new_tokens"]):
        visual = ids == IMAGE_TOKEN
        with torch.no_grad(), attention_replaced_by(by_reference(one, sites, visual=lambda site, v=visual: v)):
            logits = oracle(input_ids=ids, attention_mask=mask, pixel_values=inputs["pixel_values"], use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return ids


@pytest.mark.parametrize(("text", "implementation"), [(HEADS, "eager")])
def test_decoding_with_a_cache_continues_the_reference(text: str, implementation: str) -> None:
    one, inputs = parse_pass(text), llava_inputs(image_size=SMALL["image_size"])
    model, oracle = llava(implementation, **SMALL), llava("sdpa", **SMALL)
    changed = rewritten(model, [text], inputs)
    with torch.no_grad():
        sites = recognised_sites(oracle, inputs)
    chosen = [site if one.fits.reason_against(site) is None and one.declines(site) is None else None for site in sites]
    assert changed.rewrite_report.counts()["rewritten"] == sum(site is not None for site in chosen) > 0
    expected = decoded_by_reference(one, oracle, chosen, inputs)
    assert torch.equal(changed.generate(**inputs, **GREEDY), expected)
    assert not torch.equal(model.generate(**inputs, **GREEDY), expected)


def calibrated_by_the_prompt(setting: Calibrate, prompt: int) -> Any:
    """Attention with the sinks that the first `prompt` tokens have among themselves, the last axes being whole sequences."""

    def function(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, logits: torch.Tensor, number: int) -> torch.Tensor:
        weights = logits.softmax(-1).nan_to_num(0.0)
        if weights.shape[-1] < prompt:
            return weights @ value  # the picture's own tokens
        received = weights[:, :, :prompt, :prompt].tril().sum(2) / torch.arange(prompt, 0, -1)
        sinks = received > setting.threshold
        sinks = functional.pad(sinks & (sinks.cumsum(-1) > 1), (0, weights.shape[-1] - prompt))[:, :, None]
        taken = (1 - setting.beta) * (weights * sinks).sum(-1, keepdim=True)
        others = weights * ~sinks
        return (others * (1 + taken / others.sum(-1, keepdim=True).clamp(min=1e-20)) + setting.beta * weights * sinks) @ value

    return function


def test_calibrated_decoding_knows_the_sinks_of_the_prompt() -> None:
    text, inputs = "calibrate(beta=0.1, threshold=0.05, layers=None)", llava_inputs(image_size=SMALL["image_size"])
    model, oracle = llava("sdpa", **SMALL), llava("sdpa", **SMALL)
    changed = rewritten(model, [text], inputs)
    assert changed.rewrite_report.counts()["rewritten"] == SMALL["layers"]
    setting = parse_pass(text)
    assert isinstance(setting, Calibrate)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    function = calibrated_by_the_prompt(setting, ids.shape[1])
    for _ in range(GREEDY["max_new_tokens"]):
        with torch.no_grad(), attention_replaced_by(function):
            logits = oracle(input_ids=ids, attention_mask=mask, pixel_values=inputs["pixel_values"], use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    assert torch.equal(changed.generate(**inputs, **GREEDY), ids)
    assert not torch.equal(model.generate(**inputs, **GREEDY), ids)
