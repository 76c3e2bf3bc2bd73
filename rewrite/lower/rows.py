"""Visual tokens that leave where each row of a batch keeps a number of its own."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable

import sympy
from torch import fx

from rewrite.ir.expression import conjuncts, letters
from rewrite.ir.selection import Exit, Irrelevant, Select
from rewrite.lower.cursor import Cursor, behind_inputs
from rewrite.lower.left import Left
from rewrite.lower.pictures import Stay
from rewrite.recognise.mask_terms import mask_terms
from rewrite.recognise.operators import hinted_shape
from rewrite.recognise.sites import Found
from rewrite.tokens import by_row, choose, kept_elements
from rewrite.tokens.gather import gather_tokens
from rewrite.tokens.visual import VisualMerge


def every_token_of_rows(entry: Found, merge: VisualMerge, stream: fx.Node, mask: fx.Node) -> Left:
    """Where no token of `stream` [B, N, C] has left yet; mask: bool [B, N], which are visual."""
    batch, tokens, _ = hinted_shape(stream)
    at = Cursor(stream.graph, behind_inputs(stream.graph, max(stream, mask)))
    numbers, length = at.call(by_row.numbers_of, (mask,)), at.call_method("size", (stream, 1))
    count = 0 if merge.source is None else math.prod(hinted_shape(merge.source)[:-1]) // batch
    shown, present = _hidden_from_all(entry, stream) if batch > 1 else None, None
    if shown is not None:
        # What pads the prompts themselves may go too: it would be all that a row of fewer pictures keeps more of.
        index = tuple(slice(None) if axis in shown[1] else 0 for axis in "bhij")
        present = at.call(by_row.shown_of_rows, (at.call(operator.getitem, (shown[0], index)), stream))
    return Left(None, length, length, 0, numbers, (tokens, count, count), present=present)


def _hidden_from_all(entry: Found, ahead: fx.Node) -> tuple[fx.Node, str] | None:
    """What says which tokens the mask of a site shows at all, by row: a tensor [B, 1, 1, N] that stands in front of `ahead`, and the
    letters of the axes that are read of it. None where the mask is not read so: padding of the caller's is then taken for tokens like
    others.
    """
    if entry.site.cached or entry.site.dims["Nq"] != entry.site.dims["Nk"]:
        return None
    for name, operand in entry.region.tensors.items():
        found = mask_terms(operand.node, name)
        for term in () if found is None else conjuncts(found.mask):
            read = term.lhs if isinstance(term, sympy.Ne) and term.rhs == 0 else None
            if isinstance(read, sympy.Indexed) and letters(read.indices) == "bj" and found is not None:
                node, axes = found.tensors[str(read.base.label)]
                if node < ahead:
                    return node, axes
    return None


def left_by_row(
    one: Exit | Select,
    left: Left,
    mask: fx.Node,
    current: fx.Node,
    score: fx.Node | None,
    stay: Stay | None,
    routed: Callable[[fx.Node], fx.Node],
    at: Cursor,
) -> tuple[fx.Node, Left]:
    """Places of what stays among the tokens of `current`, and what is left then.

    mask: bool [B, N], the visual tokens among all. stay: of pictures, where their tower scores. routed: from the visual tokens of
    `current`, what a router says of each row, bool [B].
    """
    here = mask if left.positions is None else at.call(gather_tokens, (mask, left.positions, 1))
    visual = here if left.present is None else at.call_method("logical_and", (here, left.present))
    tokens, present, every = left.hints
    hint = present
    if isinstance(one, Exit) and one.when is None:
        leaving, hint = visual, 0
    elif isinstance(one, Exit) and isinstance(one.when, Irrelevant):
        leaving = at.call(by_row.rows_leaving_irrelevant, (visual, score, one.when.below))
    elif isinstance(one, Exit):
        leaving = at.call(by_row.rows_leaving_routed, (visual, routed(here)))
    elif stay is not None:
        # Features lie at all places of the text, also at those that the prompt's own mask hides.
        of_all = at.call(kept_elements.stay_at_places, (here, stay.mask)) if stay.relaid else stay.mask
        leaving = at.call(choose.visual_leaving_by_picture, (here, of_all))
        hint = stay.share.numerator * present // stay.share.denominator
    else:
        numbers = at.call(by_row.numbers_of, (visual,))
        kept = at.call(by_row.numbers_kept, (numbers, left.every, one.count.keep, one.count.rounding, one.count.of == "all"))
        given = (visual, current, kept) if score is None else (visual, score, kept)
        leaving = at.call(choose.visual_leaving_spread if score is None else choose.visual_leaving, given)
        hint = one.count.number(present, every)
    both = at.call(by_row.rows_that_stay, (leaving, left.present))
    chosen, stays = (at.call(operator.getitem, (both, part)) for part in range(2))
    positions = at.call(choose.composed_positions, (left.positions, chosen))
    number = at.call_method("size", (positions, 1))
    # One row has none beside it that keeps more.
    padded = stays if hinted_shape(current)[0] > 1 else None
    return chosen, Left(positions, left.length, number, 0, left.every, (tokens - present + hint, hint, every), present=padded)
