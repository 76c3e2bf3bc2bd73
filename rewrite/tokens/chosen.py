"""Patches of pictures that were chosen in the graph of their vision tower, for a later graph in which they are a text's visual tokens."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import fx

# Where a placeholder's meta has the `Given` of the pictures that it holds, or the `Lost` of what was computed of them.
GIVEN = "rewrite_given"
LOST = "rewrite_lost"


@dataclass(frozen=True)
class Choice:
    """What is known of a choice without its tensors.

    by: the pass. site: the last attention of the tower that the patches went through. share: how much of the patches of pictures stays.
    remakes: those that stay have other features in the text than the model's own.
    """

    by: str
    site: str
    share: Fraction
    remakes: bool = False


@dataclass(frozen=True)
class Held:
    """How one of a graph's results holds patches. picture: it is this one among those that were chosen from; None is all.

    relaid: they were laid out anew, and which stay is said element by element. lost: why it cannot be said; the rest means nothing then.
    """

    choice: Choice
    picture: int | None = None
    relaid: bool = False
    lost: str | None = None


@dataclass(frozen=True)
class Chosen:
    """The choice among the patches of an activation. stay: bool [pictures, P], or [P] of one picture [P, C].

    made: what a text gets in the place of the activation where the pass made something else of it; None for the activation itself.
    relaid: the patches were laid out anew, and `stay` has the shape of the activation itself: True where an element is of a token that
    stays. lost: something was computed over the patches, so that none is a token any more; `stay` is empty then.
    """

    choice: Choice
    stay: torch.Tensor
    made: torch.Tensor | None = None
    relaid: bool = False
    lost: str | None = None

    def of(self, picture: int | None) -> Chosen:
        """That of one picture among them; None is all."""
        if picture is None:
            return self
        return Chosen(self.choice, self.stay[picture], None if self.made is None else self.made[picture])


@dataclass(frozen=True)
class Lost:
    """Something was computed over patches, so that none is a token any more: why, and what was chosen of them, if that was done before."""

    choice: Choice | None
    reason: str


@dataclass(frozen=True)
class Given:
    """The choice as inputs of a graph beside the activation."""

    choice: Choice
    stay: fx.Node
    made: fx.Node | None
    relaid: bool = False
