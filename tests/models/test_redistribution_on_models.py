"""Passes of the family redistribute on real models: forward, training, and token for token in `generate()`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from passes import Calibrate
from rewrite import AttentionInputs, Pass, parse_pass, rewrite
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
from tests.models.oracles import attention_replaced_by, by_reference, plain
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
CALIBRATE, HEADS = "calibrate(beta=0.1, threshold=0.05, layers=(0,))", "head_reinforce(factor=2.5, layers=(1,))"


def calibrated_by_the_prompt(setting: Calibrate, logits: torch.Tensor, value: torch.Tensor, prompt: int) -> torch.Tensor:
    """Attention over whole sequences with the sinks that the first `prompt` tokens have among themselves."""
    weights = logits.softmax(-1).nan_to_num(0.0)
    received = weights[:, :, :prompt, :prompt].tril().sum(2) / torch.arange(prompt, 0, -1)
    sinks = received > setting.threshold
    sinks = functional.pad(sinks & (sinks.cumsum(-1) > 1), (0, weights.shape[-1] - prompt))[:, :, None]
    taken = (1 - setting.beta) * (weights * sinks).sum(-1, keepdim=True)
    others = weights * ~sinks
    return (others * (1 + taken / others.sum(-1, keepdim=True).clamp(min=1e-20)) + setting.beta * weights * sinks) @ value


def by_both(sites: list[Any], visual: torch.Tensor, prompt: int) -> Any:
    """Attention as each pass says in its layer of the language model, plain in the vision tower."""
    calibrate, heads = parse_pass(CALIBRATE), parse_pass(HEADS)
    assert isinstance(calibrate, Calibrate)

    def function(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, logits: torch.Tensor, number: int) -> torch.Tensor:
        site = sites[number % len(sites)]
        if not site.layout.visual:
            return plain(query, key, value, logits, number)
        if site.layer == 0:
            return calibrated_by_the_prompt(calibrate, logits, value, prompt)
        return heads.reference(AttentionInputs(query, key, value, logits, site, visual=visual))

    return function


def test_decoding_knows_the_image_and_the_sinks_of_the_prompt() -> None:
    """Each token as from a forward over the whole sequence with the passes' own definitions as attention."""
    inputs = llava_inputs(image_size=SMALL["image_size"])
    model, oracle = llava("eager", **SMALL), llava("sdpa", **SMALL)
    changed = rewritten(model, [CALIBRATE, HEADS], inputs)
    assert [site.passes for site in changed.rewrite_report.sites if site.passes] == [(CALIBRATE,), (HEADS,)]
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    prompt = ids.shape[1]
    with torch.no_grad():
        sites = recognised_sites(oracle, inputs)
    for _ in range(GREEDY["max_new_tokens"]):
        with torch.no_grad(), attention_replaced_by(by_both(sites, ids == IMAGE_TOKEN, prompt)):
            logits = oracle(input_ids=ids, attention_mask=mask, pixel_values=inputs["pixel_values"], use_cache=False).logits
        if ids.shape[1] == prompt:
            with torch.no_grad():
                first = changed(**inputs).logits
            real = mask.bool()
            assert (first - logits)[real].abs().max() <= 1e3 * torch.finfo(torch.float32).eps * logits[real].abs().max()
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    assert torch.equal(changed.generate(**inputs, **GREEDY), ids)
    assert not torch.equal(model.generate(**inputs, **GREEDY), ids)
