"""Tensors of all tokens where some have left: a token that left keeps the value it left with.

The residual stream behind a selection is put back into the stream that the tokens left, and what was made of it token by token is made
again of that. So a dense head reads every place of its grid: the result is the original's, whose dropped tokens are masked out of every
later attention and get nothing added by later layers. What attention gives by itself has no value for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from rewrite.tokens import rules
from rewrite.tokens.edits import insert_call, insert_restore_call
from rewrite.tokens.flow import Flow, Label
from rewrite.tokens.placement import Placement, Selection, example


@dataclass(frozen=True)
class Call:
    """An operator of a graph as it was on all tokens."""

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def nodes(self) -> list[fx.Node]:
        """Every node among the arguments."""
        found: dict[fx.Node, None] = {}
        fx.map_arg((self.args, self.kwargs), found.setdefault)
        return list(found)


class Frozen:
    """Makes them. placements: where tensors are short; streams: nodes that are the residual stream behind a selection."""

    def __init__(self, placements: Mapping[fx.Node, Placement], streams: frozenset[fx.Node]) -> None:
        self.placements, self.streams = placements, streams
        self.calls: dict[fx.Node, Call] = {}
        self.sources: dict[fx.Node, fx.Node] = {}  # by cut: the stream that it was cut of
        self.made: dict[fx.Node, fx.Node] = {}

    def cut(self, node: fx.Node, selections: Mapping[int, Selection]) -> None:
        """Note a stream that was cut."""
        for selection in selections.values():
            if selection.source is not None:
                self.sources[node] = selection.source

    def note(self, node: fx.Node, flow: Flow, selected: Mapping[Label, Selection]) -> None:
        """Note an operator, before it is changed, where it makes each token of the result of that token alone."""
        mixes = (flow.reduced | flow.contracted | flow.normalised) & selected.keys()
        if not mixes and not rules.in_place(node) and rules.name_of(node) != "setitem":
            self.calls[node] = Call(node.target, node.args, dict(node.kwargs))

    def forget(self) -> None:
        """A tensor was written to: what would be made again of earlier ones is another thing now."""
        self.calls.clear()
        self.made.clear()

    def whole(self, node: fx.Node) -> fx.Node | None:
        """`node` with every token, at the insertion point; None where it has no value for those that left."""
        place = self.placements.get(node)
        if place is None or not place.axes:
            return node
        if node not in self.made:
            made = self._make(node, place)
            if made is None:
                return None
            self.made[node] = made
        return self.made[node]

    def _make(self, node: fx.Node, place: Placement) -> fx.Node | None:
        if node in self.sources:
            return self.whole(self.sources[node])
        if node in self.streams:
            ((axis, selection),) = place.axes.items()
            full = None if selection.source is None else self.whole(selection.source)
            return None if full is None else insert_restore_call(node, node, axis, selection, place, into=full)
        call = self.calls.get(node)
        if call is None:
            return None
        whole: dict[fx.Node, fx.Node] = {}
        for source in call.nodes():
            made = self.whole(source)
            if made is None:
                return None
            whole[source] = made
        args = fx.map_arg(call.args, lambda source: whole[source])
        kwargs = fx.map_arg(call.kwargs, lambda source: whole[source])
        return insert_call(node, call.target, args, kwargs, traced=example(node))
