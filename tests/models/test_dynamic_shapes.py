"""Changing a batch, a resolution or a prompt compiles no more often than it does for the model as it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from tests.api.small import PASSES, deit, images, run
from tests.models.architectures import llava, llava_inputs, rewritten

EXIT = ["token_exit(layer=1)"]
# What rewrite() captures with, so that the models are compared and not the settings.
SETTINGS = {"capture_scalar_outputs": True, "capture_dynamic_output_shape_ops": True}


class Compiles:
    """A backend that counts its calls."""

    def __init__(self) -> None:
        self.count = 0
        self.linears: list[int] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        self.count += 1
        self.linears.append(sum(node.target is torch._C._nn.linear for node in graph.graph.nodes))
        return graph.forward

    def during(self, calls: Callable[[], Any]) -> int:
        before = self.count
        calls()
        return self.count - before


@pytest.mark.parametrize("batches", [(2, 3, 4, 5), (2, 3, 4, 1, 8, 2)])
def test_batches(batches: tuple[int, ...]) -> None:
    plain, inner = Compiles(), Compiles()
    model = torch.compile(deit(), backend=plain)
    changed = rewritten(deit(), PASSES, {"x": images()}, backend=inner)
    expected = plain.during(lambda: [run(model, images(batch)) for batch in batches])
    assert 0 < inner.during(lambda: [run(changed, images(batch)) for batch in batches]) <= expected


def test_resolutions() -> None:
    sizes = ((112, 112), (112, 160), (160, 160), (144, 112), (192, 112))
    plain, inner = Compiles(), Compiles()
    model = torch.compile(deit(dynamic_img_size=True), backend=plain)
    changed = rewritten(deit(dynamic_img_size=True), PASSES, {"x": images()}, backend=inner)
    expected = plain.during(lambda: [run(model, images(2, *size)) for size in sizes])
    assert 0 < inner.during(lambda: [run(changed, images(2, *size)) for size in sizes]) <= expected


def captures(calls: Callable[[], Any]) -> int:
    """How many graphs Dynamo captures meanwhile."""
    before = counters["stats"]["unique_graphs"]
    calls()
    return counters["stats"]["unique_graphs"] - before


def test_prompts() -> None:
    prompts = [llava_inputs(text=length) for length in (14, 17, 11, 20)]
    model = torch.compile(llava("sdpa", layers=2, vision_layers=2), backend="eager")
    changed = rewritten(llava("sdpa", layers=2, vision_layers=2), EXIT, prompts[0])
    with torch._dynamo.config.patch(SETTINGS):
        expected = captures(lambda: [run(model, **prompt) for prompt in prompts])
    assert 0 < captures(lambda: [run(changed, **prompt) for prompt in prompts]) <= expected


def test_prompts_reach_the_inner_backend_whole() -> None:
    """The graph from which tokens left is compiled as one, and no more often than the model's own."""
    prompts = [llava_inputs(text=length) for length in (14, 17, 11, 20)]
    plain, inner = Compiles(), Compiles()
    model = torch.compile(llava("sdpa", layers=2, vision_layers=2), backend=plain)
    changed = rewritten(llava("sdpa", layers=2, vision_layers=2), EXIT, prompts[0], backend=inner)
    with torch._dynamo.config.patch(SETTINGS):
        expected = plain.during(lambda: [run(model, **prompt) for prompt in prompts])
    assert 0 < inner.during(lambda: [run(changed, **prompt) for prompt in prompts]) <= expected
    # The model as it is comes in several graphs, one with nearly all of it; ours leaves out what nobody reads.
    assert 2 * min(inner.linears) > max(plain.linears) > 0


def test_a_growing_cache() -> None:
    prompt, options = llava_inputs(), {"max_new_tokens": 8, "do_sample": False}
    model = llava("sdpa", layers=2, vision_layers=2)
    changed = rewritten(model, EXIT, prompt)
    # `generate()` encodes the picture by itself, in front of the first forward.
    for module in (model, model.model.vision_tower):
        module.forward = torch.compile(module.forward, backend="eager")
    with torch._dynamo.config.patch(SETTINGS):
        expected = captures(lambda: model.generate(**prompt, **options))
    assert 0 < captures(lambda: changed.generate(**prompt, **options)) <= expected
