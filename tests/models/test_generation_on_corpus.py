"""Selecting passes in `generate()` on models of the corpus: token for token the original with the tokens masked, run anew for each token.

`make test` runs a few cases; REWRITE_CORPUS=all every pass on every model that generates from a prompt with pictures.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from rewrite import ModelCallError, NotApplicableError, rewrite
from tests.models.corpus.cases import BY_NAME, ENTRIES, EVERYTHING
from tests.models.corpus.entry import Entry
from tests.models.masked_rules import VISUAL, Prompts
from tests.models.oracles import Rule
from tests.models.test_selection_on_corpus import ELSEWHERE, rewritten_or_skipped

STEPS = 3
GREEDY: dict[str, Any] = {"do_sample": False, "num_beams": 1, "pad_token_id": 0, "eos_token_id": None}

# Positions of two axes and of time.
CORE = {"qwen2-vl": ("fastv",)}


# Of the first prompts see themselves in both directions, so that one with a token more gives another answer; the others call their language
# model by itself, which tests/models/test_entry_points.py shows.
OTHERWISE = {"paligemma", "kosmos2", "blip-2", "instructblip"}


def chosen() -> list[tuple[str, str]]:
    if not EVERYTHING:
        return [(name, one) for name, passes in CORE.items() for one in passes]
    entries = [entry for entry in ENTRIES if entry.truth and entry.name not in OTHERWISE and generates(entry)]
    return [(entry.name, one) for entry in entries for one in VISUAL if one not in ELSEWHERE.get(entry.name, ())]


def generates(entry: Entry) -> bool:
    inputs = entry.inputs(2)
    if "input_ids" not in inputs or "decoder_input_ids" in inputs or not any(group.visual for group in entry.sites):
        return False
    model = entry.build(entry.implementations[0])
    return bool(getattr(model, "can_generate", lambda: False)())


def longer(inputs: Mapping[str, Any], token: torch.Tensor) -> dict[str, Any]:
    """A prompt with one token more, [B]."""
    length = inputs["input_ids"].shape[1]
    made = {**inputs, "input_ids": torch.cat([inputs["input_ids"], token[:, None]], 1)}
    of_tokens = [name for name, value in inputs.items() if isinstance(value, torch.Tensor) and value.shape == (len(token), length)]
    for name in set(of_tokens) - {"input_ids"}:
        made[name] = torch.nn.functional.pad(inputs[name], (0, 1), value=int(name == "attention_mask"))
    return made


def first_call(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What `generate()` calls a model with for its first token, without a cache."""
    calls: list[dict[str, Any]] = []

    def note(module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        calls.append(named)

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        model.generate(**inputs, **GREEDY, max_new_tokens=1)
    finally:
        handle.remove()
    # It gives the features of a tower that it ran ahead; here they are part of the call.
    given = {name: value for name, value in calls[0].items() if isinstance(value, torch.Tensor) and name != "cache_position"}
    return {**inputs, **given, "use_cache": False}


def as_before(seen: torch.Tensor) -> Rule:
    """What a layer saw of the prompt, and all that came since."""
    return lambda weights, alive: torch.nn.functional.pad(seen, (0, alive.shape[1] - seen.shape[1]), value=True)


def by_the_original(entry: Entry, one: str, inputs: dict[str, Any]) -> torch.Tensor:
    """The tokens that the original gives where what left is masked, [B, STEPS]."""
    model = entry.build(entry.implementations[0])
    prompts = Prompts(entry, inputs)
    oracle, made = prompts.masked(), list[torch.Tensor]()
    VISUAL[one][1](oracle, prompts)
    for _ in range(STEPS):
        logits = oracle.run(model, first_call(model, inputs)).logits
        made.append(logits[:, -1].argmax(-1))
        inputs = longer(inputs, made[-1])
        remade, seen = oracle.remade, oracle.seen_by
        oracle = Prompts(entry, inputs).masked()
        oracle.remade, oracle.before = remade, {layer: as_before(alive) for layer, alive in seen.items()}
    return torch.stack(made, 1)


@pytest.mark.parametrize(("name", "one"), chosen())
def test_token_for_token(name: str, one: str) -> None:
    entry = BY_NAME[name]
    inputs = dict(entry.inputs(2))
    changed = rewritten_or_skipped(Prompts(entry, inputs), one)
    with torch.no_grad():
        try:
            actual = changed.generate(**inputs, **GREEDY, max_new_tokens=STEPS)
        except ModelCallError as refusal:
            if not EVERYTHING:
                raise
            pytest.skip(str(refusal))
        expected = by_the_original(entry, one, inputs)
    assert torch.equal(actual[:, -STEPS:], expected)


@pytest.mark.parametrize("beams", [1, 2])
def test_a_decoder_that_would_see_what_left_its_encoder(beams: int) -> None:
    """`generate()` calls the encoder by itself; called at once, the decoder does not see what left."""
    entry = BY_NAME["florence-2"]
    inputs = dict(entry.inputs(2))
    told = r"layers.0.encoder_attn attends to .* tokens left there by token_exit\(layer=1\)"

    def answer() -> Any:
        changed = rewrite(entry.build(entry.implementations[0]), ["token_exit(layer=1)"], example_inputs=dict(entry.inputs(2)))
        del inputs["decoder_input_ids"]
        return changed.generate(**inputs, do_sample=False, num_beams=beams, max_new_tokens=2)

    # Up to torch 2.11 Dynamo cuts the model between the two, and it is refused at once.
    with torch.no_grad(), pytest.raises(NotApplicableError, match=told):
        answer()
