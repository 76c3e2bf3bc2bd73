"""Nodes inserted into a graph one behind the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

Number = int | fx.Node


class Cursor:
    """Inserts nodes one behind the other, from `after` on."""

    def __init__(self, graph: fx.Graph, after: fx.Node) -> None:
        self.graph, self.last = graph, after

    def call(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> fx.Node:
        with self.graph.inserting_after(self.last):
            self.last = self.graph.call_function(function, arguments)
        return self.last

    def call_method(self, name: str, arguments: tuple[Any, ...]) -> fx.Node:
        with self.graph.inserting_after(self.last):
            self.last = self.graph.call_method(name, arguments)
        return self.last

    def copy(self, node: fx.Node, copies: dict[fx.Node, fx.Node]) -> fx.Node:
        with self.graph.inserting_after(self.last):
            self.last = self.graph.node_copy(node, lambda given: copies.get(given, given))
        return self.last

    def combine(self, function: Callable[[Any, Any], Any], first: Number, second: Number) -> Number:
        both = isinstance(first, int) and isinstance(second, int)
        return function(first, second) if both else self.call(function, (first, second))


def behind_inputs(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """The node, or the last input where it is an input: from there on all inputs are there."""
    return [other for other in graph.nodes if other.op == "placeholder"][-1] if node.op == "placeholder" else node
