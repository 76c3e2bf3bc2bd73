"""Every pass on real models equals the original model in which attention is the pass's own reference."""

from __future__ import annotations

import pytest
import torch

from rewrite import Pass, explain, parse_pass, rewrite
from rewrite.session import Session
from tests.models.architectures import BY_NAME, IMPLEMENTATIONS, call, outputs, rewritten, same_gradients
from tests.models.oracles import attention_replaced_by, by_reference

VISION = ("timm-deit-s-224", "timm-deit-s-384", "timm-vit-b-224", "deit-s-224", "clip-vision-224", "dinov2-s-224")
CASES = [(name, text) for name in VISION for text in ("neighborhood(window=5)", "neighborhood(window=3, dilation=2)", "agent(tokens=49)")]
CASES += [("clip-text", "neighborhood(window=6)")]


def recognised_sites(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> list[object]:
    """The sites of the model as the compiler knows them, in call order."""
    sites: list[object] = []
    session = Session(model, (), "eager")
    session.record = lambda record: sites.extend(record.program.sites)  # type: ignore[method-assign]
    with torch.no_grad():
        session._capture((), inputs)
    return sites


def agrees(actual: list[torch.Tensor], expected: list[torch.Tensor], layers: int) -> None:
    for got, wanted in zip(actual, expected, strict=True):
        # Each layer adds rounding of sums over up to a thousand keys and channels in float32.
        budget = 256 * layers * torch.finfo(torch.float32).eps * wanted.abs().max()
        assert (got - wanted).abs().max() <= budget


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("name", "text"), CASES)
def test_pass_equals_its_reference(name: str, text: str, implementation: str) -> None:
    architecture = BY_NAME[name]
    one: Pass = parse_pass(text)
    fused, inputs = architecture.build("sdpa"), architecture.inputs()
    call(fused, inputs)
    with torch.no_grad():
        sites = recognised_sites(fused, inputs)
        with attention_replaced_by(by_reference(one, sites)):
            expected = outputs(fused(**inputs))
    changed = rewritten(architecture.build(implementation), [text], inputs)
    assert changed.rewrite_report.counts()["rewritten"] == architecture.sites
    actual = call(changed, inputs)
    agrees(actual, expected, architecture.sites)
    plain = call(fused, inputs)
    assert any((got - was).abs().max() > 1e-3 * was.abs().max() for got, was in zip(actual, plain, strict=True))


def test_agent_with_learnable_parameters_starts_where_it_is_without() -> None:
    architecture = BY_NAME["timm-deit-s-224"]
    model, inputs = architecture.build("sdpa"), architecture.inputs()
    without = call(rewritten(model, ["agent"], inputs), inputs)
    learnable = rewrite(model, ["agent(learnable=True)"], example_inputs=inputs)
    agrees(call(learnable, inputs), without, architecture.sites)
    added = [name for name in learnable.state_dict() if name not in model.state_dict()]
    assert added
    assert all(name.startswith("rewrite_added.") for name in added)
    assert set(model.state_dict()) <= set(learnable.state_dict())
    loss = learnable(**inputs).square().mean()
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in learnable.named_parameters() if name.startswith("rewrite_added.")}
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())
    assert any(gradient.abs().max() > 0 for gradient in gradients.values())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_in_training(implementation: str) -> None:
    """Identity in training mode: every gradient of the model is what it was."""
    architecture = BY_NAME["deit-s-224"]
    model, inputs = architecture.build(implementation).train(), architecture.inputs()
    changed = rewrite(model, ["neighborhood(window='all')"], example_inputs=inputs)
    for one in (model, changed):
        one(**inputs).last_hidden_state.square().mean().backward()
    same_gradients(changed, model)


@pytest.mark.parametrize("text", ["neighborhood(window=5)", "agent(tokens=49)"])
def test_gradients_of_a_pass_equal_those_of_its_reference(text: str) -> None:
    architecture = BY_NAME["timm-deit-s-224"]
    model, inputs = architecture.build("sdpa").train(), architecture.inputs()
    sites = recognised_sites(model, inputs)
    changed = rewrite(model, [text], example_inputs=inputs)
    with attention_replaced_by(by_reference(parse_pass(text), sites)):
        model(**inputs).square().mean().backward()
    changed(**inputs).square().mean().backward()
    same_gradients(changed, model)


def test_explain_changes_nothing() -> None:
    architecture = BY_NAME["timm-deit-s-224"]
    model, inputs = architecture.build("sdpa"), architecture.inputs()
    keys = set(vars(model))
    before = call(model, inputs)
    report = explain(model, inputs, ["agent"])
    assert report.counts() == {"rewritten": 12, "kept": 0, "declined": 0}
    assert set(vars(model)) == keys
    assert all(torch.equal(x, y) for x, y in zip(before, call(model, inputs), strict=True))
