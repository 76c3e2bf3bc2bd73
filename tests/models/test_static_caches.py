"""KV caches of fixed length (static caches) that tokens left: token for token what the original gives with these masked out."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from rewrite import ModelCallError, cached_tokens, kept_tokens
from rewrite.compiled import WHOLE_GRAPHS, KeptTokens
from tests.models.architectures import llava, llava_inputs, rewritten
from tests.models.oracles import visual_masked_from
from tests.models.test_llava import GREEDY, visual_of

STATIC: dict[str, Any] = {**GREEDY, "cache_implementation": "static"}
TEXT = "model.language_model.layers"
STEP = torch.tensor([[17], [9]])


def static_cache(model: Any, places: int) -> Any:
    from transformers import StaticCache

    return StaticCache(config=model.config.get_text_config(decoder=True), max_cache_len=places)


@contextlib.contextmanager
def masked_as(model: Any, kept: dict[str, KeptTokens]) -> Iterator[None]:
    """The oracle: in each layer of the original what the rewritten one did not see is masked out."""
    with contextlib.ExitStack() as stack:
        for layer in range(4):
            site = kept.get(f"{TEXT}.{layer}.self_attn")
            if site is not None:
                stack.enter_context(visual_masked_from(model, layer, ~site.mask))
        yield


@pytest.mark.parametrize(
    ("setting", "implementation", "options"),
    [
        ("fastv", "sdpa", {}),
        ("fastv(layer=1, drop=0.75)", "eager", {"num_beams": 3}),
        ("pyramid(layers=(1, 3))", "sdpa", {}),
        ("cls_prune(keep=0.25)", "sdpa", {"num_beams": 2}),
        ("diverse(keep=6)", "eager", {}),
        ("token_exit(layer=2)", "sdpa", {}),
        ("token_exit(relevance=0.6)", "sdpa", {}),
    ],
)
def test_pruned_prompts_in_static_caches(setting: str, implementation: str, options: dict[str, Any]) -> None:
    """Rows with their pictures at different places, one padded on the left."""
    model, inputs = llava(implementation), llava_inputs()
    changed = rewritten(model, [setting], inputs)
    with kept_tokens(changed) as kept:
        actual = changed.generate(**inputs, **STATIC, **options)
    assert kept
    with masked_as(model, kept):
        expected = model.generate(**inputs, **GREEDY, **options)
    assert torch.equal(actual, expected)
    assert not torch.equal(actual, model.generate(**inputs, **STATIC, **options))


@pytest.mark.parametrize("setting", ["dominant_contextual(dominant=6, contextual=3)", "matryoshka(tokens=4)"])
def test_tokens_made_of_others_in_static_caches(setting: str) -> None:
    """No mask of the original says what these see; what a cache that grows gives is judged elsewhere."""
    inputs = llava_inputs()
    changed = rewritten(llava("sdpa"), [setting], inputs)
    expected = changed.generate(**inputs, **GREEDY)
    assert torch.equal(changed.generate(**inputs, **STATIC), expected)
    assert not torch.equal(llava("sdpa").generate(**inputs, **GREEDY), expected)


def test_several_lengths_and_prompts_without_an_image() -> None:
    model, inputs = llava("sdpa"), llava_inputs()
    changed = rewritten(model, ["token_exit(layer=2)"], inputs)
    for batch, length in ((1, 11), (3, 17), (2, 14)):
        other = llava_inputs(batch=batch, text=length)
        with visual_masked_from(model, 2, visual_of(other)):
            expected = model.generate(**other, **GREEDY)
        assert torch.equal(changed.generate(**other, **STATIC), expected)
    text = {"input_ids": inputs["input_ids"][:, -8:], "attention_mask": inputs["attention_mask"][:, -8:]}
    assert torch.equal(changed.generate(**text, **STATIC), model.generate(**text, **STATIC))


def later(inputs: dict[str, torch.Tensor], ids: torch.Tensor, steps: int) -> dict[str, torch.Tensor]:
    """A call that goes on, `steps` tokens behind the prompt."""
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, steps + ids.shape[1]), value=1)
    return {"input_ids": ids, "attention_mask": mask}


def close(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((actual - expected).abs().max() <= 1e3 * torch.finfo(torch.float32).eps * expected.abs().max())


@torch.no_grad()
def test_one_cache_through_its_life() -> None:
    """Further turns, a copy that goes on by itself, an answer taken back, and another prompt in the same cache."""
    model, inputs = llava("sdpa"), llava_inputs()
    changed = rewritten(model, ["token_exit(layer=2)"], inputs)
    prompt, visual = inputs["input_ids"].shape[1], visual_of(inputs)
    cache, theirs = static_cache(model, 40), static_cache(model, 40)
    changed(**inputs, past_key_values=cache)
    assert cached_tokens(cache) == [40, 40, 24, 24]

    def both(ids: torch.Tensor, steps: int, own: Any, other: Any) -> None:
        call = later(inputs, ids, steps)
        unmasked = model(**call, past_key_values=copy.deepcopy(other)).logits
        with visual_masked_from(model, 2, visual):
            expected = model(**call, past_key_values=other).logits
        assert close(changed(**call, past_key_values=own).logits, expected)
        assert not close(unmasked, expected)

    with visual_masked_from(model, 2, visual):
        model(**inputs, past_key_values=theirs)
    both(torch.tensor([[17, 23, 42], [5, 6, 7]]), 0, cache, theirs)
    copies = copy.deepcopy(cache), copy.deepcopy(theirs)
    both(STEP, 3, cache, theirs)
    both(STEP + 1, 3, *copies)
    for one in (cache, theirs):
        one.crop(-1)
    both(STEP + 2, 3, cache, theirs)
    # Back into the prompt: what is written there is seen again.
    for one in (cache, theirs):
        one.crop(-(prompt + 4 - 8))
    shorter = {"input_ids": STEP, "attention_mask": inputs["attention_mask"][:, :9]}
    with visual_masked_from(model, 2, visual[:, :8]):
        expected = model(**shorter, past_key_values=theirs).logits
    assert close(changed(**shorter, past_key_values=cache).logits, expected)
    for one in (cache, theirs):
        one.reset()
    text = {"input_ids": inputs["input_ids"][:, -6:], "attention_mask": inputs["attention_mask"][:, -6:]}
    assert close(changed(**text, past_key_values=cache).logits, model(**text, past_key_values=theirs).logits)
    cache.reset()
    changed(**inputs, past_key_values=cache)
    with visual_masked_from(model, 2, visual):
        theirs.reset()
        model(**inputs, past_key_values=theirs)
    both(STEP, 0, cache, theirs)


def test_pictures_behind_a_first_turn_are_refused() -> None:
    inputs = llava_inputs()
    model = llava("sdpa")
    changed = rewritten(model, ["fastv"], inputs)
    cache = static_cache(model, 64)
    with torch.no_grad():
        changed(input_ids=torch.tensor([[5, 6, 7], [8, 9, 10]]), past_key_values=cache)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (3, 0), value=1)
        with pytest.raises(
            ModelCallError, match=r"layers.2.self_attn: fastv takes visual tokens out of a call that goes on from a KV cache"
        ):
            changed(**{**inputs, "attention_mask": mask}, past_key_values=cache)


def test_passes_that_change_attention_are_refused() -> None:
    inputs = llava_inputs()
    changed = rewritten(llava("sdpa"), ["fastv", "temperature(value=1.5)"], inputs)
    with pytest.raises(ModelCallError, match=r"layers.3.self_attn runs without temperature.*fixed length.*use a cache that grows"):
        changed.generate(**inputs, **STATIC)


def test_a_mask_that_shows_empty_places_is_an_error() -> None:
    model, inputs = llava("sdpa"), llava_inputs()
    changed = rewritten(model, ["fastv"], inputs)
    mask = torch.ones(2, 1, 30, 40, dtype=torch.bool).tril()
    with torch.no_grad():
        logits = changed(**{**inputs, "attention_mask": mask}, past_key_values=static_cache(model, 40)).logits
        assert bool(logits.isfinite().all())
        mask[1, :, 3, 35] = True
        with pytest.raises(ModelCallError, match="prompt of 30 tokens shows places behind it"):
            changed(**{**inputs, "attention_mask": mask}, past_key_values=static_cache(model, 40))


@pytest.mark.skipif(torch.__version__ < "2.12", reason="Dynamo traces the model in one graph from 2.12 on")
def test_the_backend_has_no_place_for_notes() -> None:
    model, inputs = llava("sdpa"), llava_inputs()
    with torch.no_grad(), torch._dynamo.config.patch(WHOLE_GRAPHS):
        model(**inputs)
        compiled = torch.compile(model, backend="rewrite", options={"passes": ["fastv"]})
        with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="fastv: the passes keep something beside the KV cache"):
            compiled(**inputs, past_key_values=static_cache(model, 40))
