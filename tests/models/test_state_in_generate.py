"""A long prompt goes through the state, what is generated behind it pair by pair over the KV cache: one sequence all the same."""

from __future__ import annotations

import pytest
import torch

from codegen import torch_streaming
from rewrite import rewrite
from tests.models.test_linear_on_models import llama


def test_generation_behind_a_long_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Left-padded rows; every token that was generated over the cache is what the whole sequence at once says."""
    ids = torch.randint(3, 60, (2, 600), generator=torch.Generator().manual_seed(2))
    inputs = {"input_ids": ids, "attention_mask": (torch.arange(600) >= torch.tensor([[0], [37]])).long()}
    changed = rewrite(llama(), ["lightning(scale='site')"], example_inputs=inputs)
    taken: set[tuple[bool, bool]] = set()
    chosen = torch_streaming.through_state

    def through_state(attend, operands, tensors):  # type: ignore[no-untyped-def]
        found = chosen(attend, operands, tensors)
        taken.add((operands[0].shape[2] > 1, found is not None))
        return found

    monkeypatch.setattr(torch_streaming, "through_state", through_state)
    tokens = changed.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert taken == {(True, True), (False, False)}
    seen = torch.cat([inputs["attention_mask"], torch.ones(2, 2, dtype=torch.int64)], 1)
    with torch.no_grad():
        logits = changed(input_ids=tokens[:, :-1], attention_mask=seen).logits
    assert torch.equal(logits[:, 599:].argmax(-1), tokens[:, 600:])
