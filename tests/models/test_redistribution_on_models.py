"""Passes of the family redistribute on a vision transformer: forward and training. For language models see test_language_models."""

from __future__ import annotations

import pytest
import torch

from rewrite import Pass, parse_pass, rewrite
from tests.models.architectures import (
    IMPLEMENTATIONS,
    call,
    images,
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
