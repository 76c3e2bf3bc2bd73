"""Hedgehog: linear attention whose feature maps are learned to give the softmax's maps, with a window of softmax as LoLCATs has it.

Zhang et al. 2024, "The Hedgehog & the Porcupine", and Zhang et al. 2025, "LoLCATs: On Low-Rank Linearizing of Large Language Models". With
W a matrix [D, F] for each head, one for queries and one for keys,

    phi(x) = clamp(cat[softmax(x W), softmax(-x W)], 1e-12)
    out[i] = sum_j (phi(q_i) . phi(k_j)) v_j / (sum_j phi(q_i) . phi(k_j) + 1e-12)                      j <= i in a causal site

LoLCATs' hybrid (window > 0, causal sites) takes softmax for the last `window` keys and features for those before, under one denominator.
With s the site's scores, m_i the greatest of the window's, and g_h learned:

    out[i] = (g sum_{j > i - window} exp(s_ij - m_i) v_j + sum_{j <= i - window} (phi(q_i) . phi(k_j)) v_j) / (the same without v)

W is trained by distillation, bringing the map close to the softmax's; then the model by low-rank adaptation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import sympy
import torch

from passes import layers as layers_
from passes.linearize import dot_product
from passes.sparsify.narrowing import QUERY_POSITION
from rewrite.ir import (
    QK,
    TOTAL,
    Attend,
    AttentionInputs,
    FeatureMap,
    Fits,
    Fitting,
    J,
    Ones,
    Parameter,
    Pass,
    SharedNormaliser,
    Site,
    WindowSum,
    parameter,
    register_pass,
)
from rewrite.ir.passes import is_causal

# What the published code adds to the sum that it divides by.
EPSILON = sympy.Float(1e-12)


@register_pass
@dataclass(frozen=True)
class Hedgehog(Pass):
    """Adds hedgehog_query [H, D, features] and hedgehog_key [Hkv, D, features], the identity at first as the published code has it.

    Where query heads share a key head, that head's keys have one map; the published code repeats keys first and has one per query head.
    window adds hedgehog_factor [H], zero at first: g = sigmoid of it, a half. affine=True weighs the features' part by 1 - g. A site's own
    mask holds in both parts. Features are of queries and keys as the site has them (rotated ones where the model rotates), unscaled.
    """

    name = "hedgehog"
    family = "linearize"
    paper = (
        "Zhang, Bhatia, Kumbong, Re: The Hedgehog & the Porcupine: Expressive Linear Attentions with Softmax Mimicry, ICLR 2024 "
        "(arXiv 2402.04347); Zhang, Arora, Chalamala, Wu, Spector, Singhal, Ramesh, Re: LoLCATs: On Low-Rank Linearizing of Large "
        "Language Models, ICLR 2025 (arXiv 2410.10254)"
    )
    formula = "phi(x) = cat[softmax(x W), softmax(-x W)]; out[i] = sum_j (phi(q_i) . phi(k_j)) v_j / sum_j phi(q_i) . phi(k_j)"
    training_free = False
    fits = Fits(kinds=frozenset({"self"}))
    # Both papers distil by the cross-entropy of the maps, at 1e-2 for thousands of steps; in hundreds three times as much comes closer.
    fitting = Fitting(compares="map", map_loss="cross_entropy", learning_rate=3e-2)

    features: int = parameter(64, "columns of W; a head has twice as many features")
    window: int = parameter(0, "last keys that a query of a causal site attends to by softmax; 0 is none, LoLCATs has 64")
    affine: bool = parameter(False, "the features' part weighs 1 - g beside a window, and not 1")
    layers: tuple[int, ...] | None = parameter(None, "the layers of each stack to work on; None is every layer")

    def check(self) -> None:
        self.require(self.features >= 1, "features", "at least 1")
        self.require(self.window >= 0, "window", "at least 0")
        self.require(layers_.are_layers(self.layers), "layers", layers_.RANGE)

    def adds_parameters(self) -> bool:
        return True

    def declines(self, site: Site) -> str | None:
        return next(self._reasons_against(site), None)

    def _reasons_against(self, site: Site) -> Iterator[str]:
        yield from dot_product.reasons_against(site, self.layers)
        if self.window and not is_causal(site):
            yield f"it is not causal, and window={self.window} is of the last keys up to a query"

    def transform(self, site: Site) -> Site:
        attend, dims = site.attend, site.dims
        maps = {
            name: Parameter(f"hedgehog_{name}", (dims[heads], dims["D"], self.features), "eye")
            for name, heads in (("query", "H"), ("key", "Hkv"))
        }
        query, key = (
            FeatureMap(f"hedgehog_{name}_features", source, "softmax", maps[name].name, self.features)
            for name, source in (("query", attend.query), ("key", attend.key))
        )
        linear = replace(
            attend, query=query.result, key=key.result, score=QK, normaliser="sum", denominator=TOTAL + EPSILON, result="hedgehog_linear"
        )
        if not self.window:
            return site.with_operations(query, key, replace(linear, result=attend.result), parameters=tuple(maps.values()))
        before = sympy.And(attend.mask, sympy.Le(J, QUERY_POSITION - self.window))
        near = replace(
            attend,
            mask=sympy.And(attend.mask, sympy.Gt(J, QUERY_POSITION - self.window), sympy.Le(J, QUERY_POSITION)),
            result="hedgehog_near",
        )
        factor = Parameter("hedgehog_factor", (dims["H"],))
        return site.with_operations(
            query,
            key,
            near,
            WindowSum("hedgehog_near_total", attend.query, attend.key, attend, self.window),
            replace(linear, mask=before),
            Ones("hedgehog_ones", attend.value),
            Attend("hedgehog_linear_total", query.result, key.result, "hedgehog_ones", score=QK, mask=before, normaliser="none"),
            SharedNormaliser(
                attend.result, near.result, "hedgehog_near_total", linear.result, "hedgehog_linear_total", factor.name, self.affine
            ),
            parameters=(*maps.values(), factor),
        )

    def attention_map(self, attention: AttentionInputs) -> torch.Tensor:
        """The weights, as the published code's quadratic form has them."""
        dims, added = attention.site.dims, attention.parameters
        maps = (added["hedgehog_query"], added["hedgehog_key"].repeat_interleave(dims["H"] // dims["Hkv"], dim=0))
        features = [self._features(tokens @ weight) for tokens, weight in zip((attention.query, attention.key), maps, strict=True)]
        seen = attention.logits != -torch.inf
        products = features[0] @ features[1].transpose(-2, -1) * seen
        if not self.window:
            return products / (products.sum(-1, keepdim=True) + float(EPSILON))
        queries, keys = seen.shape[-2:]
        near = torch.ones(queries, keys, dtype=torch.bool, device=seen.device).triu(keys - queries - self.window + 1)
        logits = attention.logits.masked_fill(~near, -torch.inf)
        peak = logits.amax(-1, keepdim=True)
        factor = added["hedgehog_factor"].sigmoid()[:, None, None]
        window = factor * (logits - peak.masked_fill(peak == -torch.inf, 0.0)).exp()
        weights = window + (1 - factor if self.affine else 1.0) * products * ~near
        total = weights.sum(-1, keepdim=True)
        return weights / total.masked_fill(total == 0, 1.0)

    def reference(self, attention: AttentionInputs) -> torch.Tensor:
        """The map times the values."""
        return self.attention_map(attention) @ attention.value

    @staticmethod
    def _features(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x.softmax(-1), (-x).softmax(-1)], dim=-1).clamp(min=1e-12)
