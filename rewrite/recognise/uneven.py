"""Whether the rows of a call hold different numbers of visual tokens, told before its graph runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from rewrite.recognise.call_sizes import CallSizes
from rewrite.recognise.masks import evaluate
from rewrite.recognise.operators import canonical, shape_of
from rewrite.tokens.visual import rectangular, visual_merges

# What makes a mask of rows and tokens one of channels too.
_WIDENS = frozenset({"unsqueeze", "expand", "expand_as", "cast", "contiguous"})


@dataclass(frozen=True)
class VisualMask:
    """What tells visual positions where features join a text: a mask whose first axes are [B, N], or [B * N] of the `rows` [B, N]."""

    mask: fx.Node
    rows: fx.Node | None

    def counts(self, inputs: Mapping[fx.Node, Any], call: CallSizes) -> torch.Tensor | None:
        """[B]: the visual tokens of each row; None of a mask that is computed from activations."""
        mask = evaluate(self.mask, inputs, call)
        rows = mask if self.rows is None else evaluate(self.rows, inputs, call)
        if mask is None or rows is None:
            return None
        return (mask if mask.ndim > 1 else mask.view_as(rows)).reshape(*rows.shape[:2], -1)[..., 0].sum(1)


def visual_masks(graph: fx.Graph) -> list[VisualMask]:
    """Those of a graph."""
    found: list[VisualMask] = []
    for merge in visual_merges(graph):
        mask = merge.mask
        while mask is not None and len(shape_of(mask) or ()) == 3 and canonical(mask) in _WIDENS:
            mask = mask.args[0] if isinstance(mask.args[0], fx.Node) else None
        if mask is not None:
            found.append(VisualMask(mask, rectangular(mask) if len(shape_of(mask) or ()) == 1 else None))
    return found


def rows_differ(masks: Sequence[VisualMask], inputs: Mapping[fx.Node, Any], given: Sequence[torch.Tensor | None]) -> bool:
    """Whether the rows of a call hold different numbers of visual tokens, by the masks of a graph or those it is `given` [B, N]."""
    counts = [visual.sum(1) for visual in given if visual is not None]
    if masks:
        call = CallSizes(inputs)
        counts += [count for mask in masks if (count := mask.counts(inputs, call)) is not None]
    return any(bool((count != count[0]).any()) for count in counts)
