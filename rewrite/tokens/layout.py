"""On which grid of patches the tokens of a tensor lie, and how many tokens stand in front of them.

It starts at convolutions whose kernel is their stride, applied to an image: their output is a grid of patches. From there the axis flow
of every operator says where the grid's axes go: merged in order, they are a token axis; concatenated with other tokens, it has a prefix
or a suffix; sliced, it loses them. What flows through an operator that does not keep the tokens is known no more.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from rewrite.tokens import rules
from rewrite.tokens.flow import Flow, Group, Label, axis_flow
from rewrite.tokens.placement import example, first_tensor, is_tensor, shape_of
from rewrite.tokens.visual import VisualMerge, visual_mask_node, visual_merges

Grid = tuple[int, ...]


@dataclass(frozen=True)
class TokenLayout:
    """A token axis: `prefix` tokens, then the patches of `grid` in row-major order, then `suffix` tokens."""

    grid: Grid
    prefix: int = 0
    suffix: int = 0

    @property
    def patches(self) -> int:
        count = 1
        for size in self.grid:
            count *= size
        return count


@dataclass(frozen=True)
class _GridAxis:
    """Axes `first` up to `last` of a grid, on one axis of a tensor."""

    conv: fx.Node
    first: int
    last: int


@dataclass(frozen=True)
class _Tokens:
    conv: fx.Node
    layout: TokenLayout


_Fact = _GridAxis | _Tokens


@dataclass(frozen=True)
class PatchEmbedding:
    """A patch embedding: the convolution, and the sequence [B, N, C] of tokens that it became.

    `sequence` is the last node at which tokens were put in front of or behind the patches, or the first where the patches are tokens.
    """

    conv: fx.Node
    grid: Grid  # (H, W) or (T, H, W)
    tokens: int  # prefix + patches + suffix
    sequence: fx.Node
    prefix: int
    suffix: int


class TokenLayouts:
    """The token layouts of every node of a graph, as it is now."""

    def __init__(self, graph: fx.Graph) -> None:
        self.facts: dict[fx.Node, Mapping[int, _Fact]] = {}
        self.convolutions: list[fx.Node] = []
        for node in graph.nodes:
            if is_patch_convolution(node):
                self.convolutions.append(node)
                rank = len(shape_of(node))
                self.facts[node] = {axis: _GridAxis(node, axis - 2, axis - 1) for axis in range(2, rank)}
            elif any(source in self.facts for source in node.all_input_nodes):
                flow = axis_flow(node)
                if flow is not None and (facts := _carried(node, flow, self.facts)):
                    self.facts[node] = facts

    def of(self, node: fx.Node) -> TokenLayout | None:
        """The layout of the token axis of a [B, N, C] or [B, H, N, D] tensor; None where it is not known."""
        found = {axis: fact.layout for axis, fact in self.facts.get(node, {}).items() if isinstance(fact, _Tokens)}
        return found.get(len(shape_of(node)) - 2) or next(iter(found.values()), None) if found else None

    def embeddings(self) -> list[PatchEmbedding]:
        """The patch embeddings, with the tokens that were put around the patches."""
        found: list[PatchEmbedding] = []
        for conv in self.convolutions:
            best: tuple[fx.Node, TokenLayout] | None = None
            for node, facts in self.facts.items():
                layouts = [fact.layout for fact in facts.values() if isinstance(fact, _Tokens) and fact.conv is conv]
                if len(layouts) == 1 and len(shape_of(node)) == 3 and (best is None or _extends(layouts[0], best[1])):
                    best = node, layouts[0]
            if best is not None:
                node, layout = best
                tokens = layout.prefix + layout.patches + layout.suffix
                found.append(PatchEmbedding(conv, layout.grid, tokens, node, layout.prefix, layout.suffix))
        return found


def patch_grid(graph: fx.Graph) -> list[PatchEmbedding]:
    """The patch embeddings of a graph, in graph order."""
    return TokenLayouts(graph).embeddings()


def layout_of(node: fx.Node) -> tuple[Grid, int] | None:
    """(grid, prefix) where the N tokens of a [B, N, C] or [B, H, N, D] node are `prefix` tokens and the patches of `grid`, in order.

    Each call reads the whole graph once; for many nodes of one graph, ask one `TokenLayouts`.
    """
    layout = TokenLayouts(node.graph).of(node)
    return None if layout is None or layout.suffix else (layout.grid, layout.prefix)


def is_patch_convolution(node: fx.Node) -> bool:
    """A convolution in two or three dimensions that cuts an image into patches: kernel = stride, no padding, a grid of known size."""
    if rules.name_of(node) not in {"conv2d", "conv3d"} or first_tensor(node) is None:
        return False
    weight, stride = rules.argument(node, 1, "weight"), rules.argument(node, 3, "stride", default=1)
    if not is_tensor(weight):
        return False
    kernel = tuple(example(weight).shape[2:])
    spatial = tuple(example(node).shape[2:])

    def each(value: Any) -> tuple[Any, ...]:
        given: tuple[Any, ...] = tuple(value) if isinstance(value, (tuple, list)) else (value,)
        return given * len(kernel) if len(given) == 1 else given

    padding, dilation = rules.argument(node, 4, "padding", default=0), rules.argument(node, 5, "dilation", default=1)
    plain = set(each(padding)) <= {0, "valid"} and set(each(dilation)) == {1} and each(stride) == kernel
    sized = all(isinstance(size, int) for size in spatial) and any(size > 1 for size in spatial)
    return plain and sized and max(kernel) > 1 and _reads_image(node)


def _reads_image(conv: fx.Node) -> bool:
    """Whether the input is a graph input, but for operators that work element by element or move axes."""
    stack, seen = [conv.all_input_nodes[0]], set[fx.Node]()
    while stack:
        node = stack.pop()
        if node in seen or not is_tensor(node):
            continue
        seen.add(node)
        if node.op in {"placeholder", "get_attr"}:
            continue
        flow = axis_flow(node)
        if flow is None or flow.reduced or rules.name_of(node) in {"matmul", "bmm", "embedding", "einsum"}:
            return False
        stack += node.all_input_nodes
    return True


def _carried(node: fx.Node, flow: Flow, facts: Mapping[fx.Node, Mapping[int, _Fact]]) -> dict[int, _Fact]:
    """What is known of the axes of a result, from what is known of its operands."""
    known: dict[Label, _Fact | None] = {}
    sizes: dict[Label, Any] = {}
    for operand in flow.operands:
        shape = shape_of(operand.node)
        labels = operand.labels[len(operand.labels) - len(shape) :]
        for axis, label in enumerate(labels):
            sizes.setdefault(label, shape[axis])
            if (fact := facts.get(operand.node, {}).get(axis)) is not None:
                known[label] = fact if known.setdefault(label, fact) == fact else None  # they disagree: unknown
    for label in flow.reduced:
        known.pop(label, None)
    for group in flow.groups:
        if flow.joined is None or group.ins != flow.joined[0]:
            known.update(_regrouped(group, known, sizes))
    if flow.joined is not None:
        marks, out = flow.joined
        known[out] = _joined([known.get(mark) for mark in marks], [sizes[mark] for mark in marks])
    carried = {axis: known.get(label) for axis, label in enumerate(flow.output)}
    return {axis: _as_tokens(fact) for axis, fact in carried.items() if fact is not None}


def _regrouped(group: Group, known: Mapping[Label, _Fact | None], sizes: Mapping[Label, Any]) -> dict[Label, _Fact]:
    """Grid axes merged in order are one; a slice of a token axis may take tokens off in front or behind."""
    facts = [known.get(label) for label in group.ins]
    if len(group.outs) != 1 or not facts:
        return {}
    first = facts[0]
    if group.cut and isinstance(first, _Tokens) and group.span is not None:
        start, stop = group.span
        length = first.layout.prefix + first.layout.patches + first.layout.suffix
        end = length if stop is None else (stop if stop >= 0 else length + stop)
        prefix, suffix = first.layout.prefix - start, first.layout.suffix - (length - min(end, length))
        kept = start >= 0 and prefix >= 0 and suffix >= 0
        return {group.outs[0]: replace(first, layout=replace(first.layout, prefix=prefix, suffix=suffix))} if kept else {}
    axes = [fact for fact in facts if isinstance(fact, _GridAxis)]
    in_order = all(a.last == b.first and a.conv is b.conv for a, b in itertools.pairwise(axes))
    if group.cut or len(axes) != len(facts) or not in_order:
        return {}
    return {group.outs[0]: _GridAxis(axes[0].conv, axes[0].first, axes[-1].last)}


def _as_tokens(fact: _Fact) -> _Fact:
    """A grid axis that holds the whole grid is a token axis."""
    if isinstance(fact, _GridAxis):
        grid = tuple(example(fact.conv).shape[2:])
        if fact.first == 0 and fact.last == len(grid):
            return _Tokens(fact.conv, TokenLayout(grid))
    return fact


def _joined(facts: list[_Fact | None], sizes: list[Any]) -> _Fact | None:
    """Tokens in front of and behind the one part whose layout is known."""
    places = [i for i, fact in enumerate(facts) if isinstance(fact, _Tokens)]
    if len(places) != 1 or not all(size.is_number for size in sizes):
        return None
    tokens = facts[places[0]]
    assert isinstance(tokens, _Tokens)
    before, after = int(sum(sizes[: places[0]])), int(sum(sizes[places[0] + 1 :]))
    layout = replace(tokens.layout, prefix=tokens.layout.prefix + before, suffix=tokens.layout.suffix + after)
    return replace(tokens, layout=layout)


def _extends(layout: TokenLayout, other: TokenLayout) -> bool:
    return layout.prefix + layout.suffix > other.prefix + other.suffix


__all__ = [
    "PatchEmbedding",
    "TokenLayout",
    "TokenLayouts",
    "VisualMerge",
    "is_patch_convolution",
    "layout_of",
    "patch_grid",
    "visual_mask_node",
    "visual_merges",
]
