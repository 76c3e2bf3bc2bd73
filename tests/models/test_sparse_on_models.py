"""Sparse attention on real models of pictures and videos against the original with attention by the passes' references."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from rewrite import AttentionInputs, parse_pass, rewrite
from tests.models.architectures import call, images, outputs, rewritten, same_gradients, timm_model
from tests.models.corpus.transformers_vision import VISION
from tests.models.oracles import attention_replaced_by
from tests.models.test_passes_on_models import agrees, recognised_sites


def vision_transformer() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    return timm_model("deit_small_patch16_224", depth=4)("sdpa"), images(224, 1, "x")()


def video_model() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    known = next(entry for entry in VISION if entry.name == "videomae")
    return known.build("sdpa"), dict(known.inputs(2))


# Layer by layer: a picture of 14 x 14 patches, and a video of 2 frames of 7 x 7.
CASES: dict[str, Any] = {
    "picture": (
        vision_transformer,
        ["halo(block=4, halo=2, layers=(0,))", "grid(size=7, layers=(1, 2))",
         "neighborhood(window=5, stride=3, causal=(True, False), layers=(3,))"],
    ),
    "video": (video_model, ["neighborhood(window=(1, 3, 2), dilation=(1, 1, 2))"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_forward_and_training(case: str) -> None:
    build, texts = CASES[case]
    model, inputs = build()
    sites, chosen = recognised_sites(model, inputs), [parse_pass(text) for text in texts]
    by_layer = [next(one for one in chosen if one.declines(site) is None) for site in sites]
    assert set(by_layer) == set(chosen)
    before = call(model, inputs)
    changed = rewrite(model, texts, example_inputs=inputs)
    assert [site.passes for site in changed.rewrite_report.sites] == [(str(one),) for one in by_layer]

    def reference(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, logits: torch.Tensor, number: int) -> torch.Tensor:
        return by_layer[number].reference(AttentionInputs(query, key, value, logits, sites[number]))

    with attention_replaced_by(reference):
        (expected,) = outputs(model(**inputs))
    (actual,) = outputs(changed(**inputs))
    agrees([actual.detach()], [expected.detach()], len(sites))
    assert (before[0] - actual).abs().max() > 1e-3 * before[0].abs().max()
    expected.square().mean().backward()
    actual.square().mean().backward()
    same_gradients(changed, model)


def test_windows_of_a_hierarchical_model_are_declined() -> None:
    """Its sites attend in windows already; the last stage is one window, and has the grid to itself."""
    model = timm_model("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1))("sdpa")
    changed = rewritten(model, ["halo(block=3, halo=1)"], images(224, 1, "x")())
    windowed, last = changed.rewrite_report.sites[:-1], changed.rewrite_report.sites[-1]
    assert all("windows of 7x7" in site.reason for site in windowed)
    assert last.passes == ("halo(block=3, halo=1)",)
