"""Which tokens stay where each row keeps a number of its own: rows that hold different numbers of visual tokens, or decide by themselves.

Rows that keep fewer than others are padded with some of the tokens that leave, which later attention does not see. In what follows, visual,
bool [B, N], are the visual tokens that are there, no padding among them; and what leaves is bool [B, N] too. Numbers are int64 [B].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rewrite.ir.selection import Count, Rounding


def numbers_of(visual: Tensor) -> Tensor:
    """How many visual tokens each row holds."""
    return visual.sum(1)


def shown_of_rows(shown: Tensor, stream: Tensor) -> Tensor:
    """bool [B, N] of [B or 1, N] that says which tokens of `stream` [B, N, C] are shown to others at all."""
    return shown.bool().expand(stream.shape[:2])


def numbers_kept(numbers: Tensor, every: Tensor, keep: float | int, rounding: Rounding, of_all: bool) -> Tensor:
    """How many of the `numbers` of visual tokens stay, of `every` at first; see `Count`. None of none."""
    count = Count(keep, rounding, "all" if of_all else "present")
    rows = zip(numbers.tolist(), every.tolist(), strict=True)
    return numbers.new_tensor([min(count.number(now, first), now) for now, first in rows])


def rows_leaving_irrelevant(visual: Tensor, score: Tensor, below: float) -> Tensor:
    """The visual tokens of each row that receive less than `below`, of `score` [B, N], together."""
    return visual & ((score * visual).sum(1) < below)[:, None]


def rows_leaving_routed(visual: Tensor, decision: Tensor) -> Tensor:
    """The visual tokens of each row of which a router says so, bool [B]."""
    return visual & decision[:, None]


def rows_that_stay(leaving: Tensor, present: Tensor | None) -> tuple[Tensor, Tensor]:
    """Places [B, K] (int64, ascending) of the tokens that do not leave, and which of these are no padding, bool.

    K is what the row that keeps most keeps. present: bool [B, N], which tokens were no padding before; None: all.
    """
    stays = ~leaving if present is None else present & ~leaving
    places = (~stays).to(torch.uint8).argsort(dim=1, stable=True)[:, : int(stays.sum(1).max())].sort(dim=1).values
    return places, stays.gather(1, places)


def joined_present(parts: Sequence[Tensor | None], like: Tensor, kept: Sequence[int]) -> Tensor:
    """bool [B, sum K_i]: which tokens of a concatenation are no padding; of a part without padding, None, the `kept` tokens all are.

    like: the positions [B, sum K_i] of these.
    """
    given = zip(parts, kept, strict=True)
    return torch.cat([like.new_ones(len(like), count, dtype=torch.bool) if part is None else part for part, count in given], 1)
