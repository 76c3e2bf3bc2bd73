"""Contrastive decoding against a rewritten model: what it would say, too, is made less likely.

DAMRO (Gong et al. 2024) decodes against the model that sees outlier tokens alone; any pass list can take their place. With l of the model
and n of the rewritten one, for each next token:

    l' = (1 + alpha) l - alpha n   where l >= max(l) + log(beta),   -inf elsewhere
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from rewrite.api import rewrite
from rewrite.ir.errors import ModelCallError
from rewrite.ir.passes import Pass


class Contrast:
    """A logits processor, ``(input_ids [B, L], scores [B, V]) -> scores [B, V]``, that decodes against `negative`; see `contrast`.

    It runs the negative model beside the generation, with a KV cache of its own that grows step by step, and starts again at the prompt
    where tokens are not those of the step before and more.
    """

    def __init__(self, negative: nn.Module, inputs: Mapping[str, Any], alpha: float, beta: float) -> None:
        self.negative, self.inputs, self.alpha, self.beta = negative, dict(inputs), alpha, beta
        self._seen: torch.Tensor | None = None
        self._result: Any = None

    @torch.no_grad()
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        against = self._logits(input_ids).to(scores)
        plausible = scores >= scores.amax(-1, keepdim=True) + math.log(self.beta)
        return ((1 + self.alpha) * scores - self.alpha * against).masked_fill(~plausible, -torch.inf)

    def _logits(self, ids: torch.Tensor) -> torch.Tensor:
        """[B, V]: of the negative model behind the tokens `ids` [B, L]."""
        prompt = self.inputs["input_ids"]
        if ids.shape[0] != prompt.shape[0] or not torch.equal(ids[:, : prompt.shape[1]], prompt):
            raise ModelCallError(
                f"contrastive decoding was set up for the prompt of {list(prompt.shape)} tokens in its inputs, and is asked about "
                f"{list(ids.shape)} that do not begin with it: give generate() the same inputs, and neither beams nor several sequences"
            )
        seen = self._seen
        if seen is None or not torch.equal(ids[:, : seen.shape[1]], seen):
            self._result = self.negative(**self.inputs, use_cache=True)
            seen = prompt
        if seen.shape[1] < ids.shape[1]:
            mask = self.inputs.get("attention_mask", torch.ones_like(prompt))
            mask = torch.cat([mask, mask.new_ones(len(mask), ids.shape[1] - prompt.shape[1])], 1)
            cache = self._result.past_key_values
            self._result = self.negative(input_ids=ids[:, seen.shape[1] :], attention_mask=mask, past_key_values=cache, use_cache=True)
        self._seen = ids
        logits: torch.Tensor = self._result.logits[:, -1]
        return logits


def contrast(
    model: nn.Module, passes: Sequence[str | Pass] | str | Pass, inputs: Mapping[str, Any], alpha: float = 0.5, beta: float = 0.1
) -> Contrast:
    """A logits processor that decodes `model` against itself under `passes`: ``model.generate(**inputs, logits_processor=[processor])``.

    inputs: what `generate()` will be given, `input_ids` [B, N] among them; one processor is for one prompt. alpha: how much is taken off,
    above 0. beta: tokens less likely than beta times the likeliest are never chosen, above 0 and at most 1. The defaults are DAMRO's for
    POPE, whose pass list is "outlier_tokens"; its other settings are alpha 1.5 and 2. The rewritten model shares the parameters of
    `model`. Greedy decoding and sampling; with beams or several sequences it raises `ModelCallError`, as for another prompt. Raises
    `ValueError` for alpha or beta out of range, and what `rewrite` raises.
    """
    if not (alpha > 0 and 0 < beta <= 1):
        raise ValueError(f"alpha is above 0, and beta above 0 and at most 1; not {alpha} and {beta}")
    sharing = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    with torch.no_grad():
        negative = rewrite(sharing, passes, example_inputs=inputs, inplace=True)
    return Contrast(negative, inputs, alpha, beta)
