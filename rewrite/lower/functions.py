"""What a rewritten graph calls for the operations that are plain torch: one function each, taking tensors and literals only.

They are the IR's own semantics; the attention itself is the registered operator of `codegen`.
"""

from __future__ import annotations

import torch

from rewrite.ir import site_operations
from rewrite.ir.operations import (
    DepthwiseConv,
    GridBias,
    PlainOperation,
    Pool,
    ReceivedSinks,
    RegionRoutes,
    ReinforceHeads,
    SinkGroups,
    SparseMap,
    VisualGroups,
)


def _computed(first: torch.Tensor, kind: str, fields: tuple[str, ...], others: tuple[torch.Tensor, ...], facts: str) -> torch.Tensor:
    """What the operation of class `kind` makes of its tensors, named by `fields`; facts: see `PlainOperation.facts`."""
    (cls,) = (one for one in PlainOperation.__subclasses__() if one.__name__ == kind)
    return cls.of(facts, tuple(fields)).compute(dict(zip(fields, (first, *others), strict=True)))


def plain_operation(first: torch.Tensor, kind: str, fields: tuple[str, ...], others: tuple[torch.Tensor, ...], facts: str) -> torch.Tensor:
    """A `PlainOperation`."""
    return _computed(first, kind, fields, others, facts)


def token_by_token(first: torch.Tensor, kind: str, fields: tuple[str, ...], others: tuple[torch.Tensor, ...], facts: str) -> torch.Tensor:
    """A `PlainOperation` that works token by token: the token axis of its first tensor is that of its result."""
    return _computed(first, kind, fields, others, facts)


def pool(source: torch.Tensor, grid: tuple[int, ...], size: tuple[int, ...], prefix: int) -> torch.Tensor:
    """Adaptive average pooling of tokens on a grid; see `Pool`."""
    return site_operations.pool(Pool("", "source", tuple(grid), tuple(size), prefix), {"source": source})


def depthwise_conv(source: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, grid: tuple[int, int], prefix: int) -> torch.Tensor:
    """Depthwise convolution of tokens as an image; see `DepthwiseConv`."""
    operation = DepthwiseConv("", "source", "weight", "bias", (grid[0], grid[1]), prefix)
    return site_operations.depthwise_conv(operation, {"source": source, "weight": weight, "bias": bias})


def grid_bias(
    table: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    prefix: torch.Tensor | None,
    grid: tuple[int, int],
    transposed: bool,
) -> torch.Tensor:
    """An attention bias interpolated to a grid; see `GridBias`."""
    values = {"table": table, "rows": rows, "columns": columns}
    if prefix is not None:
        values["prefix"] = prefix
    operation = GridBias("", "table", "rows", "columns", None if prefix is None else "prefix", (grid[0], grid[1]), transposed)
    return site_operations.grid_bias(operation, values)


def sink_groups(
    hidden: torch.Tensor,
    visual: torch.Tensor,
    cached: torch.Tensor | None,
    dims: tuple[int, ...],
    threshold: float,
    epsilon: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Groups of keys for visual attention sinks, which queries they act on, and the number of visual tokens; see `SinkGroups`."""
    operation = SinkGroups("", "", "", "hidden", "visual", tuple(dims), threshold, epsilon)
    return site_operations.sink_groups(operation, {"hidden": hidden, "visual": visual}, cached)


def visual_groups(visual: torch.Tensor, cached: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Which keys are visual, and which queries come after them; see `VisualGroups`."""
    return site_operations.visual_groups(VisualGroups("", "", "visual"), {"visual": visual}, cached)


def received_sinks(received: torch.Tensor, query: torch.Tensor, threshold: float, heads: tuple[int, ...] | None) -> torch.Tensor:
    """Which keys of a prompt draw attention, by head; see `ReceivedSinks`."""
    operation = ReceivedSinks("", "received", "query", threshold, None if heads is None else tuple(heads))
    return site_operations.received_sinks(operation, {"received": received, "query": query})


def kept_sinks(cached: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """What the keys of a KV cache were given, and 0 for the new ones: what `ReceivedSinks` is without looking at received attention."""
    return torch.nn.functional.pad(cached, (0, query.shape[2])).expand(query.shape[0], -1, -1)


def reinforce_heads(output: torch.Tensor, without: torch.Tensor, active: torch.Tensor, heads: int, factor: float) -> torch.Tensor:
    """The heads that look at the image most, scaled; see `ReinforceHeads`."""
    operation = ReinforceHeads("", "output", "without", "active", heads, factor)
    return site_operations.reinforce_heads(operation, {"output": output, "without": without, "active": active})


def region_routes(
    query: torch.Tensor, key: torch.Tensor, grid: tuple[int, int], regions: tuple[int, int], topk: int, prefix: int
) -> torch.Tensor:
    """Which regions of a grid attend to which; see `RegionRoutes`."""
    operation = RegionRoutes("", "query", "key", (grid[0], grid[1]), (regions[0], regions[1]), topk, prefix)
    return site_operations.region_routes(operation, {"query": query, "key": key})


def sparse_map(
    query: torch.Tensor,
    key: torch.Tensor,
    parameters: tuple[torch.Tensor, ...],
    keys: int,
    scale: float,
    coefficients: int,
    threshold: float,
    prefix: int,
) -> torch.Tensor:
    """Which keys each query sees by a map of low rank; parameters: weight, bias, down, up; see `SparseMap`."""
    names = ("weight", "bias", "down", "up")
    operation = SparseMap("", "query", "key", *names, keys, scale, coefficients, threshold, prefix)
    return site_operations.sparse_map(operation, {"query": query, "key": key, **dict(zip(names, parameters, strict=True))})


def no_visual(hidden: torch.Tensor) -> torch.Tensor:
    """[B, N] of False: the new tokens of a call without images."""
    return torch.zeros(hidden.shape[:2], dtype=torch.bool, device=hidden.device)


def padded_groups(groups: torch.Tensor, length: int) -> torch.Tensor:
    """The groups of a KV cache whose later entries were generated: group 0. groups [B, n] or [B, H, n] -> `length` in place of n."""
    return torch.nn.functional.pad(groups, (0, length - groups.shape[-1]))
