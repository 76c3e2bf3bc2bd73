"""A rewritten model is a model like any other: what can be done with the original can be done with it."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode

from rewrite import RewriteError, kernels, rewrite
from tests.api.small import PASSES, close, deit, images, run, vit
from tests.models.architectures import llava, llava_inputs, rewritten, same_gradients


def changed_deit(**options: Any) -> nn.Module:
    with torch.no_grad():
        return rewrite(deit(**options), PASSES, example_inputs=(images(),))


def test_same_class_same_keys_and_the_original_untouched() -> None:
    model, inputs = deit(), images()
    before, state, attributes = run(model, inputs), copy.deepcopy(model.state_dict()), set(vars(model))
    changed = rewrite(model, PASSES, example_inputs=(inputs,))
    assert type(changed) is type(model)
    assert list(changed.state_dict()) == list(state)
    assert set(vars(model)) == attributes
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.mul_(2)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(run(model, inputs), before)


def test_in_place() -> None:
    model, inputs = deit(), images()
    expected, original = run(changed_deit(), inputs), run(model, inputs)
    state = {name: value.data_ptr() for name, value in model.state_dict().items()}
    assert rewrite(model, PASSES, example_inputs=(inputs,), inplace=True) is model
    assert {name: value.data_ptr() for name, value in model.state_dict().items()} == state
    assert torch.equal(run(model, inputs), expected)
    assert not close(expected, original, 1e4)


def test_added_parameters_are_the_only_new_keys() -> None:
    model, inputs = deit(), images()
    changed = rewrite(model, ["agent(tokens=9, learnable=True)"], example_inputs=(inputs,))
    new = set(changed.state_dict()) - set(model.state_dict())
    assert set(model.state_dict()) <= set(changed.state_dict())
    assert new
    assert all(name.startswith("rewrite_added.blocks.") for name in new)
    with torch.no_grad():
        for name, parameter in changed.named_parameters():
            if name in new:
                parameter.normal_()
    other = rewrite(model, ["agent(tokens=9, learnable=True)"], example_inputs=(inputs,))
    assert not torch.equal(run(other, inputs), run(changed, inputs))
    other.load_state_dict(changed.state_dict())
    assert torch.equal(run(other, inputs), run(changed, inputs))


def test_load_state_dict_takes_effect() -> None:
    model, inputs = deit(), images()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    changed = changed_deit()
    before = run(changed, inputs)
    changed.load_state_dict(model.state_dict())
    assert torch.equal(run(changed, inputs), run(rewrite(model, PASSES, example_inputs=(inputs,)), inputs))
    assert not torch.equal(run(changed, inputs), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_after_rewriting(dtype: torch.dtype) -> None:
    changed, inputs = changed_deit(), images()
    expected = run(changed, inputs)
    changed.to(dtype=dtype)
    actual = run(changed, inputs.to(dtype))
    assert actual.dtype == dtype
    # What the weights and two layers of activations lose; and it is still not what the original computes.
    assert close(actual, expected, 16, max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps * 16))
    assert not close(actual, run(deit().to(dtype), inputs.to(dtype)), 16, torch.finfo(dtype).eps)


def test_autocast() -> None:
    changed, inputs = changed_deit(), images()
    expected = run(changed, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        actual = run(changed, inputs)
    assert actual.dtype == torch.bfloat16
    assert close(actual, expected, 16, torch.finfo(torch.bfloat16).eps)
    assert torch.equal(run(changed, inputs), expected)


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize("called", [False, True], ids=["before any call", "after a call"])
@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), saved_and_loaded])
def test_copies_keep_the_rewriting(again: Any, called: bool) -> None:
    changed, inputs = changed_deit(), images()
    if called:
        run(changed, inputs)
    twin = again(changed)
    assert type(twin) is type(changed)
    assert torch.equal(run(twin, inputs), run(changed, inputs))
    assert [kernel.source for kernel in kernels(twin)] == [kernel.source for kernel in kernels(changed)]
    assert twin.rewrite_report.to_dict() == changed.rewrite_report.to_dict()
    # The twin is a model of its own.
    expected = run(changed, inputs)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.count_nonzero(run(twin, inputs)) == 0
    assert torch.equal(run(changed, inputs), expected)
    with pytest.raises(RewriteError, match="rewritten already"):
        rewrite(twin, PASSES)


def test_a_lazily_rewritten_model_is_copied_before_its_first_call() -> None:
    inputs = images()
    twin = copy.deepcopy(rewrite(deit(), PASSES))
    assert torch.equal(run(twin, inputs), run(changed_deit(), inputs))


def test_save_pretrained_is_read_by_the_original_class(tmp_path: Path) -> None:
    model, inputs = vit(), {"pixel_values": images()}
    changed = rewritten(model, PASSES, inputs)
    assert not torch.equal(run(changed, **inputs), run(model, **inputs))
    changed.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(run(loaded, **inputs), run(model, **inputs))
    assert torch.equal(run(rewritten(loaded, PASSES, inputs), **inputs), run(changed, **inputs))


def test_training_and_evaluation() -> None:
    changed, inputs = changed_deit(), images()
    expected = run(changed, inputs)
    changed.train()
    changed(inputs).square().sum().backward()
    assert all(parameter.grad is not None for parameter in changed.parameters())
    changed.eval()
    assert torch.equal(run(changed, inputs), expected)
    twin = rewrite(deit().train(), PASSES, example_inputs=(inputs,))
    twin(inputs).square().sum().backward()
    same_gradients(changed, twin)


def test_batch_and_image_sizes() -> None:
    model = deit(dynamic_img_size=True)
    changed = rewritten(model, PASSES, {"x": images()})
    for shape in ((1, 112, 112), (2, 112, 160)):
        inputs = images(*shape)
        expected = run(rewritten(model, PASSES, {"x": inputs}), inputs)
        assert close(run(changed, inputs), expected), shape
        assert not close(run(model, inputs), expected, 1e4), shape


def test_no_more_recompilations_than_the_model_as_it_is() -> None:
    def captures(model: Any) -> int:
        counters.clear()
        for batch in (2, 3, 4, 1, 8, 2):
            run(model, images(batch))
        return counters["stats"]["unique_graphs"]

    as_it_is = captures(torch.compile(deit(), backend="eager"))
    assert 0 < captures(changed_deit()) <= as_it_is


def test_repeatable_and_undisturbed_by_others() -> None:
    """Two models of one class, with other passes and weights, in one process."""
    model, inputs = deit(), images()
    one = changed_deit()
    first = run(one, inputs)
    other = rewritten(model, ["neighborhood(window=3)"], {"x": inputs})
    second = run(other, inputs)
    for _ in range(2):
        assert torch.equal(run(one, inputs), first)
        assert torch.equal(run(other, inputs), second)
        assert not torch.equal(run(model, inputs), first)
    assert not close(first, second, 1e4)


def test_ten_models_of_one_class() -> None:
    """Dynamo's recompilation limit is per code object; models must not share one."""
    inputs = images()
    models = [rewrite(deit(depth=1, embed_dim=24), PASSES) for _ in range(10)]
    outputs = [run(model, inputs) for model in models]
    assert all(torch.equal(output, outputs[0]) for output in outputs)


