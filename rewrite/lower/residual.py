"""The residual stream of a layer: behind its attention, and behind the whole of it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from rewrite.recognise.operators import canonical, hinted_shape
from rewrite.recognise.sites import Found
from rewrite.recognise.streams import ancestors


def behind_attention(entry: Found, stream: fx.Node) -> fx.Node | None:
    """The sum of the stream in front of a layer and what its attention made of it."""
    return _added_to(stream, entry.region.output)


def behind_layer(entry: Found) -> fx.Node | None:
    """The sum of the stream behind a layer's attention and what the rest of the layer made of it; None where it is not found."""
    between = None if entry.stream is None else behind_attention(entry, entry.stream)
    return None if between is None else _added_to(between, between)


def _added_to(stream: fx.Node, source: fx.Node) -> fx.Node | None:
    """The first sum of `stream` and something that was made of `source`."""
    made, shape = {source}, hinted_shape(stream)
    node = source.next
    while node.op != "output":
        if made.intersection(node.all_input_nodes):
            made.add(node)
            if canonical(node) == "add" and stream in node.all_input_nodes and hinted_shape(node) == shape:
                return node
        node = node.next
    return None


def beside_layers(graph: fx.Graph, entries: Sequence[Found]) -> set[fx.Node]:
    """All nodes that no layer of a stack is made of; none where the end of a layer is not found."""
    ends = [behind_layer(entry) for entry in entries]
    made = [node for entry, end in zip(entries, ends, strict=True) for node in (entry.region.output, end) if node is not None]
    return set() if None in ends else set(graph.nodes) - ancestors(made)
