"""Composite attention: in a language model, visual tokens attend to nothing but themselves, and text attends as before.

Ma et al. 2024, "EE-MLLM: A Data-Efficient and Compute-Efficient Multimodal Large Language Model". A visual token that sees itself alone
gets its own value, whatever its score; it changes from layer to layer by its value and output projections and the feed-forward network.
What is implemented is what the paper's abstract says; no code was found.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import sympy
import torch

from passes import layers as layers_
from passes.sparsify.narrowing import QUERY_POSITION, attended, narrowed, reasons_against_layer
from rewrite.ir import AttentionInputs, Fits, J, NotApplicableError, Pass, Site, parameter, register_pass, tensor
from rewrite.ir.passes import is_causal


@register_pass
@dataclass(frozen=True)
class Composite(Pass):
    """Which new tokens are visual is known when the model runs; keys may lie in a KV cache of an earlier call, whatever they are.

    A decoding step's query is text and sees all. The site's own mask holds as well, and weights are unchanged: the paper's training-free
    variant. A block of queries that are all visual visits the keys of its own block and no other. Which blocks these are is not known
    before the data, and the costs in the report count every pair that positions allow.
    """

    name = "composite"
    family = "sparsify"
    paper = "Ma, Zhou, Zhang, Yan, Li, He, Wu, Rao, Zhang, Sun: EE-MLLM, 2024 (arXiv 2408.11795)"
    formula = "out[i] = v[i] for visual i; out[i] = sum_j softmax_j(score[i,j]) v[j] for text i, over text and visual j alike"
    fits = Fits(kinds=frozenset({"self"}), visual=True)

    layers: tuple[int, ...] | None = parameter(None, "the layers of each stack to work on; None is every layer")

    def check(self) -> None:
        self.require(layers_.are_layers(self.layers), "layers", layers_.RANGE)

    def declines(self, site: Site) -> str | None:
        return next(self._reasons_against(site), None)

    def _reasons_against(self, site: Site) -> Iterator[str]:
        yield from reasons_against_layer(site, self.layers)
        if not is_causal(site) and (site.cached or site.dims["Nq"] != site.dims["Nk"]):
            yield "its mask was not found to be causal, and which of its keys is a query's own token is not known"
        if "visual" not in site.operands:
            yield "which of its new tokens are visual was not found"

    def transform(self, site: Site) -> Site:
        is_text = sympy.Eq(tensor("visual", "bi"), 0)
        return narrowed(site, sympy.Or(is_text, sympy.Eq(J, QUERY_POSITION)))

    def reference(self, attention: AttentionInputs) -> torch.Tensor:
        """Rows of visual queries are cut to the diagonal."""
        visual, (queries, keys) = attention.visual, attention.logits.shape[-2:]
        if visual is None:
            raise NotApplicableError(f"{self}: {attention.site.name} gives no visual positions")
        own = torch.eye(keys, dtype=torch.bool, device=visual.device)[keys - queries :]
        return attended(attention, own | ~visual[:, None, keys - queries :, None])
