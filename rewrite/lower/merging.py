"""Merges into a graph: the match by a layer's keys, the stream merged, and the sizes that later attention reads."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from rewrite.ir.selection import Merge
from rewrite.lower.cursor import Cursor
from rewrite.lower.lowering import lower_operand
from rewrite.lower.stand_ins import StandIns
from rewrite.recognise.operators import value_of
from rewrite.recognise.sites import Found
from rewrite.tokens import choose, merging
from rewrite.tokens.placement import Selection


@dataclass
class Merged:
    """What became of a stack's tokens so far; sizes: of those that are left, None where none was merged."""

    selection: Selection | None
    length: fx.Node
    sizes: fx.Node | None
    hint: int


def merge_tokens(
    one: Merge, entry: Found, current: fx.Node, left: Merged, later: list[Found], sizes: StandIns, at: Cursor
) -> tuple[fx.Node, Merged, Mapping[fx.Node, Mapping[int, Selection]]]:
    """The stream `current` behind the attention of `entry` merged: it, what is left then, and what has fewer tokens now, by axis."""
    key = lower_operand(at, entry.region, "key")
    match = at.call(merging.matched, (key, one.prefix, one.suffix, one.count))
    stays, merged, target = (at.call(operator.getitem, (match, part)) for part in range(3))
    before = left.selection
    positions = at.call(choose.composed_positions, (before.positions if before else None, stays))
    holders = at.call(merging.composed_holders, (before.holders if before else None, stays, merged, target))
    kept = at.call_method("size", (positions, 1))
    selection = Selection(positions, left.length, kept, holders=holders, sized=one.proportional)
    counted = left.sizes or at.call(merging.ones_each, (current,))
    after = at.call(merging.merged_sizes, (counted, stays, merged, target))
    cut = at.call(merging.merged_tokens, (current, counted, after, stays, merged, target))
    behind = sizes_behind(one, after, selection, later, sizes, at)
    short = {node: {1: selected} for node, selected in {cut: selection, **behind}.items()}
    return cut, Merged(selection, left.length, after, left.hint - one.number(left.hint)), short


def sizes_behind(
    one: Merge, after: fx.Node, selection: Selection, later: list[Found], sizes: StandIns, at: Cursor
) -> Mapping[fx.Node, Selection]:
    """Tell the sites of later layers the sizes `after` a merge; what that put into the graph that has fewer tokens."""
    readers = [other.site.name for other in later if other.site.layer > one.layer and other.site.name in sizes.nodes]
    if not readers:
        return {}
    log = at.call(merging.log_size, (after,))
    log.meta["example_value"] = value_of(sizes.nodes[readers[0]])
    sizes.values.update(dict.fromkeys(readers, log))
    return {log: selection}
