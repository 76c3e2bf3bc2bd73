"""The flow of operators that take a part of an axis: slices, indices, pieces, padding, rolls and triangles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from rewrite.tokens import rules
from rewrite.tokens.flow import Flow, Group, Label, Operand, dimensions, one_source, tensor_arguments
from rewrite.tokens.placement import example, expression, is_tensor, shape_of


def _cut(node: fx.Node, dims: tuple[int, ...], gone: bool = False) -> Flow:
    """The axes `dims` are cut, moved or repeated along themselves; `gone`: they are no axes of the result."""
    source, before, _ = one_source(node)
    outs: list[Label] = [("new", i) if i in dims else i for i in range(len(before))]
    groups = tuple(Group((d,), () if gone else (outs[d],), cut=True) for d in dims)
    return Flow((source,), tuple(label for i, label in enumerate(outs) if not (gone and i in dims)), groups=groups)


def _pieces(node: fx.Node) -> Flow:
    return _cut(node, dimensions(node, *rules.PIECES[rules.name_of(node)], len(shape_of(one_source(node)[0].node))))


def _one_dimension(node: fx.Node) -> Flow:
    """select and unbind: an entry of one dimension, which is gone."""
    flow = _cut(node, dimensions(node, 1, 0, len(shape_of(one_source(node)[0].node))), gone=True)
    span = _span_of_one(rules.argument(node, 2, "index")) if rules.name_of(node) == "select" else None
    return replace(flow, groups=tuple(replace(group, span=span) for group in flow.groups))


def _pad(node: fx.Node) -> Flow | None:
    amounts = rules.argument(node, 1, "pad")
    if not isinstance(amounts, (tuple, list)):
        return None
    rank = len(shape_of(node))
    return _cut(node, tuple(rank - 1 - i // 2 for i in range(0, len(amounts), 2) if tuple(amounts[i : i + 2]) != (0, 0)))


def _last_two(node: fx.Node) -> Flow:
    rank = len(shape_of(node))
    return _cut(node, (rank - 2, rank - 1))


def _gather(node: fx.Node) -> Flow | None:
    """out[..., j, ...] = x[..., index[..., j, ...], ...]: as for pointwise operators but along `dim`."""
    (path_x, x), (path_index, index), *_ = tensor_arguments(node)
    rank = len(shape_of(x))
    dim = rules.argument(node, 1 if rules.name_of(node) == "gather" else 2, "dim")
    if dim is None:
        return None
    dim = dim % rank
    axes: tuple[Label, ...] = tuple(range(rank))
    source: tuple[Label, ...] = tuple("cut" if i == dim else i for i in range(rank))
    return Flow((Operand(path_x, x, source), Operand(path_index, index, axes)), axes, groups=(Group(("cut",), (), cut=True),))


def _index_select(node: fx.Node) -> Flow:
    (path, x), (path_index, index), *_ = tensor_arguments(node)
    cut = _cut(node, (rules.argument(node, 1, "dim") % len(shape_of(x)),))
    return Flow(
        (Operand(path, x, cut.operands[0].labels), Operand(path_index, index, (*cut.groups[0].outs,))), cut.output, groups=cut.groups
    )


def _getitem(node: fx.Node) -> Flow | None:
    """Indexing with slices, numbers, None, Ellipsis and tensors; an item of a tuple has the first axes of its first one."""
    source, index = node.args
    if not isinstance(source, fx.Node):
        return None
    if not is_tensor(source):
        axes = tuple(range(len(shape_of(source))))
        rank = len(shape_of(node))
        return Flow((Operand(("args", 0), source, axes),), axes[:rank]) if rank <= len(axes) else None
    shape = shape_of(source)
    entries: list[Any] = list(index) if isinstance(index, tuple) else [index]
    tensors = [e for e in entries if is_tensor(e) or isinstance(e, list)]
    unread = [e for e in entries if isinstance(e, fx.Node) and not is_tensor(e) and expression(e) is None]
    if unread or any(isinstance(e, bool) or (isinstance(e, list) and not all(type(i) is int for i in e)) for e in entries):
        return None
    consumed = sum(_consumes(e) for e in entries)
    fill: list[Any] = [slice(None)] * (len(shape) - consumed)
    at = next((i for i, e in enumerate(entries) if e is Ellipsis), None)
    entries = [*entries, *fill] if at is None else [*entries[:at], *fill, *entries[at + 1 :]]

    output: list[Label] = []
    groups: list[Group] = []
    axis = 0
    advanced: list[int] = []  # axes that tensors index
    place: int | None = None  # where their result goes: with the first, or in front where others lie between
    last: int | None = None
    for i, entry in enumerate(entries):
        if entry is None:
            output.append(("new", i))
        elif isinstance(entry, slice):
            unchanged = not tensors and entry.step in (None, 1) and shape_of(node)[len(output)] == shape[axis]
            if unchanged or _is_full(entry, shape[axis]):
                output.append(axis)
            else:
                output.append(("cut", axis))
                groups.append(Group((axis,), (("cut", axis),), cut=True, span=_span(entry)))
        elif is_tensor(entry) or isinstance(entry, list):
            place = len(output) if place is None else (place if last == i - 1 else 0)
            last = i
            advanced += range(axis, axis + _consumes(entry))
        else:  # a number
            if tensors:
                return None
            groups.append(Group((axis,), (), cut=True, span=_span_of_one(entry)))
        axis += _consumes(entry)
    operands = [Operand(("args", 0), source, tuple(range(len(shape))))]
    if place is not None:
        rank = max(1 if isinstance(e, list) or example(e).dtype == torch.bool else len(shape_of(e)) for e in tensors)
        indexed: tuple[Label, ...] = tuple(("indexed", i) for i in range(rank))
        output[place:place] = indexed
        groups.append(Group(tuple(advanced), indexed, cut=True))
        for path, operand in tensor_arguments(node)[1:]:
            mask = example(operand).dtype == torch.bool
            own: tuple[Label, ...] = tuple((path, i) for i in range(len(shape_of(operand)))) if mask else indexed
            operands.append(Operand(path, operand, own))
            groups += [Group((label,), (), cut=True) for label in own if mask]
    return Flow(tuple(operands), tuple(output), groups=tuple(groups))


def _consumes(entry: Any) -> int:
    """How many axes one entry of an index takes."""
    if is_tensor(entry) and example(entry).dtype == torch.bool:
        return len(shape_of(entry))
    return 0 if entry is None or entry is Ellipsis else 1


def _is_full(entry: slice, size: Any) -> bool:
    """Whether a slice takes the whole of an axis, surely."""
    start, stop, step = (None if x is None else expression(x) for x in (entry.start, entry.stop, entry.step))
    whole = stop is None or stop == size or (stop.is_number and size.is_number and bool(stop >= size))
    return start in (None, 0) and step in (None, 1) and whole


def _span(entry: slice) -> tuple[int, int | None] | None:
    start, stop = entry.start or 0, entry.stop
    return (start, stop) if isinstance(start, int) and isinstance(stop, int | None) and entry.step in (None, 1) else None


def _span_of_one(index: Any) -> tuple[int, int | None] | None:
    return (index, None if index == -1 else index + 1) if isinstance(index, int) else None


INDEXING: dict[str, Callable[[fx.Node], Flow | None]] = {
    **dict.fromkeys(("select", "unbind"), _one_dimension),
    **dict.fromkeys(rules.PIECES, _pieces),
    **dict.fromkeys(rules.TRIANGLES, _last_two),
    **dict.fromkeys(("gather", "take_along_dim"), _gather),
    "pad": _pad,
    "index_select": _index_select,
    "getitem": _getitem,
}
