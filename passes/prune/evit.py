"""EViT: a vision transformer drops, at some layers, the patches that its CLS token looks at least.

Liang et al. 2022, "Not All Patches are What You Need: Expediting Vision Transformers via Token Reorganizations". Between attention and
MLP of each layer given, with N tokens there of which CLS (and what stands beside it) always stays:

    a_j = mean over heads of the attention of CLS to token j;     the ceil(keep (N - 1)) tokens of the greatest a stay
    fused: one more token at the end,  sum of a_j x_j  over those that leave, not divided by the sum of a, as in the authors' code

With `mass` a picture keeps of these only the fewest, of the greatest a first, that have this share of the sum of a (top-p, as in nucleus
sampling): rows of a batch then keep different numbers, and are filled up with patches that no attention sees.

The fused token is a token as any other later on, and may leave at the next layer. The authors sort tokens by a; here they stay in their
order, which no layer of a vision transformer sees. What reads the place of every token (dense heads, intermediate features) finds there
what the token left with; the authors' model would return fewer tokens. Published for models trained with it; on other weights it works too,
less well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from passes import layers as layers_
from passes.prune import choice
from passes.prune.pruning import PrunesStacks
from rewrite.ir import CHANGES_NOTHING, Count, Fits, Program, Received, Select, parameter, register_pass


@register_pass
@dataclass(frozen=True)
class EViT(PrunesStacks):
    """At each of `layers` the share `keep` of the patches stays.

    A stack without one of these layers is left alone, as is one whose tokens have no CLS token in front. Models that pool over patches
    (a mean over tokens) are refused when they are rewritten.
    """

    name = "evit"
    family = "prune"
    paper = "Liang, Ge, Tong, Song, Wang, Xie: Not All Patches are What You Need, ICLR 2022 (arXiv 2202.07800)"
    formula = "x = [cls, x[topk(a)], sum_{j left} a_j x_j], a = mean_h attention[cls, j]"
    fits = Fits(kinds=frozenset({"self"}), causal=False, grid=True, frames=True, followed=True)

    keep: float = parameter(0.7, "share of the patches that stay at each layer; 1 changes nothing")
    layers: tuple[int, ...] = parameter((3, 6, 9), "the layers, from 0, between whose attention and MLP patches leave")
    mass: float | None = parameter(
        None, "each row keeps of these no more than have this share of the attention of CLS to patches, so that rows differ; None: all"
    )
    fuse: bool = parameter(True, "the patches that leave become one token, weighted by the attention of CLS")

    def check(self) -> None:
        self.require(0.0 < self.keep <= 1.0, "keep", "above 0 and at most 1")
        self.require(self.mass is None or 0.0 < self.mass < 1.0, "mass", "above 0 and below 1")
        self.require(len(self.layers) > 0 and layers_.are_layers(self.layers), "layers", layers_.RANGE)

    @classmethod
    def identity(cls) -> Self:
        return cls(keep=1.0)

    def keeps_everything(self) -> bool:
        return self.keep == 1.0 and self.mass is None

    def chosen(self, program: Program, stack: int) -> tuple[Select, ...] | str:
        """What leaves one stack, or why nothing does."""
        chosen = [choice.at_layer(program, stack, layer) for layer in sorted(self.layers)]
        missing = [layer for layer, site in zip(sorted(self.layers), chosen, strict=True) if site is None]
        if missing:
            return f"its stack has no layer {missing[0]} here, where patches would leave"
        sites = [site for site in chosen if site is not None]
        count = Count(self.keep, "ceil", mass=self.mass)
        patches = sites[0].dims["Nk"] - sites[0].layout.prefix - sites[0].layout.suffix
        if not sites[0].layout.prefix:
            return "no CLS token stands in front of its patches"
        if self.mass is None and count.number(patches, patches) == patches:
            return f"{self} rounds up to all of its {patches} patches, which {CHANGES_NOTHING}"
        return tuple(
            Select(stack, site.layer, "between", "patches", count, Received((site.name,), (0, 1)), str(self), self.fuse) for site in sites
        )
