"""What cannot be done as asked is an error that says what to do, and the model is what it was."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from rewrite import ModelCallError, NoAttentionError, NotApplicableError, PassError, RewriteError, explain, kernels, rewrite
from tests.api.small import PASSES, deit, images, run
from tests.models.architectures import llava, llava_inputs


def facts(model: nn.Module) -> dict[str, set[str]]:
    return {name: set(vars(module)) for name, module in model.named_modules()}


@contextlib.contextmanager
def left_alone(model: nn.Module, *inputs: Any) -> Iterator[None]:
    """The model's parameters, attributes, random state and outputs are afterwards what they were."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    attributes, expected, random = facts(model), run(model, *inputs), torch.random.get_rng_state()
    yield
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert facts(model) == attributes
    assert torch.equal(torch.random.get_rng_state(), random)
    assert torch.equal(run(model, *inputs), expected)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    ("passes", "error", "words"),
    [
        (["agnt"], PassError, ["'agnt'", "did you mean agent?"]),
        (["agent(tokns=9)"], PassError, ["'tokns'", "did you mean tokens?"]),
        (["agent(tokens=0)"], PassError, ["tokens=0", "at least 1"]),
        (["agent(tokens='many')"], PassError, ["tokens='many'", "str", "must be int"]),
        (["agent", "agent(tokens=9)"], PassError, ["agent and agent(tokens=9)", "the same pass twice"]),
        ([], PassError, ["the pass list is empty", "explain(model"]),
        ([7], PassError, ["7 is neither"]),
        (["agent(tokens=__import__('os').getpid())"], PassError, ["never evaluated"]),
        (["__import__('os').abort()"], PassError, ["write name or name(parameter=literal"]),
        (["agent(tokens=9)", "token_exit(layer=1)"], NotApplicableError, ["token_exit(layer=1)", "blocks.0.attn, blocks.1.attn", "visual"]),
        (["agent(tokens=10)"], NotApplicableError, ["agent(tokens=10)", "blocks.0.attn", "blocks.1.attn", "7x7", "9 or 16 would"]),
        (["agent(layers=[5])"], NotApplicableError, ["agent(layers=(5,))", "blocks.0.attn: it is layer 0", "blocks.1.attn: it is layer 1"]),
    ],
)
def test_pass_lists(passes: list[Any], error: type[Exception], words: list[str], inplace: bool) -> None:
    model, inputs = deit(), images()
    with left_alone(model, inputs), pytest.raises(error) as caught:
        rewrite(model, passes, example_inputs=(inputs,), inplace=inplace)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert isinstance(caught.value, RewriteError)


def test_text_is_never_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getpid", lambda: pytest.fail("evaluated"))
    for text in (
        "agent(tokens=__import__('os').getpid())",
        "__import__('os').getpid()",
        "agent(tokens=9) if __import__('os').getpid() else 0",
    ):
        with pytest.raises(PassError):
            rewrite(deit(), [text])


@pytest.mark.parametrize("inplace", [False, True])
def test_a_model_without_attention(inplace: bool) -> None:
    model, inputs = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()).train(), images(2, 8, 8)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(NoAttentionError, match="no attention was recognised in Sequential"):
        rewrite(model, PASSES, example_inputs=(inputs,), inplace=inplace)
    # The running statistics of training too.
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert "_compiled_call_impl" not in vars(model)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    ("example", "error", "words"),
    [
        ((images(2, 50, 50),), AssertionError, "Input height"),
        ((torch.randn(2, 4, 112, 112),), RuntimeError, "expected input"),
        (("a picture",), AttributeError, "'str' object has no attribute 'shape'"),
        ({"picture": images()}, TypeError, "unexpected keyword argument 'picture'"),
        ([images()], TypeError, "a tuple or a mapping of keyword arguments, not list"),
        (images(), TypeError, "a tuple or a mapping of keyword arguments, not Tensor"),
    ],
)
def test_wrong_inputs_raise_the_models_own_error(example: Any, error: type[Exception], words: str, inplace: bool) -> None:
    model = deit()
    with left_alone(model, images()), pytest.raises(error, match=words) as caught:
        rewrite(model, PASSES, example_inputs=example, inplace=inplace)
    assert not type(caught.value).__module__.startswith("torch._dynamo")


@pytest.mark.parametrize(
    ("wrong", "error"),
    [(images(2, 50, 50), AssertionError), (torch.randn(2, 4, 112, 112), RuntimeError), ("a picture", AttributeError)],
    ids=["size", "channels", "type"],
)
def test_wrong_inputs_at_a_later_call(wrong: Any, error: type[Exception]) -> None:
    model, inputs = deit(), images()
    changed = rewrite(model, PASSES, example_inputs=(inputs,))
    expected = run(changed, inputs)
    for _ in range(2):
        with pytest.raises(error) as caught:
            run(changed, wrong)
        assert not type(caught.value).__module__.startswith("torch._dynamo")
    assert torch.equal(run(changed, inputs), expected)


