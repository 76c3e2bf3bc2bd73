"""What becomes of patches in a graph: moved, computed token by token, or ended, with the first reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

from rewrite.tokens.relaid import Trail


def trail_of(function: Callable[..., torch.Tensor]) -> tuple[Trail, fx.Node]:
    """That of the first input [2, 6, 4] of a function, and the node that it returns; the second input is [6, 4]."""
    graphs: list[fx.Graph] = []

    def backend(module: fx.GraphModule, inputs: Any) -> Any:
        graphs.append(module.graph)
        return module.forward

    torch._dynamo.reset()
    torch.compile(function, backend=backend)(torch.randn(2, 6, 4), torch.randn(6, 4))
    given = next(node for node in graphs[0].nodes if node.op == "placeholder" and len(node.meta["example_value"].shape) == 3)
    output: Any = next(node for node in graphs[0].nodes if node.op == "output").args[0]
    return Trail(graphs[0], {given: 2}, {}), output[0]


@pytest.mark.parametrize(
    ("function", "channel"),
    [
        (lambda x, w: x.view(2, 2, 3, 4).permute(3, 0, 2, 1).flatten(1, 2)[:, 1:], 0),
        (lambda x, w: torch.nn.functional.linear(torch.nn.functional.gelu(x), w).mT, 1),
        (lambda x, w: torch.cat([x, w.expand(2, 6, 4).to(x)], 1), 2),
        (lambda x, w: torch.stack([x[1], x[0]]) * torch.sigmoid(w), 2),
        (lambda x, w: (x * torch.sigmoid(x) + w).split([2, 4], 1)[1], 2),
    ],
    ids=["raster", "projector", "beside", "reordered", "gated"],
)
def test_movement(function: Callable[..., torch.Tensor], channel: int) -> None:
    trail, result = trail_of(function)
    assert trail.laid[result].channel == channel
    assert result not in trail.ended


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (lambda x, w: x + x.flip(1), "computes over them"),
        (lambda x, w: x.roll(1, 1) + x, "mixes them with one another"),
        (lambda x, w: x[:, ::2].mean(1), "computes over them"),
        (lambda x, w: x.view(2, 3, 8), "channels of several"),
        (lambda x, w: x[..., :2], "not all of one's"),
        (lambda x, w: torch.nn.functional.linear(x.mT, torch.ones(3, 6)), "computes over several"),
        (lambda x, w: torch.where(w > 0, x, w), "computes over them"),
        (lambda x, w: torch.cat([x, x.mean(1, keepdim=True)], 1), "computes over them"),
        (lambda x, w: torch.cat([x, x.mT.reshape(2, 6, 4)], 1), "channels of several"),
    ],
    ids=["flipped", "mixed", "mean", "joined", "cut", "over tokens", "replaced", "summary", "channels beside"],
)
def test_what_ends_it(function: Callable[..., torch.Tensor], told: str) -> None:
    trail, result = trail_of(function)
    assert result not in trail.laid
    assert told in trail.ended[result]
