"""Sigmoid attention: every weight by itself, with no normaliser over keys.

Ramapuram et al. 2024, "Theory, Analysis, and Best Practices for Sigmoid Self-Attention" (FlashSigmoid). The bias b = -log(n) keeps the
sum of n weights near one where training begins:

    out[i] = sum_j sigmoid(score[i,j] + b) v[j]

A pretrained softmax model does not keep its accuracy until it has been trained so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import sympy
import torch

from passes import layers as layers_
from passes.redistribute import row_length as row_length_
from rewrite.ir import AttentionInputs, Fits, Pass, Sigmoid, Site, parameter, register_pass


@register_pass
@dataclass(frozen=True)
class SigmoidAttention(Pass):
    """Hidden keys weigh nothing.

    bias "auto" is -log(n) with n = row_len(i) (see `passes.redistribute.row_length`). In a causal site that differs from row to row, where
    the paper takes one sequence length for all: decoding with a KV cache then continues what the prompt's forward computed.
    """

    name = "sigmoid"
    family = "redistribute"
    paper = (
        "Ramapuram, Danieli, Dhekane, Weers, Busbridge, Ablin, Likhomanenko, Digani, Gu, Shidani, Webb: Theory, Analysis, and Best "
        "Practices for Sigmoid Self-Attention, ICLR 2025 (arXiv 2409.04431)"
    )
    formula = "out[i] = sum_j sigmoid(score[i,j] + b) v[j], b = -log(row_len(i))"
    training_free = False
    fits = Fits(kinds=frozenset({"self"}))

    bias: float | Literal["auto"] = parameter("auto", 'b, added to every logit; "auto" is -log of the number of keys')
    layers: tuple[int, ...] | None = parameter(None, "the layers of each stack to work on; None is every layer")

    def check(self) -> None:
        self.require(self.bias == "auto" or math.isfinite(self.bias), "bias", 'finite, or "auto"')
        self.require(layers_.are_layers(self.layers), "layers", layers_.RANGE)

    def declines(self, site: Site) -> str | None:
        return next(self._reasons_against(site), None)

    def _reasons_against(self, site: Site) -> Iterator[str]:
        if reason := layers_.reason_against(self.layers, site):
            yield reason
        if not site.is_plain:
            yield f"an earlier pass changed it: it is made of {len(site.body.operations)} operations"
        if self.bias == "auto" and (unknown := row_length_.reason_against(site)):
            yield unknown

    def transform(self, site: Site) -> Site:
        bias = -sympy.log(row_length_.row_length(site)) if self.bias == "auto" else sympy.Float(self.bias)
        return site.with_operations(replace(site.attend, score=Sigmoid(site.attend.score + bias), normaliser="none"))

    def reference(self, attention: AttentionInputs) -> torch.Tensor:
        """FlashSigmoid's own form of the sigmoid, 0.5 (1 + tanh(x / 2))."""
        logits = attention.logits
        bias = -row_length_.row_lengths(attention.site, logits).log() if self.bias == "auto" else self.bias
        return 0.5 * (1 + ((logits + bias) / 2).tanh()) @ attention.value
