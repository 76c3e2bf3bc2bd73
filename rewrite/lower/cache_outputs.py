"""Which outputs of a graph are the entries of a KV cache that a site's keys or values are read from, or parts of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from rewrite.recognise.operators import canonical, shape_of

_VIEWS = frozenset({"reshape", "expand", "getitem", "transpose", "permute", "contiguous", "unsqueeze", "cast"})


def entries_of(results: Sequence[Any], node: fx.Node) -> tuple[int, ...]:
    """Positions among the graph's outputs of the entry that `node` is a view of, whole."""
    chain = _chain(node)
    return tuple(index for index, result in enumerate(results) if isinstance(result, fx.Node) and _whole_of(result) in chain)


def parts_of(results: Sequence[Any], node: fx.Node) -> tuple[int, ...]:
    """Likewise, of some tokens of it: a cache that keeps the last ones alone."""
    chain, whole = _chain(node), entries_of(results, node)
    return tuple(index for index, result in enumerate(results) if index not in whole and _cut_from(result) in chain)


def _chain(node: fx.Node) -> set[fx.Node]:
    chain = {node}
    while canonical(node) in _VIEWS and isinstance(node.args[0], fx.Node):
        node = node.args[0]
        chain.add(node)
    return chain


def _cut_from(node: Any) -> Any:
    """The entry [B, H, N, D] of which a node is a slice along the tokens, or None."""
    if not isinstance(node, fx.Node) or canonical(node) != "getitem" or not isinstance(node.args[0], fx.Node):
        return None
    source, part = shape_of(node.args[0]), shape_of(node)
    of_tokens = source is not None and part is not None and len(source) == len(part) == 4 and source[:2] + source[3:] == part[:2] + part[3:]
    return _whole_of(node.args[0]) if of_tokens else None


def _whole_of(node: Any) -> Any:
    """What a node is, but for slices that take all of it."""
    while isinstance(node, fx.Node) and canonical(node) == "getitem" and shape_of(node) is not None:
        source = node.args[0]
        if not isinstance(source, fx.Node) or shape_of(source) != shape_of(node):
            break
        node = source
    return node
