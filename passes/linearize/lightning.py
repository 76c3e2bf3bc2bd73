"""Lightning attention: causal linear attention that forgets at a rate of its own in each head.

Qin et al. 2024, "Lightning Attention-2: A Free Lunch for Handling Unlimited Sequence Lengths in Large Language Models". With H heads, h
from 0:

    out[i] = sum_{j <= i} exp(-s_h (i - j)) (q_i . k_j) v_j,      s_h = 2^(-8 (h + 1) / H)

the slopes s_h being ALiBi's. Nothing is normalised: the models that were trained with it (TransNormerLLM) normalise the output behind it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import sympy
import torch

from passes import layers as layers_
from passes.linearize import dot_product
from passes.sparsify.narrowing import QUERY_POSITION
from rewrite.ir import QK, AttentionInputs, Fits, H, J, Pass, Site, parameter, register_pass

# The slope of the last head is 2 to the power of minus this (`_build_slope_tensor` of the published code, as in ALiBi).
SLOWEST = 8


@register_pass
@dataclass(frozen=True)
class Lightning(Pass):
    """A site's own mask holds: what it hides besides later keys (padding) weighs nothing, and counts as a step of the decay.

    scale="site" keeps the site's own factor of the dot product, which the published operator does not have. The model has to be trained
    with it: outputs are no longer averages of values.
    """

    name = "lightning"
    family = "linearize"
    paper = (
        "Qin, Sun, Li, Shen, Sun, Zhong: Lightning Attention-2: A Free Lunch for Handling Unlimited Sequence Lengths in Large Language "
        "Models, 2024 (arXiv 2401.04658)"
    )
    formula = "out[i] = sum_{j <= i} exp(-s_h (i - j)) (q_i . k_j) v_j, s_h = 2^(-8 (h + 1) / H)"
    training_free = False
    fits = Fits(kinds=frozenset({"self"}), causal=True)

    scale: Literal["none", "site"] = parameter("none", 'factor of the dot product: none, or the "site"\'s own')
    layers: tuple[int, ...] | None = parameter(None, "the layers of each stack to work on; None is every layer")

    def check(self) -> None:
        self.require(layers_.are_layers(self.layers), "layers", layers_.RANGE)

    def declines(self, site: Site) -> str | None:
        return next(self._reasons_against(site), None)

    def _reasons_against(self, site: Site) -> Iterator[str]:
        yield from dot_product.reasons_against(site, self.layers)

    def transform(self, site: Site) -> Site:
        slope = sympy.exp(-sympy.log(2) * sympy.Rational(SLOWEST, site.dims["H"]) * (H + 1))
        score = sympy.exp(-slope * (QUERY_POSITION - J)) * QK * (site.scale if self.scale == "site" else 1)
        return site.with_operations(replace(site.attend, score=score, normaliser="none"))

    def reference(self, attention: AttentionInputs) -> torch.Tensor:
        """Head by head, with the matrix of decays."""
        site, (heads, queries, keys) = attention.site, attention.logits.shape[1:]
        distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
        outputs = []
        for head in range(heads):
            slope = 2.0 ** (-SLOWEST * (head + 1) / heads)
            decay = torch.exp(-slope * distance.clamp(min=0).to(attention.query.dtype))
            weights = attention.query[:, head] @ attention.key[:, head].transpose(-2, -1) * decay
            weights = weights.masked_fill(attention.logits[:, head] == -torch.inf, 0.0)
            outputs.append(weights @ attention.value[:, head])
        return torch.stack(outputs, dim=1) * (float(site.scale) if self.scale == "site" else 1.0)
