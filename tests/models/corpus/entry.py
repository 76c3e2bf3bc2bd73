"""What is known about a model of the corpus, whoever looks: how it is built, its inputs, and every attention site it computes.

The facts are read off the model's own source and configuration, never off the recogniser; `truth.py` counts calls of the named modules in a
forward of the untouched model, so that the number of sites is not our opinion.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

Kind = Literal["self", "cross", "channels", "linear"]


@dataclass(frozen=True)
class Sites:
    """A group of like sites of one model, at its table's input size.

    count: sites of the group in one forward. module: name of the class whose every call computes `per_call` of them; "" where the attention
    is not a module's own, and then `because` says how the count was made.
    queries, keys: length of the query and the key axis of one attention problem (the window where windows attend, the channels of a head
    where channels attend). heads: number of heads.
    kind: self, cross (keys from another stream than the queries), channels (cross-covariance), linear (no normalised query-key map at all).
    causal: a query never sees a later key.
    grid: (H, W) or (T, H, W) that the queries' token stream is laid out in, where it is a picture's or a video's; prefix: tokens before
    the grid (CLS, registers). window: the local part of the grid that attends to itself, where attention is windowed.
    visual: visual positions per row among the keys of a language model's site.
    """

    count: int
    module: str
    queries: int
    keys: int
    heads: int
    kind: Kind = "self"
    causal: bool = False
    grid: tuple[int, ...] | None = None
    prefix: int = 0
    window: tuple[int, ...] | None = None
    visual: int = 0
    per_call: int = 1
    because: str = ""


@dataclass(frozen=True)
class Entry:
    """One architecture. build: implementation ("sdpa" or "eager") -> module in eval mode, float32, seeded. inputs: batch -> keyword
    arguments of forward.

    implementations: those the model has; ("eager",) where its code knows no fused attention. forms: what it is in the corpus for, words of
    `forms.FORMS`. none: why a model without attention has none. core: also run by `make test`, not only by `make test-corpus`.
    alone: number of sites at a batch of one, where it is another: every picture is a problem of its own.
    breaks: why its capture is several graphs, if it is. note: what a reader of the coverage table should know.
    """

    name: str
    build: Callable[[str], nn.Module]
    inputs: Callable[[int], Mapping[str, Any]]
    sites: tuple[Sites, ...] = ()
    implementations: tuple[str, ...] = ("sdpa", "eager")
    forms: tuple[str, ...] = ()
    none: str = ""
    core: bool = False
    breaks: str = ""
    note: str = ""
    alone: int | None = None

    @property
    def truth(self) -> int:
        return sum(group.count for group in self.sites)

    def truth_at(self, batch: int) -> int:
        """The number of sites at a batch of one or two."""
        return self.truth if batch > 1 or self.alone is None else self.alone
