"""Contrastive decoding against the outlier tokens alone (DAMRO), by hand and in `generate()`."""

from __future__ import annotations

import math

import pytest
import torch

from rewrite import ModelCallError, contrast
from tests.models.architectures import llava, llava_inputs
from tests.models.oracles import attention_replaced_by, best
from tests.models.test_llava import GREEDY, visual_of

ALPHA, BETA, KEEP = 1.5, 0.05, 3


def test_against_the_outlier_tokens_alone() -> None:
    model, inputs = llava("sdpa"), llava_inputs()
    visual, chosen = visual_of(inputs), torch.zeros(2, 16, dtype=torch.bool)

    def outliers_alone(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, logits: torch.Tensor, number: int) -> torch.Tensor:
        """The tower's second layer, whose output the features are, chooses; in the language model the other visual keys are masked."""
        if number == 1:
            q, k = (one.transpose(1, 2).flatten(2) for one in (query, key))
            score = (q[:, :1] @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)[:, 0, 1:]
            chosen.copy_(best(score, torch.ones_like(chosen), KEEP))
        if number >= 3:
            gone = torch.zeros(2, logits.shape[-1], dtype=torch.bool)
            gone[:, : visual.shape[1]] = visual.masked_scatter(visual, ~chosen)
            logits = logits.masked_fill(gone[:, None, None], -math.inf)
        return logits.softmax(-1).nan_to_num(0.0) @ value

    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    for _ in range(GREEDY["max_new_tokens"]):
        given = {"input_ids": ids, "attention_mask": mask, "pixel_values": inputs["pixel_values"], "use_cache": False}
        with torch.no_grad():
            own = model(**given).logits[:, -1]
            with attention_replaced_by(outliers_alone):
                against = model(**given).logits[:, -1]
        told = ((1 + ALPHA) * own - ALPHA * against).masked_fill(own < own.amax(-1, keepdim=True) + math.log(BETA), -math.inf)
        ids, mask = torch.cat([ids, told.argmax(-1, keepdim=True)], 1), torch.cat([mask, mask.new_ones(2, 1)], 1)
    processor = contrast(model, f"outlier_tokens(keep={KEEP})", inputs, ALPHA, BETA)
    for _ in range(2):  # the second time it starts again at the prompt
        assert torch.equal(model.generate(**inputs, **GREEDY, logits_processor=[processor]), ids)
    assert not torch.equal(model.generate(**inputs, **GREEDY), ids)
    assert {tensor.data_ptr() for tensor in processor.negative.parameters()} == {tensor.data_ptr() for tensor in model.parameters()}
    for asked in (ids[:1], ids[:, 1:], ids[:, :4]):
        with pytest.raises(ModelCallError, match="neither beams nor several sequences"):
            processor(asked, torch.zeros(len(asked), 200))
    with pytest.raises(ValueError, match="above 0"):
        contrast(model, "outlier_tokens", inputs, alpha=0.0)