def test_rewriting_twice() -> None:
    inputs = images()
    changed = rewrite(deit(), PASSES, example_inputs=(inputs,))
    for again in (changed, changed.blocks, nn.Sequential(changed, nn.ReLU())):
        with left_alone(changed, inputs), pytest.raises(RewriteError, match=r"rewritten already.*all the passes in one list"):
            rewrite(again, PASSES, example_inputs=(inputs,), inplace=True)
    with pytest.raises(RewriteError, match=r"model.rewrite_report"):
        explain(changed, (inputs,))


def test_added_parameters_need_example_inputs() -> None:
    model = deit()
    with left_alone(model, images()), pytest.raises(PassError, match=r"agent\(tokens=9, learnable=True\) adds parameters.*example_inputs"):
        rewrite(model, ["agent(tokens=9, learnable=True)"])


def test_what_is_no_rewritten_model_has_no_kernels() -> None:
    with pytest.raises(RewriteError, match=r"was not rewritten; kernels\(\) takes what rewrite\(\) returned"):
        kernels(deit())
    with pytest.raises(TypeError, match=r"nn.Module, not function"):
        rewrite(lambda value: value, PASSES)  # type: ignore[type-var]


def test_an_inner_backend_that_is_none() -> None:
    model = deit()
    with left_alone(model, images()), pytest.raises(RewriteError, match=r"no torch.compile backend 'inductr'; there are: .*inductor"):
        rewrite(model, PASSES, example_inputs=(images(),), backend="inductr")


def test_explain_raises_what_rewrite_would_raise() -> None:
    model, inputs = deit(), images()
    for passes, error in ((["agnt"], PassError), (["token_exit(layer=1)"], NotApplicableError)):
        with left_alone(model, inputs), pytest.raises(error):
            explain(model, (inputs,), passes)
    with left_alone(model, inputs):
        explain(model, (inputs,), ["agent(tokens=9, learnable=True)"])


@pytest.mark.parametrize("inplace", [False, True])
def test_lazily_the_first_call_raises_and_so_does_every_other(inplace: bool) -> None:
    """A model that could not be rewritten never runs as it was; the original does."""
    model, inputs = deit(), images()
    expected = run(model, inputs)
    changed = rewrite(model, ["token_exit(layer=1)"], inplace=inplace)
    for _ in range(2):
        with pytest.raises(NotApplicableError, match="no visual tokens"):
            run(changed, inputs)
    if not inplace:
        assert torch.equal(run(model, inputs), expected)


def test_switched_off_compilation_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = deit(), images()
    changed = rewrite(model, PASSES, example_inputs=(inputs,))
    expected = run(changed, inputs)
    with torch.compiler.set_stance("force_eager"):
        with pytest.raises(ModelCallError, match=r"torch.compile is switched off here.*set_stance"):
            run(changed, inputs)
        with pytest.raises(ModelCallError, match="switch it on"):
            rewrite(model, PASSES, example_inputs=(inputs,))
        with pytest.raises(ModelCallError, match="switch it on"):
            run(rewrite(model, PASSES), inputs)
    assert torch.equal(run(changed, inputs), expected)


def test_gradient_checkpointing_is_refused_and_not_ignored() -> None:
    model, inputs = deit().train(), images()
    changed = rewrite(model, PASSES, example_inputs=(inputs,))
    changed.set_grad_checkpointing(True)
    with pytest.raises(ModelCallError, match=r"blocks.0.attn cannot run with agent\(tokens=9\).*switch gradient checkpointing off"):
        changed(inputs)
    changed.set_grad_checkpointing(False)
    changed(inputs).sum().backward()
    model.set_grad_checkpointing(True)
    with pytest.raises(NoAttentionError, match="switch gradient checkpointing off"):
        rewrite(model, PASSES, example_inputs=(inputs,))


def test_entering_behind_the_patch_embedding_is_refused() -> None:
    """Agents are pooled over a grid; a call that does not show it would pool them along a line."""
    inputs = images()
    changed = rewrite(deit(), PASSES, example_inputs=(inputs,))
    patches = changed.patch_embed(inputs)
    with pytest.raises(ModelCallError, match=r"blocks.0.attn, blocks.1.attn: the grid of these tokens is not known.*call the model itself"):
        changed.blocks(patches)
    for part in (changed.blocks[0], changed.blocks[0].attn):
        with pytest.raises(ModelCallError, match=r"blocks.0.* is one layer of a rewritten model and was called by itself"):
            part(patches)
    run(changed, inputs)


def test_a_cropped_cache() -> None:
    inputs = llava_inputs()
    with torch.no_grad():
        changed = rewrite(llava("sdpa", layers=3, vision_layers=2), ["token_exit(layer=1)"], example_inputs=inputs)
        cache = changed(**inputs).past_key_values
        cache.crop(-2)
        mask = torch.ones(2, inputs["input_ids"].shape[1] - 1, dtype=torch.long)
        with pytest.raises(ModelCallError, match=r"cropped.*start again from the prompt with a new cache"):
            changed(input_ids=torch.tensor([[5], [6]]), attention_mask=mask, past_key_values=cache)