@pytest.mark.parametrize("lazily", [False, True])
def test_threads(lazily: bool) -> None:
    """Two threads call one model with their own batch sizes; lazily, they race to rewrite it."""
    inputs = [images(batch, seed=batch) for batch in (2, 3)]
    reference = changed_deit()
    expected = [run(reference, each) for each in inputs]
    model = rewrite(deit(), PASSES) if lazily else changed_deit()
    problems: list[Any] = []
    barrier = threading.Barrier(2)

    def work(index: int) -> None:
        barrier.wait()
        for _ in range(3):
            try:
                actual = run(model, inputs[index])
                if not close(actual, expected[index]):
                    problems.append((actual - expected[index]).abs().max())
            except Exception as error:
                problems.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
    assert len(model.rewrite_report.sites) == 2
    assert model.rewrite_report.graphs == 1


def test_hooks_put_on_later_are_called() -> None:
    changed, inputs = changed_deit(), images()
    run(changed, inputs)
    seen: list[torch.Size] = []
    handle = changed.blocks[0].register_forward_hook(lambda module, arguments, output: seen.append(output.shape))
    run(changed, inputs)
    run(changed, inputs)
    assert seen == [torch.Size([2, 50, 48])] * 2
    handle.remove()
    run(changed, inputs)
    assert len(seen) == 2


def test_parts_of_a_llava_run_rewritten_when_called_alone() -> None:
    model, inputs = llava("sdpa", layers=2, vision_layers=2), llava_inputs()
    changed, pixels = rewritten(model, ["agent(tokens=4)"], inputs), inputs["pixel_values"]
    projected: list[torch.Tensor] = []
    hook = changed.model.multi_modal_projector.register_forward_hook(lambda module, arguments, output: projected.append(output.clone()))
    with torch.no_grad():
        changed(**inputs)
        hook.remove()
        assert len(projected) == 1
        features = changed.get_image_features(pixels).pooler_output
        assert close(torch.stack(list(features)), projected[0])
        tower, theirs = (one.model.vision_tower(pixels, output_hidden_states=True) for one in (changed, model))
        # LLaVA takes the last layer but one, without the class token.
        layer = model.config.vision_feature_layer
        again = changed.model.multi_modal_projector(tower.hidden_states[layer][:, 1:])
        compiled = torch.compile(lambda given: changed.get_image_features(given).pooler_output, backend="eager")(pixels)
    assert close(torch.stack(list(compiled)), projected[0])
    assert close(again, projected[0])
    assert not close(tower.last_hidden_state, theirs.last_hidden_state, 1e4)


def test_a_users_own_compilation_keeps_the_rewriting() -> None:
    changed, inputs = changed_deit(), images()
    expected = run(changed, inputs)
    assert torch.equal(run(torch.compile(changed, backend="eager"), inputs), expected)
    wrapped = nn.Sequential(changed, nn.Linear(10, 4))
    assert close(run(torch.compile(wrapped, backend="eager"), inputs), run(wrapped[1], expected))
    assert torch.equal(run(torch.compile(lambda pictures: 2 * changed(pictures), backend="eager"), inputs), 2 * expected)
    with pytest.raises(RewriteError, match=r"compiles itself.*backend='inductor'"):
        changed.compile(backend="eager")
    assert torch.equal(run(changed, inputs), expected)


def test_flop_counter_counts_the_rewritten_work() -> None:
    model, changed, inputs = deit(), changed_deit(), images()
    counted = []
    for each in (model, changed, changed):
        with FlopCounterMode(display=False) as counter:
            run(each, inputs)
        counted.append(counter.get_total_flops())
    # Per layer, image and head: 50 tokens x 9 agents twice in place of 50 x 50, each a product with queries and one with values.
    tokens, agents, heads, width = 50, 9, 3, 16
    fewer = 2 * 2 * heads * (2 * 2 * tokens * tokens - 2 * 2 * 2 * tokens * agents) * width
    assert counted[0] - counted[1] == fewer
    assert counted[1] == counted[2]
