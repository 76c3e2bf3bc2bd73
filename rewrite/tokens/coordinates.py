"""Which grid coordinates every axis of every tensor of a graph runs over: one walk, each operator once.

The axis flow of an operator says which axes stay what they are; views deal atoms out anew (`atoms.py`), operators over pictures make grids
(`spatial.py`), and what is added to each other runs over the same tokens. Frames are known last: pictures on a batch axis are the frames
of a video where an attention runs over them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from rewrite.tokens import rules
from rewrite.tokens.atoms import Atom, Axes, Axis, Place, cut, fresh, join, leaves, line_of, merged, put, regroup, size_of, unify
from rewrite.tokens.flow import Flow, Label, Operand, axis_flow
from rewrite.tokens.placement import example, extents, is_tensor, sizes_of
from rewrite.tokens.spatial import SPATIAL, coarsened
from rewrite.tokens.visual import from_embedding

_VIEWS = frozenset({"view", "reshape", "flatten", "unflatten", "ravel", "view_as", "reshape_as", "squeeze", "unsqueeze"})


class Coordinates:
    """The axes of every tensor of a graph; for an operator that gives several, of each."""

    def __init__(self, graph: fx.Graph) -> None:
        self.axes: dict[fx.Node, tuple[Axes, ...]] = {}
        for node in graph.nodes:
            value = example(node)
            if isinstance(value, Tensor):
                self.axes[node] = (self._of_tensor(node),)
            elif isinstance(value, (tuple, list)) and value and all(isinstance(entry, Tensor) for entry in value):
                self.axes[node] = self._of_several(node, [sizes_of(entry) for entry in value])

    def of(self, node: fx.Node) -> Axes | None:
        """The axes of a node that is one tensor."""
        found = self.axes.get(node)
        return found[0] if found is not None and is_tensor(node) else None

    def _of_tensor(self, node: fx.Node) -> Axes:
        shape = extents(node)
        axes = self._carried(node) if node.op.startswith("call") else None
        if axes is None or len(axes) != len(shape):
            learned = isinstance(example(node), torch.nn.Parameter)
            return tuple((Atom(size, learned=learned),) if size != 1 else () for size in shape)
        return axes

    def _carried(self, node: fx.Node) -> Axes | None:
        name = rules.name_of(node)
        source = node.args[0] if node.args else node.kwargs.get("input")
        before = self.of(source) if isinstance(source, fx.Node) else None
        if name == "getitem" and isinstance(source, fx.Node) and before is None:
            index = node.args[1]
            several = self.axes.get(source, ())
            return several[index] if isinstance(index, int) and -len(several) <= index < len(several) else None
        if before is not None and isinstance(source, fx.Node):
            if name in _VIEWS and not isinstance(rules.argument(node, 1, "dtype"), torch.dtype):
                _put_where_cut(node, source, before)
                return regroup(before, extents(source), extents(node))
            if name in SPATIAL:
                return SPATIAL[name](node, before)
            if name in _OWN and (axes := _OWN[name](node, source, before)) is not None:
                return axes
        flow = axis_flow(node)
        return None if flow is None else self._along(node, flow)

    def _along(self, node: fx.Node, flow: Flow) -> Axes | None:
        """The axes of a result by its labels."""
        known: dict[Label, Axis] = {}
        for operand in flow.operands:
            for label, axis in self._labelled(operand):
                if not axis or label in flow.reduced:
                    continue
                if label in known:
                    unify(known[label], axis)
                else:
                    known[label] = axis
        if flow.normalised:
            self._find_frames(flow)
        shape = extents(node)
        if len(flow.output) != len(shape):
            return None
        if flow.joined is not None and not any(_is_text(operand.node) for operand in flow.operands):
            known[flow.joined[1]] = join([part for operand in flow.operands for part in self._part(operand, flow)])
        axes = tuple(
            known[label] if label in known and size_of(known[label]) == size else fresh(size)
            for label, size in zip(flow.output, shape, strict=True)
        )
        return coarsened(axes, self._lost(flow, axes)) if flow.reduced else axes

    def _labelled(self, operand: Operand) -> list[tuple[Label, Axis]]:
        axes = self.axes.get(operand.node, ((),))[0]
        return list(zip(operand.labels[len(operand.labels) - len(axes) :], axes, strict=True))

    def _part(self, operand: Operand, flow: Flow) -> list[tuple[int, Axis]]:
        """The piece that an operand of a concatenation adds."""
        assert flow.joined is not None
        sizes = extents(operand.node)
        return [(sizes[i], axis) for i, (label, axis) in enumerate(self._labelled(operand)) if label in flow.joined[0]]

    def _lost(self, flow: Flow, axes: Axes) -> list[Atom]:
        """The parts of a grid's axes that are computed over."""
        left = {atom.place for axis in axes for atom in leaves(axis)}
        gone = [axis for operand in flow.operands for label, axis in self._labelled(operand) if label in flow.reduced]
        return [atom for axis in gone for atom in leaves(axis) if atom.place is not None and atom.place not in left]

    def _find_frames(self, flow: Flow) -> None:
        """Pictures of the batch that an attention runs over are frames: its queries and keys are the same tokens, of a grid."""
        axes = [self._labelled(operand) for operand in flow.operands]
        (key,) = tuple(flow.normalised)[:1]
        keys = next((axis for entry in axes for label, axis in entry if label == key), ())
        first = [axis for label, axis in axes[0] if label not in flow.reduced] if axes else []
        if len(first) < 2:
            return
        queries = first[-1] if len(flow.operands) > 1 else first[-2]
        frames = [atom for atom in leaves(queries) if atom.outer and atom.opaque]
        placed = {atom.place.axis for axis in first for atom in leaves(axis) if atom.place is not None}
        if len(frames) == 1 and {-1, -2} <= placed and merged(queries) == merged(keys):
            frames[0].place = Place(-3, frames[0].size)

    def _of_several(self, node: fx.Node, shapes: list[tuple[int, ...]]) -> tuple[Axes, ...]:
        """The axes of each of several results."""
        name = rules.name_of(node)
        source = node.args[0] if node.args else None
        before = self.of(source) if isinstance(source, fx.Node) else None
        if before is not None and isinstance(source, fx.Node) and shapes:
            dim = rules.argument(node, 2 if name != "unbind" else 1, "dim", "axis", default=0)
            if name in {"chunk", "split", "tensor_split", "split_with_sizes"} and isinstance(dim, int):
                return _pieces(before, extents(source)[dim], dim % len(before), shapes)
            if name == "unbind" and isinstance(dim, int):
                return (_without(before, dim % len(before)),) * len(shapes)
        flow = axis_flow(node) if node.op.startswith("call") else None
        axes = None if flow is None else self._along(node, flow)
        return tuple(axes if axes is not None and len(axes) == len(shape) else tuple(map(fresh, shape)) for shape in shapes)


