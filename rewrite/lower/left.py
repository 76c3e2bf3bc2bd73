"""What is left of the tokens of a stack, and how many."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from rewrite.lower.cursor import Number


@dataclass(frozen=True)
class Left:
    """What is left of the tokens of a stack at one place of it.

    positions: of the tokens that are left, None where all are. length: how many there were; kept, visual: how many tokens, visual ones
    among them, are left; every: how many visual ones there were, in each row, a tensor [B] where rows count their own. hints: kept, visual
    and every at the traced shapes. present: which of them are no padding, where rows keep different numbers.
    """

    positions: fx.Node | None
    length: Number
    kept: Number
    visual: Number
    every: Number
    hints: tuple[int, int, int]
    fused: bool = False
    present: fx.Node | None = None

    @property
    def nodes(self) -> list[fx.Node]:
        """The numbers and positions that are nodes of the graph."""
        numbers = (self.positions, self.length, self.kept, self.visual, self.every, self.present)
        return [number for number in numbers if isinstance(number, fx.Node)]
