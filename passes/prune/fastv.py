"""FastV: from an early layer on, a multimodal language model goes on with the visual tokens that its last token looks at most.

Chen et al. 2024, "An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large Vision-Language Models". In
front of layer K, of a prompt's V visual tokens

    a_j = mean over heads of the attention of the last query to visual token j, in layer K - 1;   the round((1 - R) V) greatest stay

in their order and with the positions they had. The KV caches of layers K and later hold the kept tokens only; decoding goes on from them.
Padding belongs on the left, as `generate()` has it: the last query is the prompt's last token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from passes.prune import choice
from passes.prune.pruning import PrunesStacks
from rewrite.ir import Count, Fits, Program, Select, parameter, register_pass


@register_pass
@dataclass(frozen=True)
class FastV(PrunesStacks):
    """Of the visual tokens the share `drop` leaves in front of layer `layer`, which the authors call K."""

    name = "fastv"
    family = "prune"
    paper = "Chen, Zhao, Liu, Bai, Lin, Zhou, Chang: An Image is Worth 1/2 Tokens After Layer 2 (FastV), ECCV 2024 (arXiv 2403.06764)"
    formula = "h_l = h_l[text and topk(a)] for layers l >= K, a = mean_h attention_{K-1}[last query, visual]"
    fits = Fits(kinds=frozenset({"self"}), visual=True, fixed=True)

    layer: int = parameter(2, "the first layer without the visual tokens that leave, from 1")
    drop: float = parameter(0.5, "share of the visual tokens that leave; 0 changes nothing")

    def check(self) -> None:
        self.require(self.layer >= 1, "layer", "at least 1: the layer in front of it is read")
        self.require(0.0 <= self.drop < 1.0, "drop", "at least 0 and below 1")

    @classmethod
    def identity(cls) -> Self:
        return cls(drop=0.0)

    def keeps_everything(self) -> bool:
        return self.drop == 0.0

    def chosen(self, program: Program, stack: int) -> tuple[Select, ...] | str:
        """What leaves one stack, or why nothing does."""
        return choice.chosen_by_text(program, stack, self.layer, self.layer - 1, Count(1.0 - self.drop, "round"), str(self))
