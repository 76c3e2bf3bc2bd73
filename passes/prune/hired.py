"""HiRED: a budget of patches for an image, shared out among its thumbnail and its crops, and within each by the attention of CLS.

Arif et al. 2025, "HiRED: Attention-Guided Token Dropping for Efficient Inference of High-Resolution Vision-Language Models". An image is n
pictures of P patches, a thumbnail and behind it R x C crops, row by row. With the attention of CLS, summed over heads, in an early layer e
of the vision tower and in the last one that the features went through, l:

    budget       floor(keep n P) patches, of which the thumbnail keeps floor(alpha budget), at most P
    crops        of the thumbnail's floor((1 - alpha) P) patches of the greatest a_e, m_c lie where crop c is: it keeps m_c / sum(m) of the
                 rest of the budget
    patches      of each picture those of the greatest a_l, in raster order

The authors round what a crop keeps down and leave the parts unused; here they go to the crops with the largest ones, so that equally many
tokens are left of every image. Their code counts m_c in consecutive patches of the thumbnail rather than where the crops lie
(`bands=True`). Where tokens leave, and what positions they have, is as in `cls_prune`. Pictures that stand alone (`crops=None`) each keep
floor(keep P) patches, the authors' form for models without crops.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from passes.prune import choice, pictures
from passes.prune.pruning import PrunesPictures
from rewrite.ir import Count, Crops, Fits, Program, Received, Select, Site, parameter, register_pass


@register_pass
@dataclass(frozen=True)
class HiRed(PrunesPictures):
    """Of an image's patches the share `keep` enters the language model, shared out among a thumbnail and its crops.

    The vision tower must be as `cls_prune` says, and each row of a batch must hold whole images, each with the crops that `crops` says. The
    budget is that of all patches, also where some are cut off as padding before they enter the text.
    """

    name = "hired"
    family = "prune"
    paper = "Arif, Yoon, Nikolopoulos, Vandierendonck, John, Ji: HiRED, AAAI 2025 (arXiv 2408.10945)"
    formula = "h_0 = h_0[text and topk(a_late, n_c)], n_c = m_c / sum(m) budget, m_c = count of topk(a_early of the thumbnail) in crop c"
    fits = Fits(kinds=frozenset({"self"}), visual=True, unusual=True, fixed=True)

    keep: float = parameter(0.2, "share of an image's patches that stay; 1 changes nothing")
    crops: tuple[int, ...] | None = parameter(None, "rows and columns of the crops behind each thumbnail; None: each picture stands alone")
    alpha: float = parameter(0.5, "share of the budget that the thumbnail keeps")
    early: int = parameter(0, "the layer of the vision tower that says where in the thumbnail an image is busy, from 0")
    bands: bool = parameter(False, "crops are counted as consecutive patches of the thumbnail, as in the authors' code")

    def check(self) -> None:
        self.require(0.0 < self.keep <= 1.0, "keep", "above 0 and at most 1")
        self.require(self.crops is None or (len(self.crops) == 2 and min(self.crops) >= 1), "crops", "rows and columns, or None")
        self.require(0.0 <= self.alpha <= 1.0, "alpha", "from 0 to 1")
        self.require(self.early >= 0, "early", "at least 0")

    @classmethod
    def identity(cls) -> Self:
        return cls(keep=1.0)

    def keeps_everything(self) -> bool:
        return self.keep == 1.0

    def chosen(self, program: Program, last: Site, stack: int) -> Select | str:
        """What stays of the patches of one tower."""
        late = pictures.received_from_cls(program, last, None)
        early = choice.at_layer(program, last.stack, self.early)
        if isinstance(late, str):
            return late
        if early is None or early.layer > last.layer:
            return f"its visual tokens went through the layers 0 to {last.layer} of the vision tower, not through layer {self.early}"
        crops = None
        if self.crops is not None:
            rows, columns = self.crops
            crops = Crops(Received((early.name,), (0, 1)), rows, columns, self.alpha, self.bands)
            patches = last.dims["Nk"] - last.layout.prefix
            if self.bands and patches % (crops.pictures - 1):
                return f"its pictures of {patches} patches are not cut into {crops.pictures - 1} equal bands"
        return Select(stack, 0, "before", "visual", Count(self.keep, "floor"), late, str(self), crops=crops)
