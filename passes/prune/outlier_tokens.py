"""Outlier tokens: of each picture only the few patches enter the language model that the vision tower's CLS token heaps its attention on.

Gong et al. 2024, "DAMRO: Dive into the Attention Mechanism of LVLM to Reduce Object Hallucination": such patches mostly show background,
hold what is global, and language models follow them into objects that are not there. The model that sees nothing else is what DAMRO
decodes against (`rewrite.contrast`); by itself it is no better model. Of each picture, with q and k of the last layer of the vision tower
that the features went through,

    a_j = softmax_j( q_cls k_j / sqrt(C) ),   all heads as one of C channels

and the `keep` greatest stay. The authors' code puts them in the order of a and numbers positions anew; here they stay in the order of the
picture, with the positions they had.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from passes.prune import choice, pictures
from passes.prune.pruning import PrunesPictures
from rewrite.ir import Count, Fits, Program, Select, Site, parameter, register_pass


@register_pass
@dataclass(frozen=True)
class OutlierTokens(PrunesPictures):
    """Of each picture's patches the `keep` that CLS looks at most enter the language model: what DAMRO decodes against.

    The vision tower must be as `cls_prune` says. The default is that of the authors' script for POPE; for MME they keep 10.
    """

    name = "outlier_tokens"
    family = "prune"
    paper = "Gong, Ming, Wang, Wei: DAMRO, EMNLP 2024 (arXiv 2410.04514)"
    formula = "h_0 = h_0[text and topk(a)], a = softmax(q_cls k / sqrt(C)) of the vision tower, its heads as one"
    fits = Fits(kinds=frozenset({"self"}), visual=True, unusual=True, fixed=True)

    keep: int | float = parameter(4, "number of each picture's patches that stay, or their share; 1.0 changes nothing")

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
        if isinstance(rule, str):
            return rule
        return Select(stack, 0, "before", "visual", Count(self.keep), replace(rule, joined=True), str(self))
