"""M3: a picture enters the language model as few tokens, each the mean of a square of its patches.

Cai et al. 2025, "Matryoshka Multimodal Models". Of P patches on their grid, as they leave the projector, `tokens` remain:

    x' = mean over each c x c cell of x,   c = sqrt(P / tokens):   of 24 x 24 patches 576, 144, 36, 9 or 1

One model is trained for all of these numbers (the loss is the mean over them), and each call can choose; on a model that was not, quality
falls with `tokens`. The authors number positions anew; here a token keeps the position of the first patch of its cell.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Self

from passes.prune import pictures
from passes.prune.pruning import PrunesPictures
from rewrite.ir import Count, Fits, Pooled, Program, Select, Site, parameter, register_pass


@register_pass
@dataclass(frozen=True)
class Matryoshka(PrunesPictures):
    """Each picture enters the language model as `tokens` means of its patches.

    The visual tokens must be a vision tower's patches one by one, on a grid that is cut into that many squares.
    """

    name = "matryoshka"
    family = "prune"
    paper = "Cai, Yang, Gao, Lee: Matryoshka Multimodal Models, ICLR 2025 (arXiv 2405.17430)"
    formula = "h_0 = [text, mean over each cell of the projected patches], cells of sqrt(P / tokens) x sqrt(P / tokens)"
    training_free = False
    fits = Fits(kinds=frozenset({"self"}), visual=True, unusual=True, fixed=True)

    tokens: int | Literal["all"] = parameter(36, 'tokens of each picture; "all" changes nothing')

    def check(self) -> None:
        self.require(self.tokens == "all" or self.tokens >= 1, "tokens", 'at least 1, or "all"')

    @classmethod
    def identity(cls) -> Self:
        return cls(tokens="all")

    def keeps_everything(self) -> bool:
        return self.tokens == "all"

    def chosen(self, program: Program, last: Site, stack: int) -> Select | str:
        """What becomes of the patches of one tower."""
        if reason := pictures.READ.reason_against(last):
            return f"its patches come from {last.name}, and there {reason}"
        assert last.layout.grid is not None
        assert isinstance(self.tokens, int)
        height, width = last.layout.grid
        cell = math.isqrt(height * width // self.tokens)
        if cell == 0 or height % cell or width % cell or height * width != self.tokens * cell**2:
            return f"its pictures of {height}x{width} patches are not cut into {self.tokens} squares"
        return Select(stack, 0, "before", "visual", Count(self.tokens), Pooled(last.name, cell), str(self))
