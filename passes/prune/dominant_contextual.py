"""VisionZip: the patches that CLS looks at most enter the language model, and a few that the others are merged into.

Yang et al. 2025, "VisionZip: Longer is Better but Not Necessary in Vision Language Models". Of each picture's P patches, in the last layer
of the vision tower that the features went through:

    dominant     the round(dominant P) patches of the greatest attention of CLS, summed over heads; where a tower has no CLS token, of the
                 greatest attention that they receive from all tokens
    targets      of the M others every s-th, s = max(1, M // T), at most T = round(contextual P)
    contextual   each of the rest goes into the target with the greatest cosine of the keys, averaged over heads; the target becomes the
                 mean of itself and of what went into it

Features are merged as they leave that layer, in front of the projector, which is not linear. The authors' code makes a target itself plus
the mean of the others (`summed=True`), hands the CLS token on as one dominant token more, and puts the contextual tokens last, numbering
positions anew; here CLS is not handed on where the model has no place for it, and tokens keep the places and positions that they had, the
contextual ones those of the targets. Dominant and contextual tokens leave as `cls_prune` says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from passes.prune import choice, pictures
from passes.prune.pruning import PrunesPictures
from rewrite.ir import Contextual, Count, Fits, Program, Select, Site, parameter, register_pass


@register_pass
@dataclass(frozen=True)
class DominantContextual(PrunesPictures):
    """Of each picture's patches the share `dominant` enters the language model, and the share `contextual` that the others are merged into.

    The defaults are the authors' 190 and 30 of 576 patches. The visual tokens must be a vision tower's patches one by one, made of one of
    its layers alone; a tower whose layer adds attention and MLP otherwise than one after the other is refused when it is rewritten.
    """

    name = "dominant_contextual"
    family = "prune"
    paper = "Yang, Chen, Tian, Wang, Li, Yu, Jia: VisionZip, CVPR 2025 (arXiv 2412.04467)"
    formula = "h_0 = h_0[text and (topk(a) or t)], x_t = mean(x_t and x_j with t = argmax cos(k_j, k_t)), a = mean_h attention[cls, patch]"
    fits = Fits(kinds=frozenset({"self"}), visual=True, unusual=True, fixed=True)

    dominant: int | float = parameter(0.33, "share of each picture's patches that stay as they are, or their number; 1.0 changes nothing")
    contextual: int | float = parameter(0.052, "share of each picture's patches that the others are merged into, or their number")
    summed: bool = parameter(
        False, "a contextual token is its patch plus the mean of the others, as in the authors' code, not the mean of all"
    )

    def check(self) -> None:
        self.require(choice.is_amount(self.dominant), "dominant", choice.AMOUNT)
        one = isinstance(self.contextual, int) and self.contextual == 1
        self.require(one or choice.is_amount(self.contextual), "contextual", choice.AMOUNT.replace("2", "1"))

    @classmethod
    def identity(cls) -> Self:
        return cls(dominant=1.0)

    def keeps_everything(self) -> bool:
        return choice.is_everything(self.dominant)

    def chosen(self, program: Program, last: Site, stack: int) -> Select | str:
        """What stays of the patches of one tower."""
        contextual = Contextual(last.name, Count(self.contextual), self.summed)
        rule = pictures.received_from_cls(program, last, None, without_cls=True)
        if isinstance(rule, str):
            return rule
        return Select(stack, 0, "before", "visual", Count(self.dominant), rule, str(self), contextual=contextual)
