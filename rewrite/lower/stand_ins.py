"""Operands that sites have of the token operations in front of them: sites are lowered first, with something in their place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import fx

from rewrite.lower.lowering import traced
from rewrite.recognise.sites import Found


@dataclass
class StandIns:
    """One such operand, [B, N]. make: of a stream [B, N, C] that no token left. nodes, values: what stands in, and for what, by site."""

    graph: fx.Graph
    make: Callable[..., object]
    nodes: dict[str, fx.Node] = field(default_factory=dict)
    values: dict[str, fx.Node] = field(default_factory=dict)

    def stand_in(self, entry: Found) -> fx.Node:
        """What `make` gives, right behind the stream that enters the site's layer."""
        assert entry.stream is not None
        with self.graph.inserting_after(entry.stream):
            node = traced(self.graph.call_function(self.make, (entry.stream,)))
        self.nodes[entry.site.name] = node
        return node

    def put(self) -> None:
        """The values in the place of what stood in for them; where no token left, that is the value itself."""
        for name, node in self.nodes.items():
            if name in self.values:
                node.replace_all_uses_with(self.values[name])
                self.graph.erase_node(node)
