"""PyramidDrop: a multimodal language model drops visual tokens in stages, the deeper the more.

Xing et al. 2025, "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction". In front of each
layer given, with its own queries and keys of the tokens that are there,

    a_j = mean over heads of the attention of the last query to visual token j;     the round(keep^n V) greatest stay at the n-th, of V

in their order. The layer itself and all later ones, with their KV caches, go on with these. The authors number positions anew at every
stage; here tokens keep the positions they had, so that the result is that of the whole model with the dropped ones masked out. Padding
belongs on the left, as `generate()` has it: the last query is the prompt's last token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch

from passes import layers as layers_
from passes.prune import choice
from passes.prune.pruning import PrunesStacks
from rewrite.ir import AttentionInputs, Count, Fits, Program, Select, parameter, register_pass


@register_pass
@dataclass(frozen=True)
class PyramidDrop(PrunesStacks):
    """In front of the first of `layers` the share `keep` of the prompt's visual tokens is left, then keep^2 of them, and so on.

    A stack with fewer layers than the last of these needs is left alone; the defaults are the authors', for 32 layers.
    """

    name = "pyramid"
    family = "prune"
    paper = "Xing, Huang, Dong, Lu, Zhang, Zang, Cao, He, Wang, Wu, Lin: PyramidDrop, CVPR 2025 (arXiv 2410.17247)"
    formula = "h_l = h_l[text and topk(a)] for layers l >= L, a = mean_h attention_L[last query, visual], stage by stage"
    fits = Fits(kinds=frozenset({"self"}), visual=True, fixed=True)

    layers: tuple[int, ...] = parameter((8, 16, 24), "the layers, from 0, in front of which visual tokens leave")
    keep: float = parameter(0.5, "share of the visual tokens that each stage leaves of those before it; 1 changes nothing")

    def check(self) -> None:
        self.require(len(self.layers) > 0 and layers_.are_layers(self.layers), "layers", layers_.RANGE)
        self.require(0.0 < self.keep <= 1.0, "keep", "above 0 and at most 1")

    @classmethod
    def identity(cls) -> Self:
        return cls(keep=1.0)

    def keeps_everything(self) -> bool:
        return self.keep == 1.0

    def chosen(self, program: Program, stack: int) -> tuple[Select, ...] | str:
        """What leaves one stack, stage by stage, or why nothing does."""
        stages: list[Select] = []
        for number, layer in enumerate(sorted(self.layers), 1):
            stage = choice.chosen_by_text(program, stack, layer, layer, Count(self.keep**number, "round", "all"), str(self))
            if isinstance(stage, str):
                return stage
            stages += stage
        return tuple(stages)

    def reference(self, attention: AttentionInputs) -> torch.Tensor:
        """Attention with the visual keys masked that leave in front of the layer. Rows of queries that left themselves mean nothing."""
        logits, visual = attention.logits, attention.visual
        if attention.site.layer in self.layers and visual is not None:
            score = logits.softmax(-1).nan_to_num(0.0)[:, :, -1].mean(1).masked_fill(~visual, -torch.inf)
            stay = round(self.keep ** (sorted(self.layers).index(attention.site.layer) + 1) * int(visual[0].sum()))
            leaves = visual & (score < score.topk(stay, dim=1).values[:, -1:])
            logits = logits.masked_fill(leaves[:, None, None, :], -torch.inf)
        return logits.softmax(-1).nan_to_num(0.0) @ attention.value
