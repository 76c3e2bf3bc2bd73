"""Temperatures: the logits of self-attention made smaller or larger before the softmax, by a constant or by the length of the row.

With n = row_len(i) the number of keys that query i's position admits (see `passes.redistribute.row_length`):

    constant    logits / t                                  Gu et al. 2022, against adversarial patches, without training
    position    logits * (1 + exp(-exp(beta)) * log(n))     Zhang et al. 2024, Selective Self-Attention, as released
    log         logits * (1 + beta * log(n))                the same, the released variant without the outer function

Only the position temperature of Selective Self-Attention has been released; its token-aware temperatures are not here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, Self

import sympy
import torch

from passes import layers as layers_
from passes.redistribute import row_length as row_length_
from rewrite.ir import AttentionInputs, Fits, H, Parameter, Pass, Site, parameter, read, register_pass

# The value where none is given: the constant is this project's choice, the others are where the released code starts.
DEFAULTS = {"constant": 2.0, "position": 2.0, "log": 1e-5}

# The largest beta: exp(-exp(beta)) is zero in double precision well before it, and exp(beta) still finite in half precision.
LARGEST_BETA = 10.0

BETA = "temperature_beta"


@register_pass
@dataclass(frozen=True)
class Temperature(Pass):
    """Logits are all of the score: scaled products and biases.

    learnable adds `temperature_beta` [1] to every layer, which begins at `value`; of the kinds "position" and "log" only.
    """

    name = "temperature"
    family = "redistribute"
    paper = (
        "Gu, Tresp, Qin: Are Vision Transformers Robust to Patch Perturbations?, ECCV 2022 (constant); Zhang, Chang, Li, Roy-Chowdhury, "
        "Chen, Oymak: Selective Attention, NeurIPS 2024 (arXiv 2411.12892; position, log)"
    )
    formula = "a[i] = softmax(f(i) score[i]), f(i) = 1/t, or 1 + exp(-exp(beta)) log(row_len(i)), or 1 + beta log(row_len(i))"
    fits = Fits(kinds=frozenset({"self"}))

    kind: Literal["constant", "position", "log"] = parameter("constant", 'what the temperature is made of: "constant", "position", "log"')
    value: float | None = parameter(None, "t of a constant, beta of the others; None is 2, 2 and 1e-5")
    learnable: bool = parameter(False, "make beta a parameter of every layer")
    layers: tuple[int, ...] | None = parameter(None, "the layers of each stack to work on; None is every layer")

    def check(self) -> None:
        if self.kind == "constant":
            self.require(math.isfinite(self.start) and self.start > 0.0, "value", "positive and finite, being a temperature")
        elif self.kind == "position":
            self.require(abs(self.start) <= LARGEST_BETA, "value", f"between -{LARGEST_BETA:g} and {LARGEST_BETA:g}, being beta")
        else:
            self.require(math.isfinite(self.start) and self.start >= 0.0, "value", "at least 0 and finite, being beta")
        self.require(not self.learnable or self.kind != "constant", "learnable", 'False for kind="constant"')
        self.require(layers_.are_layers(self.layers), "layers", layers_.RANGE)

    @property
    def start(self) -> float:
        """The temperature, or beta, or what beta begins at."""
        return DEFAULTS[self.kind] if self.value is None else self.value

    @classmethod
    def identity(cls) -> Self:
        return cls(value=1.0)

    def adds_parameters(self) -> bool:
        return self.learnable

    def declines(self, site: Site) -> str | None:
        return next(self._reasons_against(site), None)

    def _reasons_against(self, site: Site) -> Iterator[str]:
        if reason := layers_.reason_against(self.layers, site):
            yield reason
        if not site.is_plain:
            yield f"an earlier pass changed it: it is made of {len(site.body.operations)} operations"
        if self.kind != "constant" and (unknown := row_length_.reason_against(site)):
            yield unknown

    def transform(self, site: Site) -> Site:
        score = site.attend.score * self._factor(site)
        added = (Parameter(BETA, (1,), ("constant", self.start)),) if self.learnable else ()
        return site.with_operations(replace(site.attend, score=score), parameters=added)

    def _factor(self, site: Site) -> sympy.Expr:
        if self.kind == "constant":
            return sympy.Float(1.0 / self.start) if self.start != 1.0 else sympy.Integer(1)
        beta = read(BETA, H) if self.learnable else sympy.Float(self.start)
        share = sympy.exp(-sympy.exp(beta)) if self.kind == "position" else beta
        return 1 + share * sympy.log(row_length_.row_length(site))

    def reference(self, attention: AttentionInputs) -> torch.Tensor:
        """Row by row, the lengths counted out."""
        logits = attention.logits
        if self.kind == "constant":
            return (logits / self.start).softmax(-1).nan_to_num(0.0) @ attention.value
        beta = attention.parameters[BETA] if self.learnable else torch.tensor(self.start, dtype=logits.dtype)
        share = torch.exp(-torch.exp(beta)) if self.kind == "position" else beta
        return (logits * (1 + share * row_length_.row_lengths(attention.site, logits).log())).softmax(-1).nan_to_num(0.0) @ attention.value
