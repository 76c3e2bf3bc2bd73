"""On which grid the tokens of a tensor lie, how many stand in front of them, and which part of the grid attends to itself.

Read off the coordinates of its axes (`coordinates.py`): a token axis that runs over all rows and columns is a grid; one that runs over a
part of them, the rest being in the batch, is a window; what is concatenated in front is a prefix. What flows through an operator that does
not keep the tokens is known no more, and nothing is guessed from a number of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import fx

from rewrite.tokens import rules
from rewrite.tokens.atoms import Axes, Axis, Place, leaves, merged, pieces_of, regroup
from rewrite.tokens.coordinates import Coordinates
from rewrite.tokens.flow import axis_flow
from rewrite.tokens.placement import example, extents, first_tensor, is_tensor
from rewrite.tokens.visual import VisualMerge, visual_mask_node, visual_merges

Grid = tuple[int, ...]
Partition = Literal["window", "grid"]


@dataclass(frozen=True)
class TokenLayout:
    """A token axis: `prefix` tokens, then positions of `grid`, then `suffix` tokens.

    window: the part of the grid, padded perhaps, that is on the axis, the rest being in the batch; None where it is the grid itself.
    partition: windows are contiguous, or each takes every n-th position (a "grid", dilated). shifted: the grid was rolled before it was
    cut. raster: its positions on the axis are in row-major order.
    """

    grid: Grid
    prefix: int = 0
    suffix: int = 0
    window: Grid | None = None
    partition: Partition = "window"
    shifted: bool = False
    raster: bool = True

    @property
    def patches(self) -> int:
        """How many positions of the grid are on the axis."""
        return math.prod(self.window or self.grid)


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
        self.coordinates = Coordinates(graph)
        self.convolutions = [node for node in graph.nodes if is_patch_convolution(node)]

    def of(self, node: fx.Node) -> TokenLayout | None:
        """The layout of the token axis of a [B, N, C] or [B, H, N, D] tensor; None where it is not known."""
        axes = self.coordinates.of(node)
        return None if axes is None else _token_axis(axes, extents(node))

    def of_operand(self, node: fx.Node, steps: Sequence[tuple[str, tuple[Any, ...]]], axis: int) -> TokenLayout | None:
        """The layout of one axis of an operand, which is a node after the tensor methods `steps` (squeeze, reshape, unsqueeze, permute)."""
        axes, sizes = self.coordinates.of(node), extents(node)
        if axes is None:
            return None
        for method, arguments in steps:
            axes, sizes = _STEPS[method](axes, sizes, arguments[0])
        return _layout(axes, sizes, axis)

    def embeddings(self) -> list[PatchEmbedding]:
        """The patch embeddings, with the tokens that were put around the patches."""
        best: dict[fx.Node, tuple[fx.Node, TokenLayout]] = {}
        wanted = set(self.convolutions)
        for node in self.coordinates.axes if wanted else ():
            axes = self.coordinates.of(node)
            if axes is None or len(axes) != 3:
                continue
            found = [(axis, layout) for axis in range(3) if (layout := _layout(axes, extents(node), axis)) is not None]
            whole = [(axis, layout) for axis, layout in found if layout.window is None and layout.raster]
            if len(whole) == 1:
                axis, layout = whole[0]
                conv = _source(axes[axis], extents(node)[axis])
                if conv is not None and conv in wanted and (conv not in best or _extends(layout, best[conv][1])):
                    best[conv] = node, layout
        return [
            PatchEmbedding(conv, layout.grid, layout.prefix + layout.patches + layout.suffix, node, layout.prefix, layout.suffix)
            for conv in self.convolutions
            if conv in best
            for node, layout in (best[conv],)
        ]


def patch_grid(graph: fx.Graph) -> list[PatchEmbedding]:
    """The patch embeddings of a graph, in graph order."""
    return TokenLayouts(graph).embeddings()


def layout_of(node: fx.Node) -> tuple[Grid, int] | None:
    """(grid, prefix) where the N tokens of a [B, N, C] or [B, H, N, D] node are `prefix` tokens and the patches of `grid`, in order.

    Each call reads the whole graph once; for many nodes of one graph, ask one `TokenLayouts`.
    """
    layout = TokenLayouts(node.graph).of(node)
    plain = layout is not None and layout.window is None and layout.raster and not layout.suffix
    return (layout.grid, layout.prefix) if layout is not None and plain else None


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


def _token_axis(axes: Axes, sizes: Sequence[int]) -> TokenLayout | None:
    """The layout of the last axis but one; of another, where that one holds the whole grid."""
    if len(axes) > 1 and (layout := _layout(axes, sizes, len(axes) - 2)) is not None:
        return layout
    found = [layout for axis in range(len(axes)) if (layout := _layout(axes, sizes, axis)) is not None and layout.window is None]
    return found[0] if found else None


def _layout(axes: Axes, sizes: Sequence[int], axis: int) -> TokenLayout | None:
    """The layout of one axis, the others being the batch."""
    pieces = pieces_of(sizes[axis], axes[axis])
    at = [i for i, (_, piece) in enumerate(pieces) if any(atom.place is not None for atom in leaves(piece))]
    if len(at) != 1:
        return None
    prefix, suffix = sum(size for size, _ in pieces[: at[0]]), sum(size for size, _ in pieces[at[0] + 1 :])
    if any(size > 1 and not all(atom.learned for atom in leaves(piece)) for size, piece in pieces[at[0] + 1 :]):
        return None  # another stream follows, a text perhaps: this is no picture with tokens of its own around it
    inside = merged(pieces[at[0]][1])
    parts = [entry for entry in inside if isinstance(entry, tuple)]
    lines = {place.axis: place.line for _, place in parts}
    others = [entry for i, other in enumerate(axes) if i != axis for entry in merged(other) if isinstance(entry, tuple)]
    # A picture may be repeated along the windows of another: the batch then says nothing of its own grid.
    others = [(size, place) for size, place in others if lines.setdefault(place.axis, place.line) == place.line]
    one_grid = all(place.line == lines[place.axis] for _, place in parts)
    if not one_grid or len(parts) != len(inside) or not {-1, -2} <= lines.keys():
        return None
    order = sorted(lines)
    if not all(_covered([entry for entry in parts + others if entry[1].axis == a], lines[a].length) for a in order):
        return None
    window = tuple(math.prod(size for size, place in parts if place.axis == a) for a in order)
    lengths = tuple(lines[a].length for a in order)
    grid = tuple(lines[a].length - lines[a].before - lines[a].after for a in order)
    shifted = any(line.shift for line in lines.values())
    laid = [place.axis for _, place in parts]
    return TokenLayout(
        grid=grid,
        prefix=prefix,
        suffix=suffix,
        window=None if window == lengths == grid and not shifted else window,
        partition=_partition(parts),
        shifted=shifted,
        raster=laid == sorted(set(laid)),
    )


def _covered(parts: list[tuple[int, Place]], length: int) -> bool:
    """Whether parts of one axis of a grid make up the whole of it."""
    stride = 1
    for size, place in sorted(parts, key=lambda part: part[1].stride):
        if place.stride != stride:
            return False
        stride *= size
    return stride == length


def _partition(parts: list[tuple[int, Place]]) -> Partition:
    """How windows were cut: contiguous where neighbours of the grid are neighbours in the window."""
    partial = [place for size, place in parts if size < place.length]
    return "grid" if partial and all(place.stride > 1 for place in partial) else "window"


def _source(axis: Axis, size: int) -> fx.Node | None:
    """The node that made the grid of a token axis."""
    places = [atom.place for _, piece in pieces_of(size, axis) for atom in leaves(piece) if atom.place is not None]
    return places[0].source if places else None


def _squeezed(axes: Axes, sizes: Sequence[int], dims: Sequence[int]) -> tuple[Axes, Sequence[int]]:
    kept = [i for i in range(len(axes)) if i not in dims]
    return tuple(axes[i] for i in kept), [sizes[i] for i in kept]


def _permuted(axes: Axes, sizes: Sequence[int], order: Sequence[int]) -> tuple[Axes, Sequence[int]]:
    return tuple(axes[i] for i in order), [sizes[i] for i in order]


def _numbers(shape: Sequence[Any], sizes: Sequence[int]) -> tuple[int, ...]:
    """A shape to view a tensor of `sizes` as; an entry may say of which axis it is the length, divided by what."""
    return tuple(entry if isinstance(entry, int) else sizes[entry.axis] // entry.divisor for entry in shape)


_STEPS: dict[str, Any] = {
    "squeeze": _squeezed,
    "permute": _permuted,
    "reshape": lambda axes, sizes, shape: (regroup(axes, sizes, _numbers(shape, sizes)), _numbers(shape, sizes)),
    "unsqueeze": lambda axes, sizes, dim: ((*axes, ()), [*sizes, 1]),
}


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
