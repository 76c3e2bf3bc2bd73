"""KV caches of fixed length, which a model writes its new keys and values into: where a graph does so, and from which place on.

    cache.index_copy_(2, places, new)      cache [B, H, M, D], new [B, H, N, D], places [N]; attention then reads all M entries

A cache that joins new keys to the old ones (``cat([past, new])``) is none of these.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from rewrite.recognise.call_sizes import CallSizes
from rewrite.recognise.masks import evaluate
from rewrite.recognise.operators import canonical, shape_of, value_of
from rewrite.recognise.streams import PROJECTIONS

_ENTRY_AXES, _TOKENS = 4, 2


@dataclass(frozen=True)
class CacheWrite:
    """One write of new keys, or values. node: what writes, and is the cache behind it. cache: what is written into."""

    node: fx.Node
    cache: fx.Node
    places: fx.Node
    new: fx.Node


def cache_write(node: fx.Node) -> CacheWrite | None:
    """What a node writes into a cache of fixed length, if it does."""
    if node.op != "call_method" or node.target != "index_copy_" or len(node.args) != 4:
        return None
    cache, axis, places, new = node.args
    if not isinstance(cache, fx.Node) or not isinstance(places, fx.Node) or not isinstance(new, fx.Node):
        return None
    of_tokens = len(shape_of(cache) or ()) == _ENTRY_AXES and axis in (_TOKENS, _TOKENS - _ENTRY_AXES)
    return CacheWrite(node, cache, places, new) if of_tokens else None


def cache_writes(graph: fx.Graph) -> list[CacheWrite]:
    """Every such write of a graph."""
    return [write for node in graph.nodes if (write := cache_write(node)) is not None]


def from_start(writes: list[CacheWrite], inputs: Mapping[fx.Node, Any]) -> bool:
    """Whether all writes of a call put more than one token each, the first one at place 0 and the others behind it: a prompt, into caches
    that hold nothing that counts. A single token is no prompt, and nothing is asked of the device for it."""
    if not writes or any(value_of(write.places).dim() != 1 or _is_one(value_of(write.places).shape[0]) for write in writes):
        return False
    call = CallSizes(inputs)
    for node in {write.places for write in writes}:
        places = evaluate(node, inputs, call)
        if places is None or not torch.equal(places, torch.arange(len(places), dtype=places.dtype, device=places.device)):
            return False
    return True


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def own_writes(node: fx.Node) -> tuple[list[CacheWrite], bool]:
    """The writes of the keys, or values, that an attention reads; and whether it reads the caches, and not the new ones alone that go into
    caches as well."""
    found: dict[fx.Node, CacheWrite] = {}
    reads = False
    stack, seen = [node], {node}
    while stack:
        current = stack.pop()
        own = [write for one in (current, *current.users) if (write := cache_write(one)) is not None and current in (one, write.new)]
        found.update({write.node: write for write in own})
        if cache_write(current) is not None:
            reads = True
        elif canonical(current) not in PROJECTIONS:
            fresh = [one for one in current.all_input_nodes if one not in seen and isinstance(value_of(one), torch.Tensor)]
            seen.update(fresh)
            stack += fresh
    return list(found.values()), reads
