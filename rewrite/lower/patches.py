"""Patches of a tower that leave it."""

from __future__ import annotations

import operator

from torch import fx

from rewrite.ir.errors import NotApplicableError
from rewrite.ir.selection import Select
from rewrite.lower.cursor import Cursor, behind_inputs
from rewrite.lower.left import Left
from rewrite.recognise.operators import hinted_shape
from rewrite.recognise.sites import Found
from rewrite.tokens import choose


def every_patch(stream: fx.Node) -> Left:
    """Where none has left yet; stream [B, N, C]."""
    at = Cursor(stream.graph, behind_inputs(stream.graph, stream))
    length = at.call_method("size", (stream, 1))
    return Left(None, length, length, 0, 0, (hinted_shape(stream)[1], 0, 0))


def left_of_patches(
    one: Select, entry: Found, left: Left, current: fx.Node, score: fx.Node | None, data_sizes: bool, at: Cursor
) -> tuple[fx.Node, fx.Node | None, Left]:
    """Places of what stays among the tokens of `current`, which of them are no padding (None: all), and what is left then.

    data_sizes: a number of tokens may be read off the data.
    """
    layout, tokens = entry.site.layout, left.hints[0]
    around = layout.prefix + layout.suffix
    there = at.combine(operator.sub, left.kept, around)
    every = at.combine(operator.sub, left.length, around)
    hint = one.count.number(tokens - around, hinted_shape(current)[1] - around)
    number = at.call(choose.number_kept, (there, every, one.count.keep, one.count.rounding, one.count.of == "all"))
    stays: fx.Node | None = None
    if one.count.mass is not None:
        share = (one.count.keep, one.count.rounding) if isinstance(one.count.keep, float) and one.count.of == "present" else None
        ends = (layout.prefix, layout.suffix)
        facts = (number, share, one.count.mass, not data_sizes)
        both = at.call(choose.patches_of_mass, (score, left.present, ends, *facts))
        chosen, stays = (at.call(operator.getitem, (both, part)) for part in range(2))
    elif left.present is not None:
        raise NotApplicableError(f"{entry.site.name}: rows keep different numbers of patches, of which {one.by} would have to choose some")
    else:
        chosen = at.call(choose.chosen_patches, (score, layout.prefix, number, layout.suffix))
    positions, present = at.call(choose.composed_positions, (left.positions, chosen)), stays
    if one.fuse:
        positions = at.call(choose.positions_with_fused, (positions, left.length, layout.suffix))
    if one.fuse and stays is not None:
        present = at.call(choose.present_with_fused, (stays, left.present, left.kept, layout.suffix))
    kept = at.call_method("size", (positions, 1))
    hints = (around + hint + one.fuse, 0, 0)
    return chosen, stays, Left(positions, left.length, kept, 0, 0, hints, left.fused or one.fuse, present)
