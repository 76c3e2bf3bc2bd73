"""Early exit and sink redistribution on a LLaVA: forward, padded batches, loss, and token for token in `generate()`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rewrite import NotApplicableError, RewriteError, cached_tokens, explain, kept_tokens, parse_pass, rewrite
from tests.models.architectures import IMAGE_TOKEN, IMPLEMENTATIONS, llava, llava_inputs, rewritten, same_gradients
from tests.models.oracles import attention_replaced_by, by_reference, visual_masked_from
from tests.models.test_passes_on_models import recognised_sites

GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
EXIT = 2


def visual_of(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return inputs["input_ids"] == IMAGE_TOKEN


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_exit_in_forward(implementation: str) -> None:
    model, inputs = llava(implementation), llava_inputs()
    visual = visual_of(inputs)
    changed = rewritten(model, [f"token_exit(layer={EXIT})"], inputs)
    with torch.no_grad():
        with visual_masked_from(model, EXIT, visual):
            expected = model(**inputs, output_hidden_states=True)
        actual = changed(**inputs, output_hidden_states=True)
    real = ~visual & inputs["attention_mask"].bool()
    scale = expected.logits[real].abs().max()
    assert (actual.logits - expected.logits)[real].abs().max() <= 1e3 * torch.finfo(torch.float32).eps * scale
    assert actual.logits.shape == expected.logits.shape
    assert torch.count_nonzero(actual.logits[visual]) == 0
    tokens, left = visual.shape[1], visual.shape[1] - int(visual[0].sum())
    assert cached_tokens(actual.past_key_values) == [tokens] * EXIT + [left] * 2
    # What the model's code, and the user's, asks for is the full length.
    assert all(layer.get_seq_length() == tokens for layer in actual.past_key_values.layers)
    for index, (got, wanted) in enumerate(zip(actual.hidden_states, expected.hidden_states, strict=True)):
        assert got.shape == wanted.shape
        assert (torch.count_nonzero(got[visual]) == 0) == (index > EXIT)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_exit_in_generate(implementation: str, options: dict[str, Any]) -> None:
    model, inputs = llava(implementation), llava_inputs()
    changed = rewritten(model, [f"token_exit(layer={EXIT})"], inputs)
    visual = visual_of(inputs).repeat_interleave(options.get("num_beams", 1), dim=0)
    with visual_masked_from(model, EXIT, visual):
        expected = model.generate(**inputs, **GREEDY, **options)
    assert torch.equal(changed.generate(**inputs, **GREEDY, **options), expected)
    assert not torch.equal(model.generate(**inputs, **GREEDY, **options), expected)


def test_prompts_without_an_image_and_other_lengths() -> None:
    model, inputs = llava("sdpa"), llava_inputs()
    changed = rewritten(model, [f"token_exit(layer={EXIT})"], inputs)
    text = {"input_ids": inputs["input_ids"][:, -8:], "attention_mask": inputs["attention_mask"][:, -8:]}
    assert torch.equal(changed.generate(**text, **GREEDY), model.generate(**text, **GREEDY))
    for batch, length in ((1, 11), (3, 17)):
        other = llava_inputs(batch=batch, text=length)
        with visual_masked_from(model, EXIT, visual_of(other)):
            expected = model.generate(**other, **GREEDY)
        assert torch.equal(changed.generate(**other, **GREEDY), expected)


def test_exit_with_a_second_turn_on_the_same_cache() -> None:
    model, inputs = llava("sdpa"), llava_inputs(batch=1)
    visual = visual_of(inputs)
    changed = rewritten(model, [f"token_exit(layer={EXIT})"], inputs)
    follow = torch.tensor([[17, 23, 42]])
    mask = torch.ones(1, inputs["input_ids"].shape[1] + 3, dtype=torch.long)
    with torch.no_grad():
        first = changed(**inputs)
        second = changed(input_ids=follow, attention_mask=mask, past_key_values=first.past_key_values)
        with visual_masked_from(model, EXIT, visual):
            theirs = model(**inputs)
            expected = model(input_ids=follow, attention_mask=mask, past_key_values=theirs.past_key_values)
    scale = expected.logits.abs().max()
    assert (second.logits - expected.logits).abs().max() <= 1e3 * torch.finfo(torch.float32).eps * scale


def test_loss_and_gradients_after_exit() -> None:
    model, inputs = llava("eager").train(), llava_inputs()
    visual = visual_of(inputs)
    labels = inputs["input_ids"].masked_fill(visual | (inputs["attention_mask"] == 0), -100)
    # The last visual token predicts the first word after the image; it has left, so that word is not a label either.
    labels[:, 1:][visual[:, :-1]] = -100
    # What padding predicts is nobody's answer.
    labels[:, 1:][inputs["attention_mask"][:, :-1] == 0] = -100
    changed = rewrite(model, [f"token_exit(layer={EXIT})"], example_inputs={**inputs, "labels": labels})
    loss = changed(**inputs, labels=labels).loss
    loss.backward()
    with visual_masked_from(model, EXIT, visual):
        expected = model(**inputs, labels=labels).loss
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    same_gradients(changed, model)


def test_a_layer_beyond_the_stack_is_an_error() -> None:
    with pytest.raises(NotApplicableError, match="4"):
        rewritten(llava("sdpa"), ["token_exit(layer=40)"], llava_inputs())


def relevances(model: Any, inputs: dict[str, torch.Tensor]) -> list[float]:
    """By layer of the language model, the attention that the last query gives to visual tokens."""
    visual, found = visual_of(inputs), []

    def attention(query: Any, key: Any, value: torch.Tensor, logits: torch.Tensor, number: int) -> torch.Tensor:
        weights = logits.softmax(-1).nan_to_num(0.0)
        if number >= 3:  # behind the vision tower's
            found.append(float((weights[:, :, -1].mean(1) * visual).sum()))
        return weights @ value

    with torch.no_grad(), attention_replaced_by(attention):
        model(**inputs)
    return found


def test_exit_where_the_image_is_not_relevant_any_more() -> None:
    """For each of several prompts the layer is another one, by the attention alone; from there on it is the exit at that layer."""
    model = llava("sdpa")
    batches = [{**llava_inputs(batch=1), "pixel_values": 2.0**seed * torch.randn(1, 3, 56, 56)} for seed in range(3)]
    found = [relevances(model, inputs) for inputs in batches]

    def layers(below: float) -> list[int]:
        return [next((layer for layer in range(1, 4) if each[layer - 1] < below), 4) for each in found]

    below = max((1.0001 * share for each in found for share in each), key=lambda share: len(set(layers(share))))
    assert len(set(layers(below))) > 1
    changed = rewritten(model, [f"token_exit(relevance={below})"], batches[0])
    assert any("as if none did" in note for note in changed.rewrite_report.notes)
    for inputs, layer in zip(batches, layers(below), strict=True):
        with kept_tokens(changed) as kept:
            actual = changed.generate(**inputs, **GREEDY)
        assert [int(one.mask.sum(1)[0]) for one in kept.values()] == [30] * (layer - 1) + [14] * (4 - layer)
        with visual_masked_from(model, layer, visual_of(inputs)):
            assert torch.equal(actual, model.generate(**inputs, **GREEDY))
    small = llava("sdpa", layers=2, vision_layers=2)
    compiled = rewritten(small, [f"token_exit(relevance={below})"], batches[0], backend="aot_eager")
    with pytest.raises(NotApplicableError, match="needs backend='eager'"), torch.no_grad():
        compiled(**batches[0])


SINKS = "sink_redistribution(tau=2.2, first_layer=1, rho=0.6, summ=0.1)"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_sinks_in_generate(implementation: str) -> None:
    """Decoding with a cache equals recomputing the whole sequence with the pass's reference at every layer, the prompt's sinks kept."""
    one, inputs = parse_pass(SINKS), llava_inputs()
    model = llava(implementation, layers=5)
    changed = rewritten(model, [SINKS], inputs)
    assert changed.rewrite_report.counts()["rewritten"] > 0
    oracle = llava("sdpa", layers=5)
    with torch.no_grad():
        oracle(**inputs)
        sites = recognised_sites(oracle, inputs)
    chosen = [site if site.layout.visual and one.declines(site) is None else None for site in sites]
    hidden: dict[int, torch.Tensor] = {}

    def keep(module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        hidden[module.self_attn.layer_idx] = arguments[0] if arguments else keywords["hidden_states"]

    for layer in oracle.model.language_model.layers:
        layer.register_forward_pre_hook(keep, with_kwargs=True)
    prompt, ids, mask = inputs["input_ids"].shape[1], inputs["input_ids"], inputs["attention_mask"]

    def hidden_of(site: Any) -> torch.Tensor:
        states = hidden[site.layer].clone()
        states[:, prompt:] = 0
        return states

    for _ in range(GREEDY["max_new_tokens"]):
        visual = ids == IMAGE_TOKEN
        with torch.no_grad(), attention_replaced_by(by_reference(one, chosen, hidden=hidden_of, visual=lambda site, v=visual: v)):
            logits = oracle(input_ids=ids, attention_mask=mask, pixel_values=inputs["pixel_values"], use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    actual = changed.generate(**inputs, **GREEDY)
    assert torch.equal(actual, ids)
    assert not torch.equal(model.generate(**inputs, **GREEDY), ids)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_passes_together(implementation: str) -> None:
    """One pass of each family on one model, in one report; decoding with caches equals a forward over the whole sequence."""
    model, inputs = llava(implementation, layers=5), llava_inputs()
    passes = ["neighborhood(window=3)", "token_exit(layer=3)", SINKS]
    changed = rewritten(model, passes, inputs)
    touched = {by.split("(")[0] for site in changed.rewrite_report.sites for by in site.passes}
    assert touched == {"neighborhood", "token_exit", "sink_redistribution"}
    ids = changed.generate(**inputs, **GREEDY)
    prompt = inputs["input_ids"].shape[1]
    mask = torch.cat([inputs["attention_mask"], torch.ones(len(ids), ids.shape[1] - prompt, dtype=torch.long)], dim=1)
    with torch.no_grad():
        logits = changed(input_ids=ids, attention_mask=mask, pixel_values=inputs["pixel_values"], use_cache=False).logits
    # Without a cache the generated tokens are judged for sinks too; with this threshold none of them is one.
    assert torch.equal(logits[:, prompt - 1 : -1].argmax(-1), ids[:, prompt:])


def test_pruning_exit_sinks_and_temperature() -> None:
    """In one list: sinks of layers that see every visual token. Where a pass left fewer, the refusal names the two."""
    model, inputs = llava("sdpa", layers=4), llava_inputs()
    passes = ["token_exit(layer=3)", SINKS, "temperature(value=1.5)"]
    hired, refused = "hired(keep=0.5)", r"layers.1.self_attn: sink_redistribution.* into groups.* and hired\(keep=0.5\) leaves"
    with pytest.raises(NotApplicableError, match=refused):
        rewritten(model, [hired, *passes], inputs)
    with torch.no_grad():
        sites = explain(model, inputs, [hired, passes[0], passes[2]]).sites[-4:]
    assert [site.passes for site in sites] == [*3 * [(hired, passes[2])], (hired, passes[0], passes[2])]
    changed = rewritten(model, passes, inputs)
    by_layer = [{by.split("(")[0] for by in site.passes} for site in changed.rewrite_report.sites][-4:]
    assert by_layer == [{"temperature"}, {"sink_redistribution"}, {"sink_redistribution"}, {"token_exit", "temperature"}]
    with kept_tokens(changed) as kept:
        ids = changed.generate(**inputs, **GREEDY)
    ((_, left),) = kept.items()
    assert torch.equal(left.mask, ~visual_of(inputs))
    prompt = inputs["input_ids"].shape[1]
    mask = torch.cat([inputs["attention_mask"], torch.ones(len(ids), ids.shape[1] - prompt, dtype=torch.long)], dim=1)
    with torch.no_grad():
        logits = changed(input_ids=ids, attention_mask=mask, pixel_values=inputs["pixel_values"], use_cache=False).logits
    assert torch.equal(logits[:, prompt - 1 : -1].argmax(-1), ids[:, prompt:])
    with pytest.raises(RewriteError, match="not rewritten"), kept_tokens(model):
        pass
