"""Pruning at random: what every method that chooses has to be better than. Importing this registers `random_tokens` and `random_patches`.

Average pooling, the other floor, is the pass `matryoshka`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from passes.prune import choice
from passes.prune.pruning import PrunesStacks
from rewrite import Fits, Program, parameter, register_pass
from rewrite.ir import Count, Drawn, Select


@register_pass
@dataclass(frozen=True)
class RandomTokens(PrunesStacks):
    """Visual tokens drawn at random, the share `keep` of them, go on in front of `layer` of the language model."""

    name, family = "random_tokens", "prune"
    paper = "none: the floor that other methods are measured against"
    formula = "h_l = h_l[text and S], S drawn evenly, other ones in each row"
    fits = Fits(kinds=frozenset({"self"}), visual=True, fixed=True, unusual=True)

    keep: float = parameter(0.25, "share of the visual tokens that stay; 1.0 changes nothing")
    layer: int = parameter(0, "the first layer without the others, from 0")
    seed: int = parameter(0, "of the draw")

    def check(self) -> None:
        self.require(0.0 < self.keep <= 1.0, "keep", "above 0 and at most 1")
        self.require(self.layer >= 0, "layer", "at least 0")

    @classmethod
    def identity(cls) -> Self:
        return cls(keep=1.0)

    def keeps_everything(self) -> bool:
        return self.keep == 1.0

    def chosen(self, program: Program, stack: int) -> tuple[Select, ...] | str:
        if reason := choice.reason_against_entry(program, stack, choice.at_layer(program, stack, self.layer)):
            return reason
        return (Select(stack, self.layer, "before", "visual", Count(self.keep), Drawn(self.seed), str(self)),)


@register_pass
@dataclass(frozen=True)
class RandomPatches(PrunesStacks):
    """A vision transformer keeps at each of `layers` the share `keep` of its patches, drawn at random; CLS stays."""

    name, family = "random_patches", "prune"
    paper = "none: the floor that other methods are measured against"
    formula = "x = [cls, x[S]], S drawn evenly, other ones in each row"
    fits = Fits(kinds=frozenset({"self"}), causal=False, grid=True, frames=True)

    keep: float = parameter(0.7, "share of the patches that stay at each layer; 1.0 changes nothing")
    layers: tuple[int, ...] = parameter((3, 6, 9), "the layers, from 0, between whose attention and MLP patches leave")
    seed: int = parameter(0, "of the draw")

    def check(self) -> None:
        self.require(0.0 < self.keep <= 1.0, "keep", "above 0 and at most 1")
        self.require(len(self.layers) > 0 and min(self.layers) >= 0, "layers", "numbers from 0")

    @classmethod
    def identity(cls) -> Self:
        return cls(keep=1.0)

    def keeps_everything(self) -> bool:
        return self.keep == 1.0

    def chosen(self, program: Program, stack: int) -> tuple[Select, ...] | str:
        sites = [choice.at_layer(program, stack, layer) for layer in sorted(self.layers)]
        if None in sites:
            return f"its stack does not have all of the layers {self.layers}"
        count = Count(self.keep, "ceil")
        return tuple(
            Select(stack, layer, "between", "patches", count, Drawn(self.seed + layer), str(self)) for layer in sorted(self.layers)
        )
