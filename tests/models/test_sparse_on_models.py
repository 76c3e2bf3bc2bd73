"""Sparse attention on real models: forward passes and `generate()` against the original with attention by the pass's reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional

from rewrite import AttentionInputs, Pass, Site, parse_pass
from tests.models.architectures import IMAGE_TOKEN, call, images, llava, llava_inputs, rewritten, timm_model
from tests.models.oracles import attention_replaced_by, by_reference, plain
from tests.models.test_passes_on_models import agrees, recognised_sites

GREEDY: dict[str, Any] = {"max_new_tokens": 2, "do_sample": False}
GRIDS = ("halo(block=4, halo=2)", "grid(size=7)", "neighborhood(window=5, stride=3, causal=(True, False))")


@pytest.mark.parametrize("text", GRIDS)
def test_on_a_vision_transformer(text: str) -> None:
    one, inputs = parse_pass(text), images(224, 1, "x")()
    model = timm_model("deit_small_patch16_224", depth=2)("sdpa")
    changed = rewritten(model, [text], inputs)
    assert changed.rewrite_report.counts()["rewritten"] == 2
    with torch.no_grad(), attention_replaced_by(by_reference(one, recognised_sites(model, inputs))):
        expected = [model(**inputs)]
    agrees(call(changed, inputs), expected, 2)
    (before,), (actual,) = call(model, inputs), call(changed, inputs)
    assert (before - actual).abs().max() > 1e-3 * before.abs().max()


def test_windows_of_a_hierarchical_model_are_declined() -> None:
    """Its sites attend in windows already; the last stage is one window, and has the grid to itself."""
    model = timm_model("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1))("sdpa")
    changed = rewritten(model, ["halo(block=3, halo=1)"], images(224, 1, "x")())
    windowed, last = changed.rewrite_report.sites[:-1], changed.rewrite_report.sites[-1]
    assert all("windows of 7x7" in site.reason for site in windowed)
    assert last.passes == ("halo(block=3, halo=1)",)


def attention_of(passes: list[Pass], sites: list[Site], visual: torch.Tensor) -> Callable[..., torch.Tensor]:
    """Attention in `generate()` as the passes say, each where it fits; sites in call order, of which decoding runs the language's."""
    language = [site for site in sites if site.layout.visual]

    def function(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, logits: torch.Tensor, number: int) -> torch.Tensor:
        site = sites[number] if number < len(sites) else language[(number - len(sites)) % len(language)]
        chosen = [one for one in passes if one.fits.reason_against(site) is None and one.declines(site) is None]
        if not chosen:
            return plain(query, key, value, logits, number)
        known = functional.pad(visual, (0, logits.shape[-1] - visual.shape[1]))  # what is generated is text
        # A decoding step has one query, of which transformers lays the heads that share a key head on the axis of queries.
        shape = logits.shape[:3]
        if number >= len(sites):
            key, value = (operand.repeat_interleave(shape[2], dim=1) for operand in (key, value))
            query, logits = (operand.flatten(1, 2).unsqueeze(2) for operand in (query, logits))
        result = chosen[0].reference(AttentionInputs(query=query, key=key, value=value, logits=logits, site=site, visual=known))
        return result.reshape(*shape, -1)

    return function


@pytest.mark.parametrize(
    ("texts", "implementation"),
    [(["composite(layers=(0,))", "window(window=6, sinks=5, layers=(1,))"], "eager"), (["modality_mutual"], "sdpa")],
)
def test_in_generate(texts: list[str], implementation: str) -> None:
    """Token for token: padded rows, grouped heads, prefill and decoding with a cache."""
    sizes, inputs = {"layers": 2, "vision_layers": 2}, llava_inputs()
    model, oracle = llava(implementation, **sizes), llava("sdpa", **sizes)
    with torch.no_grad():
        oracle(**inputs)
        sites = recognised_sites(oracle, inputs)
        before = model(**inputs).logits
    changed = rewritten(model, texts, inputs)
    language = [site.passes for site in changed.rewrite_report.sites if "language_model" in site.qualified_name]
    assert language == ([(text,) for text in texts] * 2)[:2]
    function = attention_of([parse_pass(text) for text in texts], sites, inputs["input_ids"] == IMAGE_TOKEN)
    with torch.no_grad(), attention_replaced_by(function):
        expected = oracle(**inputs).logits
    with torch.no_grad():
        actual = changed(**inputs).logits
    real, largest = inputs["attention_mask"].bool(), expected.abs().max()
    assert (actual - expected)[real].abs().max() <= 1e3 * torch.finfo(torch.float32).eps * largest
    assert (actual - before)[real].abs().max() > 1e-3 * largest
    with attention_replaced_by(function):
        tokens = oracle.generate(**inputs, **GREEDY)
    assert torch.equal(changed.generate(**inputs, **GREEDY), tokens)
