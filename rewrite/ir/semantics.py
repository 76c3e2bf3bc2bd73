"""What the IR means: every operation evaluated densely with torch, as the definition and not as a fast way.

Verification compares a recognised region with this, and every lowering is judged against it.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping

import sympy
import torch

from rewrite.ir.errors import RewriteError
from rewrite.ir.evaluation import (
    Value,
    aligned,
    all_positions,
    evaluate_expression,
    evaluate_expressions,
    places_of,
    positions,
    read_at,
    without_fractions,
)
from rewrite.ir.expression import I, J, letters, tensors_in
from rewrite.ir.operations import (
    Attend,
    Body,
    DepthwiseConv,
    GridBias,
    Groups,
    HeadMix,
    Operation,
    PlainOperation,
    Pool,
    ReceivedSinks,
    RegionRoutes,
    ReinforceHeads,
    SinkGroups,
    SparseMap,
    Sum,
    VisualGroups,
)
from rewrite.ir.program import Program
from rewrite.ir.selection import Drawn, Exit, Merge, Received, Spread, TokenOperation, first_layer
from rewrite.ir.site import Site
from rewrite.ir.site_operations import (
    depthwise_conv,
    grid_bias,
    pool,
    received_sinks,
    region_routes,
    reinforce_heads,
    sink_groups,
    sparse_map,
    spread_out,
    visual_groups,
)
from rewrite.ir.statistic import Statistic

__all__ = [
    "Value",
    "aligned",
    "all_positions",
    "attend",
    "attention_weights",
    "evaluate",
    "evaluate_expression",
    "evaluate_expressions",
    "evaluate_operation",
    "evaluate_site",
    "mix_heads",
    "places_of",
    "positions",
    "read_at",
    "read_statistic",
    "without_fractions",
]


def mix_heads(mix: HeadMix | None, terms: torch.Tensor, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """terms [B, H, Nq, Nk] -> likewise, ``sum_h matrix[g,h] terms[b,h,i,j] + bias[g]``; unchanged for None."""
    if mix is None:
        return terms
    mixed = torch.einsum("gh,bhij->bgij", values[mix.matrix].to(terms.dtype), terms)
    return mixed if mix.bias is None else mixed + values[mix.bias].to(terms.dtype).view(-1, 1, 1)


def normalised(
    operation: Attend, scores: torch.Tensor, seen: torch.Tensor, sink: torch.Tensor | None, environment: Mapping[str, Value]
) -> torch.Tensor:
    """Scores to weights over keys, [B, H, Nq, Nk], which `seen` may broadcast to; `sink` [B, H, Nq, 1]: a key without a value.

    environment: positions by name, which the denominator may depend on.
    """
    if operation.normaliser == "softmax":
        hidden = scores.masked_fill(~seen, -torch.inf)
        logits = hidden if sink is None else torch.cat([hidden, sink], dim=-1)
        # A row of nothing but -inf is NaN: it sees no key.
        return logits.softmax(-1)[..., : scores.shape[-1]].masked_fill(~seen.any(-1, keepdim=True), 0.0)
    kept = scores.masked_fill(~seen, 0.0)
    if operation.normaliser == "none":
        return kept
    total = kept.sum(-1, keepdim=True)
    denominator = evaluate_expression(operation.denominator, {**environment, "total": total})
    return _divided(kept, torch.as_tensor(denominator, dtype=total.dtype, device=total.device).expand_as(total))


def _divided(terms: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """terms / total, zeros where the total is zero."""
    return (terms / total.masked_fill(total == 0, 1.0)).masked_fill(total == 0, 0.0)


def attention_weights(operation: Attend, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The map [B, H, Nq, Nk] that `operation` multiplies the values by, after every step that `Attend` lists."""
    query, key = values[operation.query], values[operation.key]
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    dot = query @ key.transpose(-2, -1)
    environment: dict[str, Value] = {**all_positions(dot.shape, dot.device), "qk": dot}
    mixing = {name for mix in operation.mixes for name in (mix.matrix, mix.bias)}
    read = {name: read_at(values[name], indices, environment) for name, indices in operation.tensors().items() if name not in mixing}
    environment.update(read)

    def value_of(expression: sympy.Basic, like: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(evaluate_expression(expression, environment), dtype=like.dtype, device=like.device).expand_as(like)

    score = mix_heads(operation.score_mix, value_of(operation.score, dot), values)
    # Not expanded: most masks are the same for every head, and many for every row.
    seen = torch.as_tensor(evaluate_expression(operation.mask, environment), device=dot.device)
    seen = seen.reshape((1,) * (4 - seen.dim()) + seen.shape)
    sink = None if operation.sink is None else value_of(operation.sink, dot[..., :1])
    weights = mix_heads(operation.weight_mix, normalised(operation, score, seen, sink, environment), values)
    # A bias of the mix, or another head's mask, would let hidden pairs weigh something.
    environment["w"] = weights if operation.weight_mix is None else weights.masked_fill(~seen, 0.0)
    weights = value_of(operation.weight, dot)
    if operation.renormalised:
        weights = _divided(weights, weights.sum(-1, keepdim=True))
    return weights if operation.groups is None else _by_group(operation.groups, weights, environment)


def read_statistic(statistic: Statistic, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What the statistic's sums come to, with the map held: [B, H, Nk] over queries, [B, H, rows] over keys."""
    weights = attention_weights(statistic.attend, values)
    environment: dict[str, Value] = {**all_positions(weights.shape, weights.device), "w": weights}
    environment |= {name: read_at(values[name], indices, environment) for name, indices in tensors_in(statistic.term).items()}
    terms = torch.as_tensor(evaluate_expression(statistic.term, environment)).expand_as(weights)
    start, stop = statistic.rows or (0, None)
    return terms[:, :, start:stop].sum(2 if statistic.over == "queries" else 3)


def _by_group(groups: Groups, weights: torch.Tensor, environment: dict[str, Value]) -> torch.Tensor:
    """Weights [B, H, Nq, Nk], each times what its key's group counts."""
    member = environment[groups.membership]
    for index, name in enumerate(groups.names):
        environment[f"mass_{name}"] = (weights * (member == index)).sum(-1, keepdim=True)
    factor = torch.zeros_like(weights)
    for index, weight in enumerate(groups.weights):
        chosen = torch.as_tensor(evaluate_expression(weight, environment), dtype=weights.dtype, device=weights.device)
        factor = torch.where(member == index, chosen, factor)
    return weights * factor


def attend(operation: Attend, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """[B, H, Nq, Dv]."""
    weights, value = attention_weights(operation, values), values[operation.value]
    return weights @ value.repeat_interleave(weights.shape[1] // value.shape[1], dim=1)


def evaluate_operation(operation: Operation, values: dict[str, torch.Tensor], cached: torch.Tensor | None = None) -> None:
    """Add the operation's results to `values`."""
    match operation:
        case Attend():
            values[operation.result] = attend(operation, values)
        case Statistic():
            values[operation.result] = read_statistic(operation, values)
        case Pool():
            values[operation.result] = pool(operation, values)
        case DepthwiseConv():
            values[operation.result] = depthwise_conv(operation, values)
        case GridBias():
            values[operation.result] = grid_bias(operation, values)
        case Sum():
            values[operation.result] = functools.reduce(operator.add, (values[term] for term in operation.terms))
        case SinkGroups():
            values[operation.result], values[operation.active], values[operation.count] = sink_groups(operation, values, cached)
        case VisualGroups():
            values[operation.result], values[operation.active] = visual_groups(operation, values, cached)
        case ReceivedSinks():
            values[operation.result] = received_sinks(operation, values, cached)
        case ReinforceHeads():
            values[operation.result] = reinforce_heads(operation, values)
        case RegionRoutes():
            values[operation.result] = region_routes(operation, values)
        case SparseMap():
            values[operation.result] = sparse_map(operation, values)
        case PlainOperation():
            values[operation.result] = operation.compute({field: values[name] for field, name in operation.reads().items()})


def evaluate(body: Body, operands: Mapping[str, torch.Tensor], cached: torch.Tensor | None = None) -> torch.Tensor:
    """The site's output [B, H, Nq, Dv] from its operands, densely, in their dtype; `cached` as in `sink_groups` and its like."""
    values = dict(operands)
    for operation in body.operations:
        evaluate_operation(operation, values, cached)
    return values[body.result]


def evaluate_site(
    program: Program,
    site: Site,
    operands: Mapping[str, torch.Tensor],
    visual: torch.Tensor | None = None,
    cached: torch.Tensor | None = None,
) -> torch.Tensor:
    """The site's output [B, H, Nq, Dv] in its program: where tokens have left, the site computed on the kept ones alone.

    visual [B, Nk] tells which keys are visual; the queries are the last Nq of them. Rows of tokens that have left are NaN. Raises
    `ValueError` where they were chosen by the attention of another site.
    """
    before = [one for one in program.token_operations(site.stack) if site.layer >= first_layer(one)]
    if not before:
        return evaluate(site.body, operands, cached)
    if visual is None:
        raise ValueError(f"tokens have left {site.name}; which ones are visual must be given")
    gone = torch.zeros_like(visual)
    for one in before:
        gone |= _leaving(one, site, operands, visual & ~gone, visual)
    axes = {"query": "bhi", "key": "bhj", "value": "bhj", "hidden": "bi", "input": "bi", "visual": "bi"}
    for attend_ in site.body.attends():
        for name, indices in attend_.tensors().items():
            if letters(indices) is None and any({I, J} & index.free_symbols for index in indices):
                places = ", ".join(map(str, indices))
                raise RewriteError(f"{name}[{places}] cannot be cut to the tokens that are left of {site.name}: it is read by position")
            axes[name] = letters(indices) or ""
    queries, rows = operands["query"].shape[2], []
    for row, keep in enumerate(~gone):
        kept = {"i": keep[-queries:].nonzero().flatten(), "j": keep.nonzero().flatten()}
        own = dict(operands)
        for name in own.keys() & {name for name, letters_ in axes.items() if letters_}:
            for axis, letter in enumerate(axes[name]):
                index = torch.tensor([row]) if letter == "b" else kept.get(letter)
                if index is not None and own[name].shape[axis] > 1:
                    own[name] = own[name].index_select(axis, index.to(own[name].device))
        own_cached = None if cached is None else cached[row : row + 1][..., keep[: cached.shape[-1]]]
        output = evaluate(site.body, own, own_cached)[0]
        full = output.new_full((output.shape[0], queries, output.shape[2]), torch.nan)
        rows.append(full.index_copy(1, kept["i"].to(full.device), output))
    return torch.stack(rows)


def _leaving(
    one: TokenOperation, site: Site, operands: Mapping[str, torch.Tensor], present: torch.Tensor, every: torch.Tensor
) -> torch.Tensor:
    """bool [B, Nk]: which of the visual tokens `present` leave; `every`: of those there were at the start."""
    if isinstance(one, Exit):
        if one.when is not None:
            raise ValueError(f"whether tokens have left {site.name} is decided by more than its own tensors")
        return present
    if isinstance(one, Merge):
        raise ValueError(f"tokens of {site.name} are merged by what {one.site} is given")
    number = one.count.number(int(present[0].sum()), int(every[0].sum()))
    if isinstance(one.rule, Drawn):
        raise ValueError(f"which tokens have left {site.name} is drawn for the whole stream")
    if isinstance(one.rule, Spread):
        if site.layer != one.layer:
            raise ValueError(f"which tokens have left {site.name} is chosen by what enters another layer")
        places = present.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, : int(present[0].sum())]
        features = operands["hidden"].gather(1, places[..., None].expand(-1, -1, operands["hidden"].shape[-1]))
        best = places.gather(1, spread_out(features, number))
    elif isinstance(one.rule, Received) and one.rule.sites == (site.name,):
        received = read_statistic(Statistic("received", site.attend, rows=one.rule.rows), dict(operands)).mean(1)
        best = received.masked_fill(~present, -torch.inf).topk(number, dim=1).indices
    else:
        raise ValueError(f"which tokens have left {site.name} is not chosen by its own attention")
    return present & ~torch.zeros_like(present).scatter(1, best, True)
