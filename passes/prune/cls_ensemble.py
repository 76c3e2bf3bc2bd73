"""VTC-CLS: as FasterVLM, with what the CLS token looks at in several layers of the vision tower.

Wang et al. 2024, "[CLS] Token Tells Everything Needed for Training-free Efficient MLLMs". Of each picture,

    a_j = sum over layers l >= first of (mean over heads of the attention of CLS to patch j in layer l)

up to the last layer that the features went through, and the round(keep P) greatest of P patches stay, in raster order. See `cls_prune` for
where they leave and what positions they have.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from passes.prune import choice, pictures
from passes.prune.pruning import PrunesPictures
from rewrite.ir import Count, Fits, Program, Select, Site, parameter, register_pass


@register_pass
@dataclass(frozen=True)
class ClsEnsemble(PrunesPictures):
    """Of each picture's patches the share `keep` enters the language model, by the attention of CLS in layers `first` and later.

    Share and first layer have no published default: these are this project's. The vision tower must be as `cls_prune` says.
    """

    name = "cls_ensemble"
    family = "prune"
    paper = "Wang, Sun, Wang, Zhang, Lin, Xiong, Shi, Wang: [CLS] Token Tells Everything Needed (VTC-CLS), 2024 (arXiv 2412.05819)"
    formula = "h_0 = h_0[text and topk(a)], a = sum_{l >= first} mean_h attention_l[cls, patch] of the vision tower"
    fits = Fits(kinds=frozenset({"self"}), visual=True, unusual=True, fixed=True)

    keep: int | float = parameter(0.25, "share of each picture's patches that stay, or their number; 1.0 changes nothing")
    first: int = parameter(0, "the first layer of the vision tower whose attention counts, from 0")

    def check(self) -> None:
        self.require(choice.is_amount(self.keep), "keep", choice.AMOUNT)
        self.require(self.first >= 0, "first", "at least 0")

    @classmethod
    def identity(cls) -> Self:
        return cls(keep=1.0)

    def keeps_everything(self) -> bool:
        return choice.is_everything(self.keep)

    def chosen(self, program: Program, last: Site, stack: int) -> Select | str:
        """What stays of the patches of one tower."""
        rule = pictures.received_from_cls(program, last, self.first)
        return rule if isinstance(rule, str) else Select(stack, 0, "before", "visual", Count(self.keep), rule, str(self))
