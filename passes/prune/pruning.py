"""Bases of the passes that choose tokens: what they do to a program, so that a method is its rule and its parameters."""

from __future__ import annotations

from abc import abstractmethod

import torch

from passes.prune import choice, pictures
from rewrite.ir import AttentionInputs, Merge, Pass, Program, Select, Site


class Prunes(Pass):
    """A pass that chooses tokens between the sites."""

    @abstractmethod
    def keeps_everything(self) -> bool:
        """True where the pass, as set, lets no token leave."""

    def reference(self, attention: AttentionInputs) -> torch.Tensor:
        """Plain attention: tokens leave or are merged between the sites, and where a layer is read they are there still."""
        return attention.logits.softmax(-1).nan_to_num(0.0) @ attention.value


class PrunesStacks(Prunes):
    """Chooses among the tokens of each stack by itself."""

    @abstractmethod
    def chosen(self, program: Program, stack: int) -> tuple[Select, ...] | tuple[Merge, ...] | str:
        """What leaves one stack, or is merged in it, or why nothing is."""

    def apply(self, program: Program) -> Program:
        for stack in choice.stacks(program):
            chosen = choice.keeps_all(str(self)) if self.keeps_everything() else self.chosen(program, stack)
            program = choice.applied(program, self.fits, stack, chosen, str(self))
        return program


class PrunesPictures(Prunes):
    """Chooses among the patches of each picture what enters the language model."""

    @abstractmethod
    def chosen(self, program: Program, last: Site, stack: int) -> Select | str:
        """What becomes of the patches of one tower, or why nothing does; last: the last site that they went through."""

    def apply(self, program: Program) -> Program:
        return pictures.applied_by_pictures(program, self.fits, str(self), None if self.keeps_everything() else self.chosen)
