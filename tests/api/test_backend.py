"""The torch.compile backend "rewrite", and the inner backends that receive the rewritten graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rewrite import rewrite
from tests.api.small import PASSES, close, deit, images, run, vit
from tests.models.architectures import rewritten, same_gradients


def compiled(model: Any, options: Any = None) -> Any:
    return torch.compile(model, backend="rewrite", options=options)


def test_it_is_listed() -> None:
    assert "rewrite" in torch._dynamo.list_backends(exclude_tags=())


@pytest.mark.parametrize("passes", [PASSES, "agent(tokens=9)", ["neighborhood(window=3)"]])
def test_it_computes_what_rewrite_computes(passes: Any) -> None:
    model, inputs = deit(), images()
    expected = run(rewritten(model, passes, {"x": inputs}), inputs)
    assert torch.equal(run(compiled(model, {"passes": passes}), inputs), expected)
    assert not close(run(model, inputs), expected, 1e4)


def test_an_inner_backend() -> None:
    model, inputs = deit(), images()
    seen: list[Any] = []

    def inner(graph: Any, given: Any) -> Any:
        seen.append(graph)
        return graph.forward

    expected = run(rewritten(model, PASSES, {"x": inputs}), inputs)
    assert close(run(compiled(model, {"passes": PASSES, "backend": inner}), inputs), expected)
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pases": PASSES}, "got 'pases'"),
        ({"passes": PASSES, "mode": "fast"}, "passes=.* and backend=.*'mode'"),
        ({}, "got none"),
        (None, "got none"),
        ({"passes": ["agnt"]}, "did you mean agent"),
        ({"passes": ["token_exit(layer=1)"]}, r"token_exit\(layer=1\) fits none of 2 attention sites.*no visual tokens"),
        ({"passes": ["agent(tokens=9, learnable=True)"]}, r"adds parameters to the model, which needs rewrite\("),
    ],
)
def test_refusals(options: Any, words: str) -> None:
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=words):
        run(compiled(deit(), options), images())


def test_a_pass_that_fits_nothing_beside_one_that_does_is_told() -> None:
    with pytest.warns(UserWarning, match=r"token_exit\(layer=1\) fits none of 2 attention sites"):
        run(compiled(deit(), {"passes": ["agent(tokens=9)", "token_exit(layer=1)"]}), images())


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_inner_backends_agree(backend: str) -> None:
    """Forward and gradients, within float32 round-off."""
    model, inputs = (vit() if backend == "aot_eager" else deit(depth=1)), images()
    results = []
    for inner in ("eager", backend):
        changed = rewrite(model, PASSES, example_inputs=(inputs,), backend=inner)
        result = changed(inputs)
        result = result if isinstance(result, torch.Tensor) else result.logits
        result.square().sum().backward()
        results.append((changed, result.detach()))
    (one, expected), (other, actual) = results
    assert close(actual, expected)
    same_gradients(other, one)
