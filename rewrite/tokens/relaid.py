"""Patches laid out anew between their vision tower and a text: which tensors of a graph hold them, moved and never mixed.

Behind a tower, crops of a picture may be put together to one raster, cut to what is no padding, and given tokens that end lines. All that
moves elements; which patch a token is can be told as long as nothing is computed over tokens:

    moved       views, permutations, slices, indices, concatenations, padding
    by token    linear layers and norms of the last axis, pointwise operators on one layout of the patches
    ended       all else: a token is no patch any more

A concatenation may put other tokens beside, which are no patches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

from rewrite.tokens import rules
from rewrite.tokens.flow import axis_flow
from rewrite.tokens.placement import first_tensor, shape_of

How = Literal["source", "moved", "joined", "padded", "same", "by token"]

_TURNED = frozenset({"T", "mT"})
# Pointwise operators that put something else in the place of a token.
_REPLACES = frozenset({"where", "masked_fill", "lerp"})
# What reads no element of a tensor given behind the first, or of any: only its size, type or device.
_LIKE_ANOTHER = rules.FOLLOWS_FIRST | {"expand_as", "view_as", "reshape_as"}
_LIKE = rules.FRESH | {"empty_like", "full_like", "ones_like", "rand_like", "randn_like", "zeros_like"}


@dataclass(frozen=True)
class Laid:
    """A tensor that holds patches.

    how: it came of the tensors before. order: the node that laid them out as they are. channel: the axis of their channels, from zero; None
    where it is not known.
    """

    how: How
    order: fx.Node
    channel: int | None


class Trail:
    """What becomes of patches in a graph, from the tensors on that hold them.

    sources: those tensors, with the axis of their channels where it is known. lost: tensors that were made of patches before, and why they
    hold none. laid: every tensor (or tuple of tensors) that holds patches
    and nothing computed over them. ended: every other that was made of them, with the first reason.
    """

    def __init__(self, graph: fx.Graph, sources: Mapping[fx.Node, int | None], lost: Mapping[fx.Node, str]) -> None:
        self.laid = {node: Laid("source", node, channel) for node, channel in sources.items()}
        self.ended = dict(lost)
        for node in graph.nodes:
            if node in self.laid or node in self.ended or node.op == "output" or first_tensor(node) is None:
                continue
            ended = next((self.ended[one] for one in node.all_input_nodes if one in self.ended), None)
            touched = [one for one in node.all_input_nodes if one in self.laid]
            found = ended or (self._laid(node, touched) if touched else None)
            if isinstance(found, Laid):
                self.laid[node] = found
            elif found is not None:
                self.ended[node] = found

    def way_to(self, node: fx.Node) -> list[fx.Node]:
        """The tensors from the sources to one that holds patches, in the graph's order."""
        found, stack = {node}, [node]
        while stack:
            current = stack.pop()
            if self.laid[current].how != "source":
                before = [one for one in current.all_input_nodes if one in self.laid and one not in found]
                found.update(before)
                stack += before
        return sorted(found)

    def _laid(self, node: fx.Node, touched: list[fx.Node]) -> Laid | str | None:
        """What a node is that is given tensors with patches; None where it is made of none of their elements."""
        name, given = rules.name_of(node), node.args[0] if node.args else None
        if name in _LIKE or (name in _LIKE_ANOTHER and given not in touched):
            return None
        first, alone = self.laid[touched[0]], len(touched) == 1 and given is touched[0]
        if rules.in_place(node):
            return f"{node.name} writes into them"
        if alone and name in rules.FOLLOWS_FIRST:
            return Laid("same", first.order, first.channel)
        if alone and name in rules.LAST_AXES:
            last = len(shape_of(node)) - 1
            return Laid("by token", first.order, last) if first.channel in (None, last) else f"{node.name} computes over several of them"
        if name in rules.POINTWISE - _REPLACES:
            orders = {self.laid[one].order for one in touched}
            alike = len(orders) == 1 and all(shape_of(one) == shape_of(node) for one in touched)
            return Laid("same", first.order, first.channel) if alike else f"{node.name} mixes them with one another"
        moved = alone and name in rules.MOVES and not _reads_anew(node, name)
        if moved or name in rules.JOINS:
            return self._moved(node, touched, "moved" if moved else "joined")
        if alone and name == "pad" and rules.argument(node, 2, "mode", default="constant") == "constant":
            return self._moved(node, touched, "padded")
        return f"{node.name} computes over them"

    def _moved(self, node: fx.Node, touched: list[fx.Node], how: How) -> Laid | str:
        """A new layout, in which the channels of every token are those of one token before, as far as it is known where they lie."""
        known = {one: channel for one in touched if (channel := self.laid[one].channel) is not None}
        if not known:
            return Laid(how, node, None)
        flow = axis_flow(node)
        if flow is None:
            return f"{node.name} moves them in a way that is not followed"
        channels: set[int] = set()
        for operand in (one for one in flow.operands if one.node in known):
            label = operand.labels[len(operand.labels) - len(shape_of(operand.node)) + known[operand.node]]
            changed = any(label in (*group.ins, *group.outs) for group in flow.groups)
            if changed or label not in flow.output:
                return f"{node.name} gives a token channels of several of them, or not all of one's"
            channels.add(flow.output.index(label))
        return Laid(how, node, channels.pop()) if len(channels) == 1 else f"{node.name} joins tokens with channels"


def _reads_anew(node: fx.Node, name: str) -> bool:
    """Whether a node reads the memory of a tensor as another type, or another attribute of it than the tensor turned."""
    if name == "getattr":
        return node.args[1] not in _TURNED
    return name == "view" and isinstance(rules.argument(node, 1, "dtype"), torch.dtype)
