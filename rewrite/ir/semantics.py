"""What the IR means: every operation evaluated densely with torch, as the definition and not as a fast way.

Verification compares a recognised region with this, and every lowering is judged against it.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping

import sympy
import torch
from torch.nn import functional

from rewrite.ir.errors import NotApplicableError, RewriteError
from rewrite.ir.evaluation import (
    Value,
    aligned,
    all_positions,
    evaluate_expression,
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
from rewrite.ir.site import Site
from rewrite.ir.statistic import Statistic

__all__ = [
    "Value",
    "aligned",
    "all_positions",
    "attend",
    "attention_weights",
    "evaluate",
    "evaluate_expression",
    "evaluate_operation",
    "evaluate_site",
    "mix_heads",
    "places_of",
    "pool",
    "positions",
    "read_at",
    "read_statistic",
    "received_sinks",
    "region_routes",
    "reinforce_heads",
    "sink_groups",
    "sparse_map",
    "visual_groups",
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


def pool(operation: Pool, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
    source = values[operation.source][:, :, operation.prefix :]
    batch, heads, _, width = source.shape
    # Along a sequence the number of tokens is the call's own; a grid is fixed.
    grid = operation.grid if len(operation.grid) > 1 else source.shape[2:3]
    image = source.transpose(-2, -1).reshape(batch * heads, width, *grid)
    match operation.size:
        case (length,):
            pooled = functional.adaptive_avg_pool1d(image, length)
        case (height, breadth):
            pooled = functional.adaptive_avg_pool2d(image, (height, breadth))
        case _:
            raise ValueError(f"pooling to {operation.size}: one or two axes are pooled")
    return pooled.reshape(batch, heads, width, -1).transpose(-2, -1)


def depthwise_conv(operation: DepthwiseConv, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
    source, weight = values[operation.source], values[operation.weight]
    batch, heads, tokens, width = source.shape
    image = source[:, :, operation.prefix :].transpose(-2, -1).reshape(batch, heads * width, *operation.grid)
    convolved = functional.conv2d(image, weight, values[operation.bias], padding=weight.shape[-1] // 2, groups=heads * width)
    rows = convolved.reshape(batch, heads, width, tokens - operation.prefix).transpose(-2, -1)
    return functional.pad(rows, (0, 0, operation.prefix, 0))


def grid_bias(operation: GridBias, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
    table = values[operation.table]
    resized = functional.interpolate(table, size=operation.grid, mode="bilinear", align_corners=False)
    bias = (resized + values[operation.rows][0] + values[operation.columns][0]).flatten(-2).unsqueeze(0)
    if operation.prefix is not None:
        bias = torch.cat([values[operation.prefix], bias], dim=-1)
    return bias.transpose(-2, -1) if operation.transposed else bias


TEXT, VISUAL, VISUAL_SINK, TEXT_SINK = range(4)


def sink_groups(
    operation: SinkGroups, values: Mapping[str, torch.Tensor], cached: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The operation's three results; `cached` [B, earlier] holds the groups that tokens of a KV cache were given.

    Sinks are those of the prompt (Kang et al. reuse the prefill's in decoding): tokens that come behind a cache without an image are text.
    """
    hidden, visual = values[operation.hidden], values[operation.visual]
    rms = hidden.float() * torch.rsqrt(hidden.float().pow(2).mean(-1, keepdim=True) + operation.epsilon)
    chosen = rms[..., list(operation.dims)] if operation.dims else rms
    sink = chosen.abs().amax(-1) > operation.threshold
    codes = torch.where(visual, torch.where(sink, VISUAL_SINK, VISUAL), torch.where(sink, TEXT_SINK, TEXT)).to(torch.int32)
    new = codes.shape[1]
    if cached is not None:
        codes = codes * visual.any(1, keepdim=True)
        codes = torch.cat([cached.expand(codes.shape[0], -1), codes], dim=1)
    is_visual = (codes == VISUAL) | (codes == VISUAL_SINK)
    place = torch.arange(codes.shape[1], device=codes.device)
    last_visual = torch.where(is_visual, place, -1).amax(1, keepdim=True)
    active = (place[-new:] > last_visual) & (codes == VISUAL_SINK).any(1, keepdim=True)
    return codes, active.to(torch.int32), is_visual.sum(1).to(torch.float32)