def _is_text(node: fx.Node) -> bool:
    """Whether a part of a concatenation is embedded text: what stands beside it is a part of a sequence, no grid with a prefix."""
    while rules.name_of(node) in {"layer_norm", "linear"} and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return from_embedding(node)


def _put_where_cut(node: fx.Node, source: fx.Node, axes: Axes) -> None:
    """Two neighbouring axes [.., H, W, ..] that a view cuts to [.., h, p, w, q, ..] are those of a grid: cut to windows or patches."""
    before, after = example(source).shape, example(node).shape
    if len(before) < 4 or len(after) != len(before) + 2 or not all(isinstance(size, int) for size in (*before, *after)):
        return
    at = next((i for i in range(len(before)) if before[i] != after[i]), len(before))
    if at + 1 >= len(before) or tuple(after[at + 4 :]) != tuple(before[at + 2 :]) or 1 in after[at : at + 4]:
        return
    if (before[at], before[at + 1]) == (after[at] * after[at + 1], after[at + 2] * after[at + 3]):
        put(axes[at], Place(-2, before[at], source=source))
        put(axes[at + 1], Place(-1, before[at + 1], source=source))


def _pieces(axes: Axes, size: int, dim: int, shapes: list[tuple[int, ...]]) -> tuple[Axes, ...]:
    found: list[Axes] = []
    start = 0
    for shape in shapes:
        piece = cut(axes[dim], size, start, start + shape[dim])
        start += shape[dim]
        found.append((*axes[:dim], piece, *axes[dim + 1 :]))
    return tuple(found)


