"""Operators over pictures: what convolutions, pooling, resizing, rolls, padding and slices make of grid coordinates.

A convolution or pooling over two or three axes says that these are the axes of a grid. Where it keeps their size it keeps their
coordinates; where it does not, its result is a grid of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import fx

from rewrite.tokens import rules
from rewrite.tokens.atoms import Atom, Axes, Axis, Place, cut, fresh, leaves, line_of, merged, put, regroup
from rewrite.tokens.placement import example, extents, is_tensor

Rule = Callable[[fx.Node, Axes], Axes | None]


def _name_rank(name: str) -> int:
    return 3 if "3d" in name else 2


def _put_grid(node: fx.Node, source: fx.Node, axes: Axes, at: range) -> None:
    """The axes `at` of `source` are those of a grid, if they are more than one position long and of known size."""
    shape = example(source).shape
    if all(isinstance(shape[i], int) and shape[i] > 1 for i in at):
        for i in at:
            put(axes[i], Place(i - len(axes), shape[i], source=node))


def _resampled(node: fx.Node, source: fx.Node, axes: Axes, rank: int, channels: Axis) -> Axes:
    """The last `rank` axes computed from those of `source`."""
    before, after = extents(source), extents(node)
    result = [*axes[: -rank - 1], channels, *axes[-rank:]]
    for i in range(-rank, 0):
        if before[i] == after[i]:
            continue
        inside = merged(axes[i])
        if line_of(axes[i]) is None and any(isinstance(part, tuple) for part in inside):
            result[i] = fresh(after[i])
            if len(inside) == 1 and isinstance(inside[0], tuple) and before[i] % after[i] == 0:  # windows, coarser with all of their grid
                place, patch = inside[0][1], before[i] // after[i]
                result[i] = _coarser(Atom(after[i], replace(place, stride=place.stride * patch)), {place.line: patch})
                result = [tuple(atom for old in leaves(axis) for atom in _coarser(old, {place.line: patch})) for axis in result]
        else:
            known = isinstance(example(node).shape[i], int)
            result[i] = fresh(after[i], Place(i, after[i], source=node) if known else None)
    return tuple(result)


def _convolution(node: fx.Node, axes: Axes) -> Axes | None:
    source, weight = node.args[0], rules.argument(node, 1, "weight")
    rank = _name_rank(rules.name_of(node))
    if not isinstance(source, fx.Node) or not is_tensor(weight) or len(axes) < rank + 1:
        return None
    kernel = extents(weight)[2:]
    channels = fresh(extents(node)[-rank - 1])
    if max(kernel) > 1:
        _put_grid(node, source, axes, range(len(axes) - rank, len(axes)))
        for atom in leaves(axes[0]) if len(axes) == rank + 2 else ():
            atom.outer = atom.outer or atom.place is None
    return _resampled(node, source, axes, rank, channels)


def _pooling(node: fx.Node, axes: Axes) -> Axes | None:
    source, rank = node.args[0], _name_rank(rules.name_of(node))
    if not isinstance(source, fx.Node) or len(axes) < rank + 1 or not is_tensor(node):
        return None
    _put_grid(node, source, axes, range(len(axes) - rank, len(axes)))
    return _resampled(node, source, axes, rank, axes[-rank - 1])


def _resizing(node: fx.Node, axes: Axes) -> Axes | None:
    source, rank = node.args[0], len(axes) - 2
    if not isinstance(source, fx.Node) or rank not in (2, 3):
        return None
    _put_grid(node, source, axes, range(2, len(axes)))
    return _resampled(node, source, axes, rank, axes[1])


def _shuffling(node: fx.Node, axes: Axes) -> Axes | None:
    source = node.args[0]
    if not isinstance(source, fx.Node) or len(axes) < 3:
        return None
    return _resampled(node, source, axes, 2, fresh(extents(node)[-3]))


def _same(node: fx.Node, axes: Axes) -> Axes:
    return axes


def _each(value: Any, count: int) -> tuple[Any, ...]:
    given = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return given * count if len(given) == 1 else given


def _unfold(node: fx.Node, axes: Axes) -> Axes | None:
    """Windows of one axis, their inside put behind; the function of the same name gives patches of a picture."""
    source = node.args[0]
    if not isinstance(source, fx.Node) or node.op != "call_method":
        return _patches(node, source, axes) if isinstance(source, fx.Node) and len(axes) == 4 else None
    given = [rules.argument(node, i, name) for i, name in ((1, "dimension"), (2, "size"), (3, "step"))]
    if not all(isinstance(value, int) for value in given):
        return None
    dim, size, step = given[0] % len(axes), given[1], given[2]
    count, line = extents(node)[dim], line_of(axes[dim])
    windows, inside = fresh(count), fresh(size)
    if line is not None and count * step <= line.length:
        windows = fresh(count, replace(line, stride=step))
        inside = fresh(size, line) if size == step else inside
    return (*axes[:dim], windows, *axes[dim + 1 :], inside)


def _patches(node: fx.Node, source: fx.Node, axes: Axes) -> Axes | None:
    """[B, C, H, W] -> [B, C * k * k, L], the patches in raster order."""
    kernel, dilation, padding, stride = (
        _each(rules.argument(node, i + 1, name, default=default), 2)
        for i, (name, default) in enumerate((("kernel_size", None), ("dilation", 1), ("padding", 0), ("stride", 1)))
    )
    before = example(source).shape[2:]
    if not all(isinstance(x, int) for x in (*kernel, *dilation, *padding, *stride, *before)):
        return None
    _put_grid(node, source, axes, range(2, 4))
    if kernel == stride and (*dilation, *padding) == (1, 1, 0, 0) and all(before[i] % kernel[i] == 0 for i in range(2)):
        (rows, inner_rows), (columns, inner_columns) = (
            regroup((axes[2 + i],), (before[i],), (before[i] // kernel[i], kernel[i])) for i in range(2)
        )
        return axes[0], (*axes[1], *inner_rows, *inner_columns), (*rows, *columns)
    counts = [(before[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in range(2)]
    tokens = tuple(atom for i in range(2) for atom in fresh(counts[i], Place(i - 2, counts[i], source=node)))
    if counts == list(before):
        tokens = (*axes[2], *axes[3])
    return axes[0], fresh(extents(node)[1]), tokens


def _fold(node: fx.Node, axes: Axes) -> Axes | None:
    """The picture [B, C, H, W] that patches [B, C * k * k, L] are summed up to."""
    shape = example(node).shape
    if len(shape) != 4 or not all(isinstance(size, int) for size in shape[2:]):
        return None
    kernel, dilation, padding, stride = (
        _each(rules.argument(node, i + 2, name, default=default), 2)
        for i, (name, default) in enumerate((("kernel_size", None), ("dilation", 1), ("padding", 0), ("stride", 1)))
    )
    counts = [size // step if isinstance(step, int) and step else 0 for size, step in zip(shape[2:], kernel, strict=True)]
    source = node.args[0]
    if kernel == stride and (*dilation, *padding) == (1, 1, 0, 0) and isinstance(source, fx.Node):
        channels, *inner = regroup((axes[1],), extents(source)[1:2], (extents(node)[1], *kernel))
        rows, columns = regroup((axes[2],), extents(source)[2:3], counts)
        return axes[0], channels, (*rows, *inner[0]), (*columns, *inner[1])
    return axes[0], fresh(extents(node)[1]), *(fresh(shape[i], Place(i - 4, shape[i], source=node)) for i in (2, 3))


def _roll(node: fx.Node, axes: Axes) -> Axes | None:
    source, shifts, dims = node.args[0], rules.argument(node, 1, "shifts"), rules.argument(node, 2, "dims", "dim")
    if not isinstance(source, fx.Node) or dims is None:
        return None
    shape = example(source).shape
    at = [d % len(axes) for d in _each(dims, 1)]
    amounts = _each(shifts, 1)
    if len(at) == 2 and at[1] == at[0] + 1 and all(isinstance(shape[d], int) and shape[d] > 1 for d in at):
        for d, axis in zip(at, (-2, -1), strict=True):  # two neighbouring axes are rolled: those of a grid
            put(axes[d], Place(axis, shape[d], source=source))
    result = list(axes)
    for d, amount in zip(at, amounts, strict=True):
        line = line_of(axes[d])
        size = extents(source)[d]
        if line is None or not isinstance(amount, int):
            result[d] = fresh(size)
        elif amount % size:
            result[d] = fresh(size, replace(line, shift=(line.shift + amount) % size))
    return tuple(result)


def _pad(node: fx.Node, axes: Axes) -> Axes | None:
    source, amounts = node.args[0], rules.argument(node, 1, "pad")
    if not isinstance(source, fx.Node) or not isinstance(amounts, (tuple, list)) or len(amounts) > 2 * len(axes):
        return None
    before, after = extents(source), extents(node)
    result = list(axes)
    for k in range(len(amounts) // 2):
        low, high = amounts[2 * k : 2 * k + 2]
        d = len(axes) - 1 - k
        if (low, high) == (0, 0):
            continue
        line = line_of(axes[d])
        if line is None or line.shift or not isinstance(low, int) or not isinstance(high, int):
            result[d] = fresh(after[d])
        elif low < 0 or high < 0:
            result[d] = cut(axes[d], before[d], -low, before[d] + high) if low <= 0 and high <= 0 else fresh(after[d])
        else:
            place = replace(line, length=after[d], before=line.before + low, after=line.after + high)
            result[d] = fresh(after[d], place)
    return tuple(result)


def coarsened(axes: Axes, lost: list[Atom]) -> Axes:
    """What is left of a grid when parts of its axes were computed over.

    The parts that run fastest gone, every position stands for a patch: a coarser grid. Any other part gone, the grid is not known.
    """
    patches: dict[Place, int] = {}
    lines = {atom.place.line for atom in lost if atom.place is not None}
    for line in lines:
        patch = 1
        for atom in sorted((atom for atom in lost if atom.place is not None and atom.place.line == line), key=_stride):
            patch = patch * atom.size if _stride(atom) == patch else 0
        patches[line] = patch
    if not patches:
        return axes

    return tuple(tuple(kept for atom in leaves(axis) for kept in _coarser(atom, patches)) for axis in axes)


def _coarser(atom: Atom, patches: Mapping[Place, int]) -> Axis:
    """An atom of a grid of which every `patches[line]` positions became one; of unknown place where they do not become one."""
    if atom.place is None or atom.place.line not in patches:
        return (atom,)
    place, patch = atom.place, patches[atom.place.line]
    if not patch or place.stride % patch or place.length % patch:
        return fresh(atom.size)
    coarser = {name: getattr(place, name) // patch for name in ("length", "stride", "shift", "before", "after")}
    return fresh(atom.size, replace(place, **coarser))


def _stride(atom: Atom) -> int:
    return 0 if atom.place is None else atom.place.stride


_POOLS = [f"{kind}_pool{rank}d" for kind in ("max", "avg", "lp", "adaptive_avg", "adaptive_max") for rank in (2, 3)]
SPATIAL: dict[str, Rule] = {
    **dict.fromkeys(("conv2d", "conv3d", "conv_transpose2d", "conv_transpose3d"), _convolution),
    **dict.fromkeys(_POOLS, _pooling),
    **dict.fromkeys(("interpolate", "upsample", "grid_sample"), _resizing),
    **dict.fromkeys(("pixel_shuffle", "pixel_unshuffle"), _shuffling),
    **dict.fromkeys(("batch_norm", "group_norm", "instance_norm", "local_response_norm", "dropout2d", "dropout3d"), _same),
    "unfold": _unfold,
    "fold": _fold,
    "roll": _roll,
    "pad": _pad,
}
