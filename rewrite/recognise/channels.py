"""Whether an attention's queries are tokens or channels: cross-covariance attends from channels to channels, over all tokens."""

from __future__ import annotations

from torch import fx

from rewrite.recognise.index_algebra import Atom, Axes, Axis, MismatchError, back_through, fresh, resolve, size
from rewrite.recognise.operators import argument, canonical, hinted_shape, shape_of

# What computes over axes; everything else that keeps a tensor's shape leaves each axis where it is.
_COMPUTES = frozenset({"matmul", "baddbmm", "einsum", "attention", "assigned"})


def runs_over_channels(node: fx.Node, axes: Axes, index: Axis) -> bool:
    """True where `index` is a part of the channels that the tensor was projected to; False where it is not, or it cannot be told."""
    wanted = set(index)
    while wanted:
        name = canonical(node)
        if name in ("linear", "conv"):
            return bool(wanted & set(resolve(axes)[-1 if name == "linear" else 1]))
        step = _before(node, axes, wanted)
        if step is None:
            return False
        node, axes = step
    return False


def _before(node: fx.Node, axes: Axes, wanted: set[Atom]) -> tuple[fx.Node, Axes] | None:
    """The tensor in front of one operator, and its axes."""
    try:
        step = back_through(node, axes)
    except MismatchError:
        return None
    if step is not None:
        return step
    source = next(iter(node.all_input_nodes), None)
    if canonical(node) == "getitem" and source is not None:
        return _whole(node, source, axes, wanted)
    if canonical(node) == "cat" and source is not None:
        return source, _resized(source, axes, wanted)
    shape = shape_of(node)
    if source is None or shape is None or shape_of(source) != shape or canonical(node) in _COMPUTES:
        return None
    return source, axes


def _whole(node: fx.Node, source: fx.Node, axes: Axes, wanted: set[Atom]) -> tuple[fx.Node, Axes] | None:
    """What one of the parts of a tensor was cut from; an axis that was cut is a new index, wanted where the part's was."""
    name = canonical(source)
    cut = source.args[0] if name in ("unbind", "chunk", "split") and isinstance(source.args[0], fx.Node) else source
    shape = shape_of(cut)
    if shape is None:
        return None
    if name == "unbind" or (cut is source and isinstance(node.args[1], int)):
        dim = int(argument(source, "dim", 0)) % len(shape) if cut is not source else 0
        return cut, (*axes[:dim], fresh("part", hinted_shape(cut)[dim]), *axes[dim:])
    if len(shape) != len(axes):
        return None
    return cut, _resized(cut, axes, wanted)


def _resized(other: fx.Node, axes: Axes, wanted: set[Atom]) -> Axes:
    """The axes of a tensor that differs in the length of some; such a one is a new index, wanted where the old one was."""
    found: list[Axis] = []
    for axis, extent in zip(resolve(axes), hinted_shape(other), strict=True):
        new = axis if size(axis) == extent else fresh("resized", extent)
        if new is not axis and wanted & set(axis):
            wanted |= set(new)
        found.append(new)
    return tuple(found)
