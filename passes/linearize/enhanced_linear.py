"""Enhanced linear attention: ReLU features, a denominator that cannot vanish, and a learned temperature.

Zheng 2023, "The Linear Attention Resurrection in Vision Transformer" (L2ViT). With t_h a temperature for each head:

    out[i] = t_h sum_j (relu(q_i) . relu(k_j)) v_j / max(sum_j relu(q_i) . relu(k_j), 100)

L2ViT alternates this, over the whole grid, with softmax attention in windows: of a vision transformer that attends globally, give every
other layer (layers=(1, 3, 5, ...)) to this pass and the rest to `grid` or `neighborhood`. Its local concentration module (7 x 7 depthwise
convolution, GELU, batch normalisation, convolution) is a residual branch of its own behind the attention's output projection, no part of
the attention, and is not added here; nor are its convolutional position encodings.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import sympy
import torch

from passes import layers as layers_
from passes.linearize import dot_product
from rewrite.ir import (
    QK,
    TOTAL,
    AttentionInputs,
    FeatureMap,
    Fits,
    Parameter,
    Pass,
    Site,
    W,
    parameter,
    register_pass,
    tensor,
)

TEMPERATURE = "enhanced_temperature"


@register_pass
@dataclass(frozen=True)
class EnhancedLinear(Pass):
    """Adds enhanced_temperature [H], which starts at the site's own scale (D^-0.5), as the paper's does.

    A site's own mask holds. What the temperature starts at makes outputs smaller than averages of values by that factor, and the floor of
    the denominator by more where a query's features are small: the model has to be trained with it.
    """

    name = "enhanced_linear"
    family = "linearize"
    paper = "Zheng: The Linear Attention Resurrection in Vision Transformer, 2023 (L2ViT, arXiv 2501.16182)"
    formula = "out[i] = t_h sum_j (relu(q_i) . relu(k_j)) v_j / max(sum_j relu(q_i) . relu(k_j), 100)"
    training_free = False
    fits = Fits(kinds=frozenset({"self"}), causal=False, cached=False)

    smallest: float = parameter(100.0, "the least that is divided by")
    layers: tuple[int, ...] | None = parameter(None, "the layers of each stack to work on; None is every layer")

    def check(self) -> None:
        self.require(self.smallest > 0.0, "smallest", "above 0")
        self.require(layers_.are_layers(self.layers), "layers", layers_.RANGE)

    def adds_parameters(self) -> bool:
        return True

    def declines(self, site: Site) -> str | None:
        return next(self._reasons_against(site), None)

    def _reasons_against(self, site: Site) -> Iterator[str]:
        yield from dot_product.reasons_against(site, self.layers)

    def transform(self, site: Site) -> Site:
        attend = site.attend
        query, key = (FeatureMap(f"enhanced_{name}", name, "relu") for name in (attend.query, attend.key))
        linear = replace(
            attend,
            query=query.result,
            key=key.result,
            score=QK,
            normaliser="sum",
            denominator=sympy.Max(TOTAL, sympy.nsimplify(self.smallest)),
            weight=tensor(TEMPERATURE, "h") * W,
        )
        temperature = Parameter(TEMPERATURE, (site.dims["H"],), ("constant", float(site.scale)))
        return site.with_operations(query, key, linear, parameters=(temperature,))

    def reference(self, attention: AttentionInputs) -> torch.Tensor:
        """The published order: keys with values first, where nothing is masked; the map otherwise."""
        query, key, temperature = attention.query.relu(), attention.key.relu(), attention.parameters[TEMPERATURE][:, None, None]
        hidden = attention.logits == -torch.inf
        if not hidden.any():
            total = query @ key.sum(2, keepdim=True).transpose(-2, -1)
            return query @ (key.transpose(-2, -1) @ attention.value * temperature) / total.clamp(min=self.smallest)
        products = (query @ key.transpose(-2, -1)).masked_fill(hidden, 0.0)
        return temperature * products @ attention.value / products.sum(-1, keepdim=True).clamp(min=self.smallest)