def _without(axes: Axes, dim: int) -> Axes:
    """One entry of an axis."""
    gone = [atom for atom in leaves(axes[dim]) if atom.place is not None]
    left = (*axes[:dim], *axes[dim + 1 :])
    return coarsened(left, gone) if gone and line_of(axes[dim]) is None else left


def _getitem(node: fx.Node, source: fx.Node, axes: Axes) -> Axes | None:
    """Slices, numbers and None; indexing with tensors is left to the axis flow."""
    index = node.args[1]
    entries: list[Any] = list(index) if isinstance(index, tuple) else [index]
    if any(isinstance(entry, bool) or not (entry is None or entry is Ellipsis or isinstance(entry, (int, slice))) for entry in entries):
        return None
    consumed = sum(entry is not None and entry is not Ellipsis for entry in entries)
    fill: list[Any] = [slice(None)] * (len(axes) - consumed)
    at = next((i for i, entry in enumerate(entries) if entry is Ellipsis), len(entries))
    entries = [*entries[:at], *fill, *entries[at + 1 :]]
    sizes = extents(source)
    result = list(axes)
    numbers: list[int] = []
    place = 0
    for entry in entries:
        if entry is None:
            continue
        if isinstance(entry, int):
            numbers.append(place)
        elif entry != slice(None):
            result[place] = _sliced(axes[place], sizes[place], entry)
        place += 1
    found: Axes = tuple(result)
    for dim in reversed(numbers):
        found = _without(found, dim)
    news = [i for i, entry in enumerate(e for e in entries if not isinstance(e, int)) if entry is None]
    for i in news:
        found = (*found[:i], (), *found[i:])
    return found


def _sliced(axis: Axis, size: int, entry: slice) -> Axis:
    if not all(part is None or isinstance(part, int) for part in (entry.start, entry.stop, entry.step)):
        return fresh(1)
    start, stop, step = entry.indices(size)
    if step == 1:
        return cut(axis, size, start, max(start, stop))
    line, count = line_of(axis), len(range(start, stop, step))
    return fresh(count) if line is None else fresh(count, Place(line.axis, count, source=line.source))


def _select(node: fx.Node, source: fx.Node, axes: Axes) -> Axes | None:
    dim = rules.argument(node, 1, "dim")
    return _without(axes, dim % len(axes)) if isinstance(dim, int) else None


def _narrow(node: fx.Node, source: fx.Node, axes: Axes) -> Axes | None:
    dim, start, length = (rules.argument(node, i + 1, name) for i, name in enumerate(("dim", "start", "length")))
    if not all(isinstance(value, int) for value in (dim, start, length)):
        return None
    dim = dim % len(axes)
    size = extents(source)[dim]
    return (*axes[:dim], cut(axes[dim], size, start % size, start % size + length), *axes[dim + 1 :])


def _repeat(node: fx.Node, source: fx.Node, axes: Axes) -> Axes:
    """repeat(r) on an axis: the repetition outside, the axis inside; interleaved, the other way round."""
    before, after = extents(source), extents(node)
    axes, before = ((),) * (len(after) - len(before)) + axes, (1,) * (len(after) - len(before)) + before
    inside = rules.name_of(node) == "repeat_interleave"
    result: list[Axis] = []
    for axis, old, new in zip(axes, before, after, strict=True):
        again = fresh(new // old) if old and new % old == 0 else None
        if again is None:
            result.append(fresh(new))
        else:
            result.append((*axis, *again) if inside else (*again, *axis))
    return tuple(result)


def _repeat_interleave(node: fx.Node, source: fx.Node, axes: Axes) -> Axes | None:
    whole = isinstance(rules.argument(node, 1, "repeats"), int) and len(extents(node)) == len(axes)
    return _repeat(node, source, axes) if whole else None


_OWN: dict[str, Callable[[fx.Node, fx.Node, Axes], Axes | None]] = {
    "getitem": _getitem,
    "select": _select,
    "narrow": _narrow,
    "repeat": _repeat,
    "repeat_interleave": _repeat_interleave,
}
