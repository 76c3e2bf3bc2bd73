"""Passes whose choice of keys depends on the data, on a real model: forward, training, and what they add to it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from rewrite import Pass, parse_pass, rewrite
from rewrite.ir import NotApplicableError
from tests.models.architectures import call, images, outputs, rewritten, same_gradients, timm_model
from tests.models.oracles import attention_replaced_by, by_reference
from tests.models.test_cost import counted
from tests.models.test_passes_on_models import agrees, recognised_sites

LAYERS = 2
LEPE = "routed(topk=2, lepe=True)"
SPARSE = "sparsifiner(keep=0.2, threshold=0.005)"


def deit(text: str, implementation: str = "sdpa", **options: Any) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A small DeiT and pictures for a pass: 14 x 14 patches, 7 x 7 regions of 2 x 2, and a class token.

    6 x 6 patches for a choice key by key: of more choices some would be so close that rounding decides them.
    """
    size = 96 if text == SPARSE else 224
    options = {"depth": LAYERS, "num_classes": 8, "embed_dim": 96, "num_heads": 3, "img_size": size} | options
    return timm_model("deit_tiny_patch16_224", **options)(implementation), images(size, name="x")()


def known(model: nn.Module) -> dict[str, Any]:
    """What the references are given: the parameters that a pass added, by site, set to anything but what they start as."""
    added = {name: parameter for name, parameter in model.named_parameters() if name.startswith("rewrite_added.")}
    generator = torch.Generator().manual_seed(5)
    for parameter in added.values():
        parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))

    def of(site: Any) -> dict[str, torch.Tensor]:
        lead = f"rewrite_added.{site.name}."
        return {name.removeprefix(lead): parameter for name, parameter in added.items() if name.startswith(lead)}

    return {"parameters": of}


@pytest.mark.parametrize(("text", "implementation"), [("routed", "sdpa"), (LEPE, "eager"), (SPARSE, "sdpa")])
def test_pass_equals_its_reference(text: str, implementation: str) -> None:
    one: Pass = parse_pass(text)
    model, inputs = deit(text)
    changed = rewritten(deit(text, implementation)[0], [text], inputs)
    assert changed.rewrite_report.counts()["rewritten"] == LAYERS
    sites = recognised_sites(model, inputs)
    with torch.no_grad(), attention_replaced_by(by_reference(one, sites, **known(changed))):
        expected = outputs(model(**inputs))
    actual = call(changed, inputs)
    agrees(actual, expected, LAYERS)
    assert any((got - was).abs().max() > 1e-3 * was.abs().max() for got, was in zip(actual, call(model, inputs), strict=True))
    assert 2 * changed.rewrite_report.total_after.multiply_adds == pytest.approx(counted(changed, inputs), rel=0.01)


@pytest.mark.parametrize("text", [LEPE, SPARSE])
def test_gradients_in_training(text: str) -> None:
    model, inputs = deit(text)
    changed = rewrite(model.train(), [text], example_inputs=inputs)
    given = known(changed)
    added = {name: parameter for name, parameter in changed.named_parameters() if name.startswith("rewrite_added.")}
    sites = recognised_sites(model, inputs)
    with attention_replaced_by(by_reference(parse_pass(text), sites, **given)):
        model(**inputs).square().mean().backward()
    wanted = {name: parameter.grad for name, parameter in added.items()}
    for parameter in added.values():
        parameter.grad = None
    changed(**inputs).square().mean().backward()
    same_gradients(changed, model)
    for name, parameter in added.items():
        # The choice of keys is hard: what predicts it learns nothing from the model's loss.
        assert parameter.requires_grad == (text == LEPE), name
        if text == LEPE:
            assert parameter.grad is not None
            assert wanted[name] is not None
            largest = float(wanted[name].abs().max())
            assert (parameter.grad - wanted[name]).abs().max() <= 256 * torch.finfo(torch.float32).eps * largest, name


def test_one_capture_serves_every_choice() -> None:
    """Another picture chooses other regions; nothing is compiled again."""
    model, inputs = deit("routed")
    changed = rewritten(model, ["routed"], inputs)
    call(changed, inputs)
    other = {"x": inputs["x"].flip(3) * 2}
    sites = recognised_sites(model, inputs)
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert compiled > 0
    actual = call(changed, other)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled
    with torch.no_grad(), attention_replaced_by(by_reference(parse_pass("routed"), sites)):
        agrees(actual, outputs(model(**other)), LAYERS)


def test_another_number_of_tokens_is_refused() -> None:
    model, inputs = deit(SPARSE, dynamic_img_size=True)
    changed = rewritten(model, [SPARSE], inputs)
    with pytest.raises(NotApplicableError, match="parameters are for 37 tokens, and there are 50"):
        call(changed, images(112, name="x")())
