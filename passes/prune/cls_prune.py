"""FasterVLM: visual tokens that the vision tower's CLS token looks at least never enter the language model.

Zhang et al. 2024, "[CLS] Attention is All You Need for Training-Free Visual Token Pruning: Make VLM Inference Faster". Of each picture,

    a_j = mean over heads of the attention of CLS to patch j, in the last layer of the vision tower that the features went through

and the round(keep P) greatest of its P patches stay, in raster order. The authors cut the features behind the projector; here the same
tokens leave the language model's stream in front of its first layer, so that its code finds as many features as places for them. They
number positions anew; here tokens keep the positions they had. It does not look at the text, and no map is ever written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from passes.prune import choice, pictures
from passes.prune.pruning import PrunesPictures
from rewrite.ir import Count, Fits, Program, Select, Site, parameter, register_pass


@register_pass
@dataclass(frozen=True)
class ClsPrune(PrunesPictures):
    """Of each picture's patches the share `keep` enters the language model, by the attention of CLS.

    The vision tower must have a CLS token, and the visual tokens must be its patches: not pooled, nor joined with others. Where they were
    laid out anew, some cut off as padding and others put between them, what was cut off is missing and what is no patch stays.
    """

    name = "cls_prune"
    family = "prune"
    paper = "Zhang, Cheng, Lu, Zhuo, Wang, Zhang, Guo, Zhang: [CLS] Attention is All You Need (FasterVLM), 2024 (arXiv 2412.01818)"
    formula = "h_0 = h_0[text and topk(a)], a = mean_h attention[cls, patch] of the vision tower"
    fits = Fits(kinds=frozenset({"self"}), visual=True, unusual=True, fixed=True)

    keep: int | float = parameter(0.25, "share of each picture's patches that stay, or their number; 1.0 changes nothing")

    def check(self) -> None:
        self.require(choice.is_amount(self.keep), "keep", choice.AMOUNT)

    @classmethod
    def identity(cls) -> Self:
        return cls(keep=1.0)

    def keeps_everything(self) -> bool:
        return choice.is_everything(self.keep)

    def chosen(self, program: Program, last: Site, stack: int) -> Select | str:
        """What stays of the patches of one tower."""
        rule = pictures.received_from_cls(program, last, None)
        return rule if isinstance(rule, str) else Select(stack, 0, "before", "visual", Count(self.keep), rule, str(self))
