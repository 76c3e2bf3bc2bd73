"""Which patches visual tokens were, and results of a graph are, where they were laid out anew behind their vision tower."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from rewrite.recognise.pictured import patches_behind, tower_behind
from rewrite.recognise.region import Region
from rewrite.recognise.streams import is_parameter
from rewrite.tokens import rules
from rewrite.tokens.chosen import GIVEN, LOST, Choice, Lost
from rewrite.tokens.layout import TokenLayouts
from rewrite.tokens.placement import example, first_tensor, is_tensor
from rewrite.tokens.relaid import Trail

# Patches [pictures, P, C].
_CHANNELS = 2


@dataclass(frozen=True)
class LaidAnew:
    """A tensor that patches were laid out to.

    sources: the tensors that held them: inputs of the graph, chosen among in an earlier one, or what leaves a tower, [pictures, P, C].
    tower: name of the last attention that they went through. choice: what was chosen; None where they leave their tower in this graph.
    """

    node: fx.Node
    trail: Trail
    sources: tuple[fx.Node, ...]
    tower: str
    choice: Choice | None


class Relaying:
    """Finds how tensors of one graph were laid out of patches."""

    def __init__(self, graph: fx.Graph, regions: Sequence[tuple[str, Region]], layouts: TokenLayouts) -> None:
        self.graph, self.regions, self.layouts = graph, regions, layouts
        self._trails: dict[frozenset[fx.Node], Trail] = {}
        self._towers: dict[fx.Node, str | None] = {}
        # Most graphs, as those of later tokens, hold no patches at all.
        self._any = any(_known(node) or self._patches(node) for node in graph.nodes)

    def of(self, node: fx.Node) -> LaidAnew | Lost | None:
        """How a tensor was laid out of patches, or why they are none any more; None where it is made of none."""
        behind = self._behind(node) if self._any else frozenset()
        if not behind:
            return None
        if behind not in self._trails:
            lost = {one: one.meta[LOST].reason for one in behind if LOST in one.meta}
            held = {one: None if GIVEN in one.meta else _CHANNELS for one in behind if one not in lost}
            self._trails[behind] = Trail(self.graph, held, lost)
        trail = self._trails[behind]
        if node not in trail.laid:
            before = next((one.meta.get(GIVEN, one.meta.get(LOST)) for one in behind if _known(one)), None)
            return Lost(None if before is None else before.choice, trail.ended[node]) if node in trail.ended else None
        sources = tuple(one for one in trail.way_to(node) if one in behind)
        choices = {one.meta[GIVEN].choice if GIVEN in one.meta else None for one in sources}
        towers = {self._tower(one) if choice is None else choice.site for one in sources for choice in choices}
        if len(choices) > 1 or len(towers) > 1 or (None in choices and len(sources) > 1):
            return Lost(None, "they are the patches of several towers, or of pictures that were chosen from by several passes")
        return LaidAnew(node, trail, sources, str(towers.pop()), choices.pop())

    def _behind(self, node: fx.Node) -> frozenset[fx.Node]:
        """The nearest tensors behind a node whose patches are known."""
        found, stack, seen = set[fx.Node](), [node], {node}
        while stack:
            current = stack.pop()
            if _known(current) or self._leaves(current):
                found.add(current)
                continue
            before = [one for one in _tensors(current) if one not in seen and not is_parameter(one)]
            seen.update(before)
            stack += before
        return frozenset(found)

    def _leaves(self, node: fx.Node) -> bool:
        """Whether a tensor holds the pictures of a tower in the order in which they went through it: it is not made of others that do."""
        moved = rules.name_of(node) in rules.MOVES | rules.JOINS and any(self._tower(one) is not None for one in _tensors(node))
        return self._tower(node) is not None and not moved

    def _tower(self, node: fx.Node) -> str | None:
        if node not in self._towers:
            self._towers[node] = tower_behind(node, self.regions, self.layouts) if self._patches(node) else None
        return self._towers[node]

    def _patches(self, node: fx.Node) -> bool:
        return is_tensor(node) and example(node).is_floating_point() and patches_behind(node, self.layouts)


def _known(node: fx.Node) -> bool:
    """Whether something is known of the patches of an input from an earlier graph."""
    return GIVEN in node.meta or LOST in node.meta


def _tensors(node: fx.Node) -> list[fx.Node]:
    """The tensors that a node is made of; of a piece, what it was cut of."""
    found: list[fx.Node] = []
    for one in node.all_input_nodes:
        found += [one] if is_tensor(one) else _tensors(one) if first_tensor(one) is not None else []
    return found
