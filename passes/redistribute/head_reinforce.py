"""Vision-aware head reinforcement (VHR): the heads that depend on the image most count for more.

He et al. 2024, "Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence". With o[h,i] the output of head h for
query i, and o'[h,i] its output with the visual keys masked out, both from one set of scores,

    VHD[h,i] = |o[h,i] - o'[h,i]|                                    the norm over the head's channels
    out[h,i] = factor * o[h,i]    for the heads of the greatest VHD, the share of them that is asked for; o[h,i] for the others

before the output projection, without training. This follows the paper's abstract and not the authors' code.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

import sympy
import torch

from passes import layers as layers_
from rewrite.ir import AttentionInputs, Fits, NotApplicableError, Pass, ReinforceHeads, Site, VisualGroups, parameter, register_pass, tensor
from rewrite.ir.passes import is_causal

# The code that VisualGroups gives to visual keys.
VISUAL = 1


@register_pass
@dataclass(frozen=True)
class HeadReinforce(Pass):
    """Each query chooses its own heads, and only queries behind the last visual token of their row do: every generated token, and the
    question that follows the image.

    ceil(share * H) heads are chosen. The defaults are this project's: half of the heads as the abstract suggests, and a factor of 1.5.
    """

    name = "head_reinforce"
    family = "redistribute"
    paper = (
        "He, Zhu, Guo, Fang, Hua, Jia, Tang, Chua, Wang: Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence, "
        "ACL 2025 (arXiv 2412.13949)"
    )
    formula = "out[h,i] = factor o[h,i] for the heads of greatest |o[h,i] - o[h,i] without visual keys|, i behind the image"
    fits = Fits(kinds=frozenset({"self"}), visual=True)

    factor: float = parameter(1.5, "what the outputs of the chosen heads are multiplied by; 1 changes nothing")
    share: float = parameter(0.5, "share of a layer's heads that is chosen, rounded up to whole heads")
    layers: tuple[int, ...] | None = parameter(None, "the layers of each stack to work on; None is every layer")

    def check(self) -> None:
        self.require(math.isfinite(self.factor) and self.factor > 0.0, "factor", "positive and finite")
        self.require(0.0 < self.share <= 1.0, "share", "above 0 and at most 1")
        self.require(layers_.are_layers(self.layers), "layers", layers_.RANGE)

    @classmethod
    def identity(cls) -> Self:
        return cls(factor=1.0)

    def declines(self, site: Site) -> str | None:
        return next(self._reasons_against(site), None)

    def _reasons_against(self, site: Site) -> Iterator[str]:
        if reason := layers_.reason_against(self.layers, site):
            yield reason
        if not site.is_plain:
            yield f"an earlier pass changed it: it is made of {len(site.body.operations)} operations"
        if site.cached and not is_causal(site):
            yield f"it reads a KV cache of {site.dims['Nk']} keys and its mask was not found to be causal: where its queries lie is unknown"

    def _heads(self, site: Site) -> int:
        return math.ceil(self.share * site.dims["H"])

    def transform(self, site: Site) -> Site:
        if self.factor == 1.0:
            return site
        attend, groups = site.attend, VisualGroups("visual_group", "behind_image", "visual")
        blind = sympy.And(attend.mask, sympy.Ne(tensor(groups.result, "bj"), VISUAL))
        return site.with_operations(
            groups,
            replace(attend, result="heads"),
            replace(attend, result="heads_without_image", mask=blind),
            ReinforceHeads(attend.result, "heads", "heads_without_image", groups.active, self._heads(site), self.factor),
        )

    def reference(self, attention: AttentionInputs) -> torch.Tensor:
        """Query by query, the image's columns struck out."""
        visual, logits = attention.visual, attention.logits
        if visual is None:
            raise NotApplicableError(f"{self}: {attention.site.name} gives no visual positions")
        output = logits.softmax(-1).nan_to_num(0.0) @ attention.value
        without = logits.masked_fill(visual[:, None, None, :], -torch.inf).softmax(-1).nan_to_num(0.0) @ attention.value
        distance, result = (output - without).square().sum(-1).sqrt(), output.clone()
        queries, keys = logits.shape[-2:]
        for row in range(len(visual)):
            image = visual[row].nonzero().flatten().tolist()
            for query in range(queries):
                if image and keys - queries + query > max(image):
                    chosen = distance[row, :, query].sort(descending=True).indices[: self._heads(attention.site)]
                    result[row, chosen, query] *= self.factor
        return result
