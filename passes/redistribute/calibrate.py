"""Attention calibration (ACT): heads that attend to sinks behind the first one give that attention to the other keys.

Yu et al. 2024, "Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language Models without Training through Attention
Calibration". A key is a sink of a head where the queries that see it attend to it by more than a threshold on average, the first such key
of the head (the initial sink) left out. In the listed heads, with m_sinks and m_others the softmax masses of the two groups of keys,

    a'[sink]  = beta * a[sink]
    a'[other] = (1 + (1 - beta) * m_sinks / m_others) * a[other]

so that rows still sum to one. Which heads gain from it is found offline by a sweep over a task's samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, Self

import sympy
import torch

from passes import layers as layers_
from rewrite.ir import (
    NK,
    NQ,
    AttentionInputs,
    Fits,
    Groups,
    I,
    J,
    Pass,
    ReceivedSinks,
    Site,
    Statistic,
    W,
    conjuncts,
    mass,
    parameter,
    register_pass,
)
from rewrite.ir.site import is_causal_term

# In the order of the codes that ReceivedSinks gives.
GROUPS = ("other", "sink")

# A row whose other keys have no mass has nobody to give to, and is left as it is.
LEAST_MASS = 1e-20


@register_pass
@dataclass(frozen=True)
class Calibrate(Pass):
    """heads: (layer, head) of each head that is calibrated, as a sweep found them; "all" is every head of the layers.

    Sinks are those of the prompt: tokens that come behind a KV cache are none. Queries count only for keys up to themselves, so that
    padding on the left makes no sinks; padding on the right counts as any other query.
    """

    name = "calibrate"
    family = "redistribute"
    paper = (
        "Yu, Wang, Fu, Shi, Shaikh, Lin: Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language Models without Training "
        "through Attention Calibration, ICML 2024 (arXiv 2406.15765)"
    )
    formula = (
        "a'[sink] = beta a[sink]; a'[other] = a[other] (1 + (1-beta) m_sinks / m_others); sink: mean_i a[i,j] > threshold, not the first"
    )
    fits = Fits(kinds=frozenset({"self"}), causal=True)

    beta: float = parameter(0.4, "share of their attention that sinks keep; 1 changes nothing")
    threshold: float = parameter(0.1, "a key is a sink where it receives more attention than this on average")
    heads: tuple[tuple[int, int], ...] | Literal["all"] = parameter(
        "all", '(layer, head) of each head to calibrate, or "all" of the layers'
    )
    layers: tuple[int, ...] | None = parameter(tuple(range(2, 31)), "the layers of each stack to work on; None is every layer")

    def check(self) -> None:
        self.require(0.0 <= self.beta <= 1.0, "beta", "between 0 and 1")
        self.require(0.0 < self.threshold < 1.0, "threshold", "between 0 and 1")
        listed = () if isinstance(self.heads, str) else self.heads
        self.require(
            self.heads == "all" or (len(listed) > 0 and len(set(listed)) == len(listed) and all(min(pair) >= 0 for pair in listed)),
            "heads",
            'pairs (layer, head) from 0, each once, or "all"',
        )
        self.require(layers_.are_layers(self.layers), "layers", layers_.RANGE)

    @classmethod
    def identity(cls) -> Self:
        return cls(beta=1.0)

    def _listed(self, site: Site) -> tuple[int, ...] | None:
        """The heads of a layer, in order; None for all of them."""
        if isinstance(self.heads, str):
            return None
        return tuple(sorted(head for layer, head in self.heads if layer == site.layer))

    def declines(self, site: Site) -> str | None:
        return next(self._reasons_against(site), None)

    def _reasons_against(self, site: Site) -> Iterator[str]:
        if reason := layers_.reason_against(self.layers, site):
            yield reason
        if not site.is_plain:
            yield f"an earlier pass changed it: it is made of {len(site.body.operations)} operations"
        listed, count = self._listed(site), site.dims["H"]
        if listed is not None and not listed:
            yield f"it is layer {site.layer}, and heads lists none of its heads"
        if listed and max(listed) >= count:
            yield f"it has {count} heads, 0 to {count - 1}, and heads lists head {max(listed)} of its layer {site.layer}"

    def transform(self, site: Site) -> Site:
        if self.beta == 1.0:
            return site
        # Where a model hides keys by adding a number that is large and finite, rows of padding see every key.
        by_mask = any(is_causal_term(each) for each in conjuncts(site.attend.mask))
        term = W if by_mask else sympy.Piecewise((W, J <= I + NK - NQ), (sympy.Integer(0), True))
        received = Statistic("attention_received", site.attend, "queries", term)
        sinks = ReceivedSinks("attention_sinks", received.result, site.attend.query, self.threshold, self._listed(site))
        groups = Groups(sinks.result, GROUPS, self._weights(), per_head=True)
        return site.with_operations(received, sinks, replace(site.attend, groups=groups))

    def _weights(self) -> tuple[sympy.Expr, ...]:
        """One factor per group, in the order of GROUPS."""
        other, sink = mass("other"), mass("sink")
        given = other > LEAST_MASS
        gain = 1 + (1 - self.beta) * sink / sympy.Max(other, LEAST_MASS)
        one = sympy.Integer(1)
        return sympy.Piecewise((gain, given), (one, True)), sympy.Piecewise((sympy.Float(self.beta), given), (one, True))

    def reference(self, attention: AttentionInputs) -> torch.Tensor:
        """Head by head, the map itself changed; where there is a KV cache the sinks of its prompt are not known, and there are none."""
        weights, site = attention.logits.softmax(-1).nan_to_num(0.0), attention.site
        result, (queries, keys) = weights.clone(), weights.shape[-2:]
        listed = self._listed(site)
        for row in range(weights.shape[0] if queries == keys else 0):
            for head in range(weights.shape[1]) if listed is None else listed:
                before = weights[row, head]
                mean = before.tril().sum(0) / torch.arange(keys, 0, -1, dtype=weights.dtype)
                sinks = (mean > self.threshold).nonzero().flatten().tolist()[1:]
                others = [key for key in range(keys) if key not in sinks]
                for query in range(queries):
                    left = before[query, others].sum()
                    if left > 0:
                        freed = (1 - self.beta) * before[query, sinks].sum()
                        result[row, head, query, sinks] *= self.beta
                        result[row, head, query, others] += freed * before[query, others] / left
        return result @ attention.value
