"""A selection pushed through a whole vision-language model equals that model with the dropped tokens masked out of attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from token_models import (
    IMAGE_TOKEN,
    LENGTH,
    VISUAL,
    cache_outputs,
    capturing,
    compiled,
    drop_before,
    inputs,
    masked_from,
    vision_language_model,
    whole_graphs,
)
from torch import Tensor, fx

from rewrite.tokens.gather import gather_tokens
from rewrite.tokens.surgery import Selection, push_selections

pytestmark = whole_graphs

KEPT = LENGTH - VISUAL


class Exit:
    """Drops the visual tokens before a layer in the graph that has the language model."""

    def __init__(self, layer: int) -> None:
        self.layer = layer
        self.short: Mapping[fx.Node, Selection] = {}

    def __call__(self, module: fx.GraphModule) -> None:
        graph = module.graph
        mask = next(n for n in graph.nodes if n.target == "masked_scatter").args[1].args[0].args[0]
        short, selection = drop_before(graph, self.layer, mask, KEPT)
        self.short = push_selections(graph, {short: {1: selection}}, cache_outputs(graph)).short


@pytest.fixture(params=["eager", "sdpa"])
def model(request: pytest.FixtureRequest) -> Any:
    return vision_language_model(request.param)


@pytest.mark.parametrize("layer", [0, 2])
def test_forward_equals_masking_in_every_later_attention(model: Any, layer: int) -> None:
    call = inputs()
    visual = call["input_ids"] == IMAGE_TOKEN
    with torch.no_grad(), masked_from(model, layer, visual):
        expected = model(**call)
    rewrite = Exit(layer)
    with torch.no_grad(), capturing():
        got = compiled(model, rewrite)(**call)
    rows = ~visual & call["attention_mask"].bool()
    torch.testing.assert_close(got.logits[rows], expected.logits[rows], rtol=1e-4, atol=1e-4)
    assert not got.logits[visual].any()
    assert got.logits[rows].any()
    assert len(rewrite.short) == 2 * (3 - layer)
    positions = (~visual).nonzero()[:, 1].reshape(2, KEPT)
    for i, (keys, values) in enumerate((entry.keys, entry.values) for entry in got.past_key_values.layers):
        assert keys.shape[2] == values.shape[2] == (KEPT if i >= layer else LENGTH)
        wanted = expected.past_key_values.layers[i].keys
        wanted = gather_tokens(wanted, positions, 2) if i >= layer else wanted
        real = gather_tokens(rows, positions, 1) if i >= layer else call["attention_mask"].bool() & ~visual
        torch.testing.assert_close(keys.transpose(1, 2)[real], wanted.transpose(1, 2)[real], rtol=1e-4, atol=1e-4)


def test_autograd_traces_through_the_rewritten_graph() -> None:
    model: Any = vision_language_model("sdpa")
    call = inputs()
    visual = call["input_ids"] == IMAGE_TOKEN
    rewrite = Exit(1)

    def backend(module: fx.GraphModule, example_inputs: list[Any]) -> Any:
        rewrite(module)
        module.recompile()
        return torch._dynamo.lookup_backend("aot_eager")(module, example_inputs)

    with torch.no_grad(), masked_from(model, 1, visual):
        expected = model(**call).logits
    with torch.no_grad(), capturing():
        got = torch.compile(model, backend=backend)(**call).logits
    rows = ~visual & call["attention_mask"].bool()
    torch.testing.assert_close(got[rows], expected[rows], rtol=1e-4, atol=1e-4)


def test_loss_and_gradients_equal_the_oracle(model: Any) -> None:
    call = inputs(padding=False)
    visual = call["input_ids"] == IMAGE_TOKEN
    ignored = visual | visual.roll(1, 1)  # the token after the last visual one is predicted by a dropped one
    call["labels"] = torch.where(ignored, -100, call["input_ids"])
    call["attention_mask"][1, :3] = 0
    call["labels"][1, :4] = -100

    def run(function: Any) -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        loss = function(**call).loss
        loss.backward()
        return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    with masked_from(model, 1, visual):
        expected, wanted = run(model)
    with capturing():
        got, gradients = run(compiled(model, Exit(1)))
    torch.testing.assert_close(got, expected)
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_a_row_with_other_visual_tokens_fails_at_run_time() -> None:
    from rewrite.ir.errors import ModelCallError

    model: Any = vision_language_model("sdpa")
    with torch.no_grad(), capturing():
        call = inputs()
        run = compiled(model, Exit(1))
        run(**call)
        call["input_ids"][0, 0], call["input_ids"][1, 7] = IMAGE_TOKEN, 3
        with pytest.raises(ModelCallError, match="same number of visual tokens"):
            run(**call)
