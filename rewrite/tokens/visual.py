"""Where vision features enter the embeddings of a language model, read off the graph.

Known by what they do: features are put at the places of a [B, N, C] stream of embeddings that a bool mask marks (a masked scatter, a
`where`, an indexed assignment), or between two runs of embeddings (a concatenation, an assigned slice).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from rewrite.tokens import rules
from rewrite.tokens.edits import insert_call
from rewrite.tokens.placement import example, is_tensor, shape_of

# Where a placeholder's meta has the merge that an earlier graph of the call made.
CARRIED = "rewrite_merge"


@dataclass(frozen=True)
class VisualMerge:
    """Vision features put into embeddings.

    `node` is the stream with the features in it; where they are assigned in place, that is `embeddings` itself, from `written` on.
    """

    node: fx.Node  # [B, N, C]
    mask: fx.Node | None  # bool [B, N], [B, N, 1] or [B, N, C], or [B * N] for a flat stream; None where `span` says it
    source: fx.Node | None  # the features; None where the operator does not name them
    embeddings: fx.Node
    written: fx.Node  # the operator that does it
    inverted: bool = False  # the mask marks the text instead
    span: tuple[int, int] | None = None  # positions [start, stop) in every row


def visual_merges(graph: fx.Graph) -> list[VisualMerge]:
    """Every merge of vision features into an embedding stream, in graph order."""
    found: list[VisualMerge] = [node.meta[CARRIED] for node in graph.nodes if CARRIED in node.meta]
    for node in graph.nodes:
        rule = _MERGES.get(rules.name_of(node))
        if rule is not None and (merge := rule(node)) is not None:
            found.append(merge)
    return found


def visual_mask_node(graph: fx.Graph, merge: VisualMerge) -> fx.Node:
    """bool [B, N]: which tokens of `merge.node` are visual. Inserted where it is not in the graph already."""
    if merge.mask is None:
        assert merge.span is not None
        with graph.inserting_after(merge.embeddings if merge.embeddings is merge.node else merge.node):
            return insert_call(merge.node, span_mask, (merge.node, *merge.span))
    node = merge.mask
    dims = len(shape_of(node))
    with graph.inserting_after(node):
        if dims == 3:
            node = insert_call(node, "select", (node, -1, 0), traced=example(node).select(-1, 0))
        elif dims == 1:
            ids = rectangular(node)
            assert ids is not None
            node = insert_call(node, "view_as", (node, ids), traced=example(node).view_as(example(ids)))
    if merge.inverted:
        with graph.inserting_after(node):
            node = insert_call(node, torch.logical_not, (node,), traced=example(node))
    return node


def span_mask(stream: Tensor, start: int, stop: int) -> Tensor:
    """bool [B, N] for a stream [B, N, C]: the positions from `start` up to `stop`, in every row."""
    places = torch.arange(stream.shape[1], device=stream.device)
    return ((places >= start) & (places < stop)).expand(stream.shape[0], -1)


def _masked_scatter(node: fx.Node) -> VisualMerge | None:
    embeddings, mask, source = (rules.argument(node, i, name) for i, name in enumerate(("input", "mask", "source")))
    return _masked(node, embeddings, mask, source)


def _where(node: fx.Node) -> VisualMerge | None:
    """where(mask, features, embeddings), or the other way round: the side that comes from an embedding table is the text."""
    mask, first, second = (rules.argument(node, i, name) for i, name in enumerate(("condition", "input", "other")))
    if node.op == "call_method":
        mask, first = first, mask
    if not is_tensor(first) or not is_tensor(second):
        return None
    text = from_embedding(first), from_embedding(second)
    if text[0] == text[1]:
        return None
    embeddings, source = (first, second) if text[0] else (second, first)
    if len(shape_of(source)) < 2:
        return None  # a number in place of the embeddings of padding
    return _masked(node, embeddings, mask, source, inverted=text[0])


def _assignment(node: fx.Node) -> VisualMerge | None:
    """embeddings[mask] = features, or embeddings[:, a:b] = features."""
    embeddings, index, source = node.args[:3]
    entries: Any = tuple(index) if isinstance(index, (tuple, list)) else (index,)
    if len(entries) == 1 and is_tensor(entries[0]):
        return _masked(node, embeddings, entries[0], source)
    span = _span(entries)
    if span is None or not is_tensor(embeddings) or not is_tensor(source) or len(shape_of(embeddings)) != 3:  # type: ignore[arg-type]
        return None
    if not from_embedding(embeddings) or from_embedding(source):  # type: ignore[arg-type]
        return None
    return VisualMerge(embeddings, None, source, embeddings, node, span=span)  # type: ignore[arg-type]


def _span(entries: tuple[Any, ...]) -> tuple[int, int] | None:
    """(a, b) of an index [:, a:b] or [:, a:b, :]."""
    if not 2 <= len(entries) <= 3 or not all(isinstance(entry, slice) for entry in entries):
        return None
    rest = [entry for i, entry in enumerate(entries) if i != 1]
    start, stop = entries[1].start or 0, entries[1].stop
    whole = all(entry == slice(None) for entry in rest) and entries[1].step in (None, 1)
    return (start, stop) if whole and isinstance(start, int) and isinstance(stop, int) and 0 <= start < stop else None


def _cat(node: fx.Node) -> VisualMerge | None:
    """cat((text, features, text), 1): one part that does not come from an embedding table, among parts that do."""
    parts: Any = rules.argument(node, 0, "tensors")
    dim = rules.argument(node, 1, "dim", "axis", default=0)
    if not isinstance(parts, (tuple, list)) or not is_tensor(node) or len(shape_of(node)) != 3 or dim not in (1, -2):
        return None
    text = [is_tensor(part) and len(shape_of(part)) == 3 and from_embedding(part) for part in parts]
    sizes: list[Any] = [example(part).shape[1] if is_tensor(part) and len(shape_of(part)) == 3 else None for part in parts]
    if text.count(False) != 1 or len(parts) < 2 or not all(isinstance(size, int) for size in sizes):
        return None
    at = text.index(False)
    if _is_learned(parts[at]):
        return None
    start = sum(sizes[:at])
    beside = parts[at - 1] if at else parts[1]
    return VisualMerge(node, None, parts[at], beside, node, span=(start, start + sizes[at]))


def _is_learned(part: fx.Node) -> bool:
    """Whether a part of a concatenation is a parameter, perhaps moved and expanded: a learned prompt."""
    while part.op.startswith("call") and len(part.all_input_nodes) == 1:
        part = part.all_input_nodes[0]
    return isinstance(example(part), torch.nn.Parameter)


def _masked(node: fx.Node, embeddings: Any, mask: Any, source: Any, inverted: bool = False) -> VisualMerge | None:
    if not (is_tensor(embeddings) and is_tensor(mask) and example(mask).dtype == torch.bool):
        return None
    stream, marks = shape_of(embeddings), shape_of(mask)
    if not example(embeddings).is_floating_point():
        return None
    by_row = len(stream) == 3 and len(marks) in (2, 3) and marks[:2] == stream[:2]
    flat = len(stream) == 2 and len(marks) == 1 and marks == stream[:1] and rectangular(mask) is not None
    if not by_row and not flat:
        return None
    in_place = rules.name_of(node) == "setitem" or rules.in_place(node)
    return VisualMerge(embeddings if in_place else node, mask, source if is_tensor(source) else None, embeddings, node, inverted)


def from_embedding(node: fx.Node) -> bool:
    """Whether a stream is the output of an embedding table, followed by operators that treat every element on its own."""
    stack, seen = [node], set[fx.Node]()
    while stack:
        current = stack.pop()
        name = rules.name_of(current)
        if name == "embedding":
            return True
        elementwise = name in rules.POINTWISE or name in rules.FOLLOWS_FIRST or name in {"masked_scatter", "getitem"}
        if current in seen or not elementwise:
            continue
        seen.add(current)
        streams = [source for source in current.all_input_nodes if is_tensor(source) and example(source).is_floating_point()]
        streams = [source for source in streams if len(shape_of(source)) >= 2]
        stack += streams if name == "where" else streams[:1]
    return False


def rectangular(mask: fx.Node) -> fx.Node | None:
    """The [B, N] node that a flat mask [B * N] was computed from, element by element."""
    current = mask
    while True:
        name = rules.name_of(current)
        sources = [source for source in current.all_input_nodes if is_tensor(source)]
        if not sources:
            return None
        if name in {"view", "reshape", "flatten"}:
            return sources[0] if len(shape_of(sources[0])) == 2 else None
        if name not in rules.POINTWISE and name not in rules.FOLLOWS_FIRST:
            return None
        current = sources[0]


_MERGES: dict[str, Callable[[fx.Node], VisualMerge | None]] = {
    "masked_scatter": _masked_scatter,
    "where": _where,
    "setitem": _assignment,
    "index_put": _assignment,
    "cat": _cat,
}
