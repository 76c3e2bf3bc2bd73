"""MCTF: a vision transformer fuses, in front of most layers, tokens that are alike, little looked at and small.

Lee et al. 2024, "Multi-criteria Token Fusion with One-step-ahead Attention for Efficient Vision Transformers". In front of each layer, with
N tokens there, a the attention that they receive in it (averaged over heads and queries, scores with log s added), and s the number of
patches that a token stands for:

    scores       W_ij = ((1 + cos(x_i, x_j)) / 2)^(1/similar) (i_i i_j)^(1/informative) (u_i u_j)^(1/sized),
                 i = (1 / a) / max(1 / a),  u = (1 / s) / max(1 / s)
    match        r / 2 tokens at even places, those of the greatest W, go into their best one at an odd place; then r / 2 at odd places into
                 their best of the even ones that are left
    fuse         x' = sum a s x / sum a s  over what goes together
    one step     the map of the N tokens is fused as they are, its keys added up and its rows averaged with a s, and multiplied with the
    ahead        values of the fused tokens; queries and keys of these are never made

CLS, and what stands beside it, is never fused. Published for models that were trained with it; it works without, too. Where token-shaped
results are read behind the last layer each place gets its fused token's value, as with `merge`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from passes import layers as layers_
from passes.prune import mergeable
from passes.prune.pruning import PrunesStacks
from rewrite.ir import CHANGES_NOTHING, Criteria, Fits, Merge, Program, parameter, register_pass


@register_pass
@dataclass(frozen=True)
class Fuse(PrunesStacks):
    """`r` tokens are fused away in front of each of `layers`, at most half of those that are there, and ten are left.

    The authors fuse 16 in front of every layer but the first, or the share 0.35 in front of three (`fuse(r=0.35, layers=[3, 6, 9])`).
    Stacks are left alone as by `merge`.
    """

    name = "fuse"
    family = "prune"
    paper = "Lee, Choi, Kim: Multi-criteria Token Fusion with One-step-ahead Attention (MCTF), CVPR 2024 (arXiv 2403.10030)"
    formula = "x_g = sum_{t in g} w_t x_t / sum_{t in g} w_t, w = a s; out_g = sum_{t in g} w_t (softmax(qk + log s) v_g)_t / sum w"
    fits = Fits(kinds=frozenset({"self"}), causal=False, grid=True, frames=True, followed=True, cached=False)
    excludes = mergeable.EXCLUDED

    r: int | float = parameter(16, "tokens fused away in front of each layer, or their share of those behind CLS; 0 changes nothing")
    layers: tuple[int, ...] | None = parameter(None, "the layers, from 0, in front of which tokens are fused; None is all but the first")
    similar: float = parameter(1.0, "temperature of likeness")
    informative: float = parameter(20.0, "temperature of the attention received")
    sized: float = parameter(40.0, "temperature of the size")

    def check(self) -> None:
        self.require(0 <= self.r < 1 if isinstance(self.r, float) else self.r >= 0, "r", "a number from 0, or a share below 1.0")
        self.require(layers_.are_layers(self.layers), "layers", layers_.RANGE)
        for name in ("similar", "informative", "sized"):
            self.require(getattr(self, name) > 0, name, "above 0")

    @classmethod
    def identity(cls) -> Self:
        return cls(r=0)

    def keeps_everything(self) -> bool:
        return self.r == 0

    def chosen(self, program: Program, stack: int) -> tuple[Merge, ...] | str:
        """What is fused in one stack, or why nothing is."""
        read = mergeable.sites_merged(program, stack, self.layers, 1)
        if isinstance(read, str):
            return read
        criteria = Criteria(self.similar, self.informative, self.sized)
        if criteria.number(self.r, read[0].dims["Nk"], read[0].layout.prefix + read[0].layout.suffix) == 0:
            return f"its {read[0].dims['Nk']} tokens are so few that {self} {CHANGES_NOTHING}"
        return tuple(
            Merge(stack, site.layer, site.name, self.r, site.layout.prefix, True, str(self), criteria, site.layout.suffix) for site in read
        )
