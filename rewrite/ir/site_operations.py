"""What the operations around an attention mean: pooling, groups of keys, choices of keys and of tokens, each in plain torch.

The definition for tests and proofs, and what a rewritten graph runs: none of these is worth a kernel of its own.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn import functional

from rewrite.ir.errors import NotApplicableError, RewriteError
from rewrite.ir.operations import (
    DepthwiseConv,
    GridBias,
    Pool,
    ReceivedSinks,
    RegionRoutes,
    ReinforceHeads,
    SinkGroups,
    SparseMap,
    VisualGroups,
)


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


def spread_out(features: torch.Tensor, kept: int, among: torch.Tensor | None = None) -> torch.Tensor:
    """Indices [B, kept] of features [B, V, C] that are far from each other, by one minus the cosine (DivPrune, Alvar et al. 2025).

    First the one whose nearest neighbour is farthest away, then again and again the one that is farthest from all chosen so far.
    among: bool [B, V], which features there are, None for all; a row of fewer than `kept` ends with indices of no meaning.
    """
    unit = functional.normalize(features if features.dtype == torch.float64 else features.float(), dim=-1)
    distance = 1 - unit @ unit.transpose(1, 2)
    rows = torch.arange(len(features), device=features.device)
    apart = distance.diagonal_scatter(distance.new_full(distance.shape[:2], torch.inf), dim1=1, dim2=2)
    if among is not None:
        # One that is not there is nobody's neighbour, and is never the farthest.
        apart = apart.masked_fill(~among[:, :, None], torch.inf).masked_fill(~among[:, None, :], -torch.inf)
    chosen = [apart.amin(1).argmax(1)]
    nearest = apart[rows, chosen[0]].index_put((rows, chosen[0]), distance.new_tensor(-torch.inf))
    for _ in range(kept - 1):
        chosen.append(nearest.argmax(1))
        nearest = torch.minimum(nearest, distance[rows, chosen[-1]]).index_put((rows, chosen[-1]), distance.new_tensor(-torch.inf))
    return torch.stack(chosen, 1)
