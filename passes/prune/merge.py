"""ToMe: a vision transformer merges, in every layer, the tokens that are most alike.

Bolya et al. 2023, "Token Merging: Your ViT But Faster". Between attention and MLP of each layer, with N tokens there:

    metric    the layer's keys, averaged over heads; tokens at even places are matched with those at odd places by its cosine
    match     each even token has one best odd token; the min(r, (N - prefix) // 2) closest pairs are merged
    merge     x_odd = sum_t s_t x_t / sum_t s_t  over the odd token and those that went into it,  s the number of patches a token stands for
    order     the even tokens that are left, in their order, then the odd ones
    later     softmax(q k^T / sqrt(d) + log s): a key counts as often as the patches that it stands for

CLS, and what stands beside it, is never merged. Where token-shaped results are read behind the last layer (dense heads), each place gets
its merged token's value; the authors' model would return fewer tokens. Pooling over tokens, by a mean or an attention, counts each of them
as often as the patches it stands for. Works without training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from passes import layers as layers_
from passes.prune import mergeable
from passes.prune.pruning import PrunesStacks
from rewrite.ir import Fits, Merge, Program, parameter, register_pass


@register_pass
@dataclass(frozen=True)
class ToMe(PrunesStacks):
    """`r` tokens are merged away at each of `layers`, at most half of those that are there.

    A stack without one of these layers is left alone, as is one whose attention is masked or biased by position: a merged token has none.
    Models that rotate keys by position are refused when they are rewritten.
    """

    name = "merge"
    family = "prune"
    paper = "Bolya, Fu, Dai, Zhang, Feichtenhofer, Hoffman: Token Merging: Your ViT But Faster, ICLR 2023 (arXiv 2210.09461)"
    formula = "x_b = sum_{t in b} s_t x_t / s_b, s_b = sum_{t in b} s_t; out = softmax(qk + log s) @ v"
    fits = Fits(kinds=frozenset({"self"}), causal=False, grid=True, frames=True, followed=True, cached=False)
    excludes = mergeable.EXCLUDED

    r: int = parameter(13, "tokens merged away at each layer; 0 changes nothing")
    layers: tuple[int, ...] | None = parameter(None, "the layers, from 0, between whose attention and MLP tokens are merged; None is all")
    proportional: bool = parameter(True, "later attention counts a merged token as often as the patches that it stands for")

    def check(self) -> None:
        self.require(self.r >= 0, "r", "at least 0")
        self.require(layers_.are_layers(self.layers), "layers", layers_.RANGE)

    @classmethod
    def identity(cls) -> Self:
        return cls(r=0)

    def keeps_everything(self) -> bool:
        return self.r == 0

    def chosen(self, program: Program, stack: int) -> tuple[Merge, ...] | str:
        """What is merged in one stack, or why nothing is."""
        read = mergeable.sites_merged(program, stack, self.layers, 0)
        if isinstance(read, str):
            return read
        return tuple(
            Merge(stack, site.layer, site.name, self.r, site.layout.prefix, self.proportional, str(self), suffix=site.layout.suffix)
            for site in read
        )
