"""One decode step with caches that are shorter than the step was traced for."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from token_models import IMAGE_TOKEN, LENGTH, VISUAL, cache_outputs, capturing, inputs, masked_from, vision_language_model
from torch import Tensor, fx

from rewrite.tokens.gather import gather_tokens
from rewrite.tokens.placement import expression
from rewrite.tokens.surgery import Selection, push_selections

LAYER = 1
KEPT = LENGTH - VISUAL


class ShortCaches:
    """Replaces the cache placeholders of layers >= LAYER by short ones; the positions are a new first input."""

    def __init__(self, positions: Tensor) -> None:
        self.positions = positions
        self.short: Mapping[fx.Node, Selection] = {}
        self.graphs = 0

    def __call__(self, module: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        self.graphs += 1
        graph = fx.Graph()
        graph.output(graph.graph_copy(module.graph, {}))  # Dynamo keeps count of the inputs of its own
        placeholders = [n for n in graph.nodes if n.op == "placeholder"]
        caches = [n for n in placeholders if "past_key_values" in n.name and any(f"layers_{i}_" in n.name for i in range(LAYER, 3))]
        with graph.inserting_before(placeholders[0]):
            positions = graph.placeholder("positions")
        with graph.inserting_before(next(n for n in graph.nodes if n.op != "placeholder")):
            kept = graph.call_method("size", (positions, 1))
        seeds: dict[fx.Node, dict[int, Selection]] = {}
        for node in caches:
            size = node.meta["example_value"].shape[2]
            numbers = [n for n in placeholders if expression(n) == expression(size)] if not isinstance(size, int) else [size]
            seeds[node] = {2: Selection(positions, numbers[0], kept)}
        self.short = push_selections(graph, seeds, cache_outputs(graph)).short
        graph.lint()
        rewritten = fx.GraphModule(module, graph)
        shortened = [placeholders.index(node) for node in caches]

        def run(*arguments: Any) -> Any:
            values = list(arguments)
            for i in shortened:
                values[i] = gather_tokens(values[i], self.positions, 2)
            return rewritten.forward(self.positions, *values)

        return run


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_decode_with_short_caches_equals_masking(implementation: str, dynamic: bool) -> None:
    model: Any = vision_language_model(implementation)
    call = inputs()
    visual = call["input_ids"] == IMAGE_TOKEN
    positions = (~visual).nonzero()[:, 1].reshape(2, KEPT)
    step = {"input_ids": torch.tensor([[7], [9]]), "attention_mask": torch.cat([call["attention_mask"], torch.ones(2, 1).long()], 1)}
    with torch.no_grad(), masked_from(model, LAYER, visual):
        cache = model(**call, use_cache=True).past_key_values
        expected = model(**step, past_key_values=copy.deepcopy(cache))
    rewrite = ShortCaches(positions)
    with torch.no_grad(), capturing():
        got = torch.compile(model, backend=rewrite, dynamic=dynamic)(**step, past_key_values=copy.deepcopy(cache))
    assert rewrite.graphs == 1
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-4, atol=1e-4)
    assert len(rewrite.short) == 2 * (3 - LAYER)
    for i, entry in enumerate(got.past_key_values.layers):
        wanted = expected.past_key_values.layers[i].keys
        if i >= LAYER:
            assert entry.keys.shape[2] == entry.values.shape[2] == KEPT + 1
            wanted = gather_tokens(wanted, torch.cat([positions, torch.full((2, 1), LENGTH)], 1), 2)
        real = step["attention_mask"].bool()
        real = gather_tokens(real, torch.cat([positions, torch.full((2, 1), LENGTH)], 1), 1) if i >= LAYER else real
        torch.testing.assert_close(entry.keys.transpose(1, 2)[real], wanted.transpose(1, 2)[real], rtol=1e-4, atol=1e-4)
