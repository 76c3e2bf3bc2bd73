"""Fusions into a graph: tokens fused in front of a layer, whose attention is still that of the tokens as they were (one step ahead).

The map of N tokens, of which keys add up and rows are averaged as their tokens are fused, times the values of the N - r, is the attention
of the N queries and keys over values that every token has of what it went into, with its rows averaged. So no map is written.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping

import torch
from torch import fx

from rewrite.ir.errors import NotApplicableError
from rewrite.ir.operations import Statistic
from rewrite.ir.selection import LOG_SIZE, Merge
from rewrite.ir.site import Site
from rewrite.lower.cursor import Cursor
from rewrite.lower.lowering import lower_statistic
from rewrite.lower.merging import Merged, sizes_behind
from rewrite.lower.stand_ins import StandIns
from rewrite.recognise.operators import value_of
from rewrite.recognise.sites import Found
from rewrite.tokens import choose, fusing, merging
from rewrite.tokens.placement import Selection


def fuse_tokens(
    one: Merge,
    site: Site,
    entry: Found,
    result: fx.Node,
    stream: fx.Node,
    copies: Mapping[fx.Node, fx.Node],
    left: Merged,
    later: list[Found],
    sizes: StandIns,
) -> tuple[fx.Node, Merged, Mapping[fx.Node, Mapping[int, Selection]]]:
    """The stream in front of `entry` fused: it, what is left then, and what has fewer tokens now, by axis.

    result: of the site's attention. copies: of what makes its queries and keys, which see the stream as it was.
    """
    graph, before, attend = stream.graph, left.selection, site.attend
    at = Cursor(graph, max(*copies.values(), left.length))
    counted = left.sizes or at.call(merging.ones_each, (stream,))
    short: dict[fx.Node, Mapping[int, Selection]] = {}
    if left.sizes is None:
        sizes.values[site.name] = at.call(merging.log_size, (counted,))
        sizes.values[site.name].meta["example_value"] = value_of(sizes.nodes[site.name])
    statistic = Statistic("received", attend, "queries")
    call = attention_of(result, one.by)
    query, key, value = (node for node in call.args[:3] if isinstance(node, fx.Node))
    given = {attend.query: copies[query], attend.key: copies[key], LOG_SIZE: sizes.values[site.name]}
    received = lower_statistic(graph, statistic, entry.region, {**copies, at.last: at.last}, given)
    at = Cursor(graph, received)
    both = at.call(fusing.attended, (received, counted))
    mean, weights = (at.call(operator.getitem, (both, part)) for part in range(2))
    assert one.criteria is not None
    criteria = (one.criteria.similar, one.criteria.informative, one.criteria.sized)
    match = at.call(fusing.fused_match, (stream, mean, counted, one.prefix, one.suffix, one.count, criteria))
    stays, merged, target = (at.call(operator.getitem, (match, part)) for part in range(3))
    positions = at.call(choose.composed_positions, (before.positions if before else None, stays))
    into = at.call(merging.composed_holders, (None, stays, merged, target))
    holders = at.call(merging.composed_holders, (before.holders, stays, merged, target)) if before else into
    selection = Selection(positions, left.length, at.call_method("size", (positions, 1)), holders=holders, sized=one.proportional)
    heavier = at.call(merging.merged_sizes, (weights, stays, merged, target))
    cut = at.call(merging.merged_tokens, (stream, weights, heavier, stays, merged, target))
    after = at.call(merging.merged_sizes, (counted, stays, merged, target))
    short[cut] = {1: selection}
    short.update({node: {1: selected} for node, selected in sizes_behind(one, after, selection, later, sizes, at).items()})
    spread = Cursor(graph, max(value, into)).call(fusing.spread_values, (value, into))
    spread.meta["example_value"] = value_of(value)
    short[spread] = {2: before} if before else {}
    tensors = call.args[3:]
    call.args = (copies[query], copies[key], spread, *tensors)
    averaged = Cursor(graph, result).call(fusing.fused_rows, (result, weights, heavier, stays, merged, target))
    averaged.meta["example_value"] = value_of(result)
    for user in [user for user in result.users if user is not averaged]:
        user.replace_input_with(result, averaged)
    short[averaged] = {2: selection}
    return cut, Merged(selection, left.length, after, left.hint - one.number(left.hint)), short


def attention_of(result: fx.Node, by: str) -> fx.Node:
    """The call of the operator that a lowered attention's result is of."""
    call = result.args[0]
    if not isinstance(call, fx.Node) or call.target is not torch.ops.rewrite.attend.default:
        raise NotApplicableError(f"{by}: {result.name} is not the result of one attention")
    return call