def visual_groups(
    operation: VisualGroups, values: Mapping[str, torch.Tensor], cached: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The operation's two results; `cached` [B, earlier] holds the groups that tokens of a KV cache were given."""
    visual = values[operation.visual]
    codes, new = torch.where(visual, VISUAL, TEXT).to(torch.int32), visual.shape[1]
    if cached is not None:
        codes = torch.cat([cached.expand(codes.shape[0], -1), codes], dim=1)
    place = torch.arange(codes.shape[1], device=codes.device)
    last_visual = torch.where(codes == VISUAL, place, -1).amax(1, keepdim=True)
    active = (place[-new:] > last_visual) & (last_visual >= 0)
    return codes, active.to(torch.int32)


def received_sinks(operation: ReceivedSinks, values: Mapping[str, torch.Tensor], cached: torch.Tensor | None = None) -> torch.Tensor:
    """[B, H, Nk] int32; `cached` [B, H, earlier] holds what keys of a KV cache were given."""
    received = values[operation.received].detach()
    batch, heads, keys = received.shape
    if cached is not None:
        return functional.pad(cached, (0, keys - cached.shape[-1])).expand(batch, -1, -1)
    if values[operation.query].shape[2] != keys:
        raise RewriteError(
            f"{operation.received} has {keys} keys and its queries are fewer: what those of a KV cache were given is not known"
        )
    rows = torch.arange(keys, 0, -1, device=received.device)
    sinks = received > operation.threshold * rows
    sinks = sinks & (sinks.cumsum(-1) > 1)
    if operation.heads is not None:
        listed = torch.tensor([head in operation.heads for head in range(heads)], device=received.device)
        sinks = sinks & listed[:, None]
    return sinks.to(torch.int32)


def reinforce_heads(operation: ReinforceHeads, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Which heads are chosen has no gradient."""
    output, without, active = values[operation.output], values[operation.without], values[operation.active]
    difference = output.detach() - without.detach()
    distance = torch.linalg.vector_norm(difference, dim=-1, dtype=torch.promote_types(difference.dtype, torch.float32))
    chosen = torch.zeros_like(distance, dtype=torch.bool).scatter(1, distance.topk(operation.heads, dim=1).indices, True)
    chosen = chosen & (active != 0)[:, None]
    return torch.where(chosen[..., None], output * operation.factor, output)


def region_routes(operation: RegionRoutes, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """[B, R, R] bool."""
    (height, width), (down, across) = operation.grid, operation.regions

    def means(tokens: torch.Tensor) -> torch.Tensor:
        """[B, H, prefix + N, D] -> [B, H, R, D]."""
        batch, heads, _, channels = tokens.shape
        tokens = tokens.detach()[:, :, operation.prefix :]
        tokens = tokens.reshape(batch, heads, down, height // down, across, width // across, channels)
        return tokens.mean((3, 5), dtype=torch.promote_types(tokens.dtype, torch.float32)).flatten(2, 3)

    query, key = means(values[operation.query]), means(values[operation.key])
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    affinity = (query @ key.transpose(-2, -1)).sum(1)
    return torch.zeros_like(affinity, dtype=torch.bool).scatter(-1, affinity.topk(operation.topk, sorted=False).indices, True)


def sparse_map(operation: SparseMap, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """[B, H, N, N] bool. Raises `NotApplicableError` where the parameters are for another N."""
    query, key = values[operation.query].detach(), values[operation.key].detach()
    narrow, bias, down, up = (values[name].detach() for name in (operation.weight, operation.bias, operation.down, operation.up))
    if down.shape[0] != query.shape[2]:
        raise NotApplicableError(f"the sparse map's parameters are for {down.shape[0]} tokens, and there are {query.shape[2]}")
    queries, keys = (functional.linear(tokens, narrow, bias) for tokens in (query, key))
    keys = (keys.transpose(-2, -1) @ down).repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    shares = (operation.scale * (queries @ keys)).softmax(-1)
    kept = shares.topk(min(operation.coefficients, shares.shape[-1]), sorted=False).indices
    shares = torch.zeros_like(shares).scatter(-1, kept, shares.gather(-1, kept))
    basis = up.masked_fill(up.abs() <= operation.threshold, 0.0)
    low_rank = shares @ basis.transpose(-2, -1)
    seen = torch.zeros_like(low_rank, dtype=torch.bool).scatter(-1, low_rank.topk(operation.keys, sorted=False).indices, True)
    seen[:, :, : operation.prefix] = True
    return seen


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
    """The site's output [B, H, Nq, Dv] in its program: where visual tokens have left, the site computed on the kept tokens alone.

    visual [B, Nk] tells which keys are visual; the queries are the last Nq of them. Rows of tokens that have left are NaN.
    """
    has_left = any(exit_.stack == site.stack and site.layer >= exit_.layer for exit_ in program.exits)
    if not has_left:
        return evaluate(site.body, operands, cached)
    if visual is None:
        raise ValueError(f"tokens have left {site.name}; which ones are visual must be given")
    axes = {"query": "bhi", "key": "bhj", "value": "bhj", "hidden": "bi", "visual": "bi"}
    for attend_ in site.body.attends():
        for name, indices in attend_.tensors().items():
            if letters(indices) is None and any({I, J} & index.free_symbols for index in indices):
                places = ", ".join(map(str, indices))
                raise RewriteError(f"{name}[{places}] cannot be cut to the tokens that are left of {site.name}: it is read by position")
            axes[name] = letters(indices) or ""
    queries, rows = operands["query"].shape[2], []
    for row, keep in enumerate(~visual):
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
