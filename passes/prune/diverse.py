"""Diverse visual tokens: of a picture's tokens those are kept that are far from each other, whatever they show.

The first stage of ToDRE, Li et al. 2025, "ToDRE: Visual Token Pruning via Diversity and Task Awareness for Efficient Large Vision-Language
Models", has no public code; the selection is that of DivPrune, Alvar et al. 2025. With d(i, j) = 1 - cos(x_i, x_j) of the features x that
enter the language model:

    first argmax_j min_{i != j} d(i, j),   then again and again  argmax_j min_{i chosen} d(i, j),   until round(keep V) are chosen of V

The others leave the stream in front of its first layer; the chosen ones keep their order and the positions they had. It looks at neither
the text nor any attention, so that it fits models without a CLS token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch

from passes.prune import choice
from passes.prune.pruning import PrunesStacks
from rewrite.ir import AttentionInputs, Count, Fits, Program, Select, Spread, parameter, register_pass


@register_pass
@dataclass(frozen=True)
class Diverse(PrunesStacks):
    """Of a prompt's visual tokens the share `keep` enters the language model: those far from each other. 0.1 is the paper's 90 % fewer."""

    name = "diverse"
    family = "prune"
    paper = "Li, Zhan, Xu, Wang, Chen: ToDRE, 2025 (arXiv 2505.18757), first stage; selection of DivPrune, CVPR 2025 (arXiv 2503.02175)"
    formula = "h_0 = h_0[text and S], S greedy: argmax_j min_{i in S} 1 - cos(x_i, x_j)"
    fits = Fits(kinds=frozenset({"self"}), visual=True, unusual=True, fixed=True)

    keep: int | float = parameter(0.1, "share of the visual tokens that stay, or their number; 1.0 changes nothing")

    def check(self) -> None:
        self.require(choice.is_amount(self.keep), "keep", choice.AMOUNT)

    @classmethod
    def identity(cls) -> Self:
        return cls(keep=1.0)

    def keeps_everything(self) -> bool:
        return choice.is_everything(self.keep)

    def chosen(self, program: Program, stack: int) -> tuple[Select, ...] | str:
        """What leaves one stack in front of its first layer, or why nothing does."""
        entry = choice.at_layer(program, stack, 0)
        if reason := choice.reason_against_entry(program, stack, entry):
            return reason
        return (Select(stack, 0, "before", "visual", Count(self.keep), Spread(), str(self)),)

    def reference(self, attention: AttentionInputs) -> torch.Tensor:
        """Attention with the visual keys masked that never entered. Rows of their queries mean nothing."""
        logits, visual, hidden = attention.logits, attention.visual, attention.hidden
        if visual is not None and hidden is not None and visual.any():
            for row in range(len(visual)):
                places = visual[row].nonzero().flatten().tolist()
                apart = [[1 - float(torch.cosine_similarity(hidden[row, a], hidden[row, b], dim=0)) for b in places] for a in places]
                others = range(len(places))
                chosen = [max(others, key=lambda a: min(apart[a][b] for b in others if b != a))]
                while len(chosen) < Count(self.keep).number(len(places), len(places)):
                    chosen.append(max((a for a in others if a not in chosen), key=lambda a: min(apart[a][b] for b in chosen)))
                leaves = [places[a] for a in others if a not in chosen]
                logits = logits.index_put((torch.tensor([row]),), _without(logits[row : row + 1], leaves))
        return logits.softmax(-1).nan_to_num(0.0) @ attention.value


def _without(logits: torch.Tensor, keys: list[int]) -> torch.Tensor:
    """[1, H, Nq, Nk] with some keys masked."""
    return logits.index_fill(-1, torch.tensor(keys, dtype=torch.long), -torch.inf)
