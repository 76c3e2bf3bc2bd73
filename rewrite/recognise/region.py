"""A recognised region: the nodes an attention is made of, and how its operands lie in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import sympy
import torch
from torch import fx

from rewrite.ir.expression import INDICES
from rewrite.ir.operations import Attend
from rewrite.recognise.index_algebra import Atom, Axes, Axis, exact_product, exact_products, leaves, resolve
from rewrite.recognise.operators import exact, shape_of


class NearMissError(Exception):
    """What looked like attention and is not one that can be handled; the message is the first thing that did not fit."""


@dataclass(frozen=True)
class SizeOf:
    """The length of an axis of the tensor that is being viewed, divided by a number: a size that changes from call to call."""

    axis: int
    divisor: int = 1


# One length of a view: a number, -1 for what is left, or a length of the tensor itself.
Length = int | SizeOf


@dataclass(frozen=True)
class Layout:
    """How to bring a tensor into the IR's order, each step left out where it is empty.

    squeezed: axes of size one to drop. split: shape to view it as. appended: axes of size one to put behind. order: permutation.
    merged: shape at the end.
    """

    order: tuple[int, ...]
    split: tuple[Length, ...] | None = None
    merged: tuple[Length, ...] | None = None
    squeezed: tuple[int, ...] = ()
    appended: int = 0

    def steps(self) -> list[tuple[str, tuple[object, ...]]]:
        """The tensor methods to call, in order, with their arguments."""
        calls: list[tuple[str, tuple[object, ...]]] = []
        if self.squeezed:
            calls.append(("squeeze", (self.squeezed,)))
        if self.split is not None:
            calls.append(("reshape", (self.split,)))
        calls += [("unsqueeze", (-1,))] * self.appended
        if self.order != tuple(range(len(self.order))):
            calls.append(("permute", (self.order,)))
        if self.merged is not None:
            calls.append(("reshape", (self.merged,)))
        return calls

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor in the IR's order."""
        for method, arguments in self.steps():
            tensor = viewed(tensor, *arguments) if method == "reshape" else getattr(tensor, method)(*arguments)
        return tensor


def viewed(tensor: torch.Tensor, shape: object) -> torch.Tensor:
    """The tensor viewed with a shape whose lengths may be its own."""
    assert isinstance(shape, tuple)
    return tensor.reshape([tensor.shape[n.axis] // n.divisor if isinstance(n, SizeOf) else n for n in shape])


Lengths = Sequence[Sequence[sympy.Expr]]


def shape_in(source: Lengths, target: Lengths) -> tuple[Length, ...] | None:
    """The lengths `target` of a view of a tensor of the lengths `source`, each given as all that it is known to be.

    None where they cannot be told from these.
    """
    lengths: list[Length] = []
    for wanted in target:
        number = next((known for known in wanted if known.is_Integer), None)
        if number is not None:
            lengths.append(int(number))
            continue
        pairs = ((axis, extent, known) for axis, extents in enumerate(source) for extent in extents for known in wanted)
        ratios = [(axis, sympy.cancel(extent / known)) for axis, extent, known in pairs]
        own = [SizeOf(axis, int(ratio)) for axis, ratio in ratios if ratio.is_Integer and ratio > 0]
        # A length that is no axis of the tensor is what is left over; there can be one.
        if not own and -1 in lengths:
            return None
        lengths.append(min(own, key=lambda length: length.divisor) if own else -1)
    return tuple(lengths)


@dataclass(frozen=True)
class Operand:
    """A node of the graph and how it becomes an operand of the IR."""

    node: fx.Node
    layout: Layout


@dataclass
class Region:
    """One attention as it stands in a graph.

    attend: what it computes, as an operation of the IR. output: the node whose value the site computes: [B, H, Nq, Dv], permuted by
    `output_order` (which of the IR's axes each of its axes is) and viewed as `output_shape`. tensors: what `attend` reads beside query,
    key and value. sizes: the IR's sizes by name. core: the normaliser or the fused call, which names the site.
    channels: queries and keys are channels, not tokens (cross-covariance).
    """

    core: fx.Node
    output: fx.Node
    query: Operand
    key: Operand
    value: Operand
    attend: Attend
    tensors: dict[str, Operand]
    sizes: dict[str, int]
    output_order: tuple[int, ...]
    output_shape: tuple[Length, ...] | None
    dropout: float = 0.0
    map_readers: tuple[str, ...] = ()
    channels: bool = False

    def operands(self) -> dict[str, Operand]:
        """Every tensor the region reads, by the name it has in the IR."""
        return {"query": self.query, "key": self.key, "value": self.value, **self.tensors}


def layout_of(node: fx.Node, axes: Axes, groups: tuple[Axis, ...]) -> Layout:
    """The layout that brings `node`, whose axes are given, into one axis per group, in the groups' order.

    An axis absent from the tensor comes out with size one. Raises `NearMissError` where an axis mixes in an index of no group.
    """
    axes = resolve(axes)
    wanted = [leaves(group) for group in groups]
    known = {atom for group in wanted for atom in group}
    strangers = [atom for axis in axes for atom in axis if atom not in known]
    if strangers:
        raise NearMissError(f"{node.name} runs over an index that is none of the attention's ({strangers[0]})")
    present = [tuple(atom for atom in group if any(atom in axis for axis in axes)) for group in wanted]
    if all(any(axis == group for axis in axes) for group in present if group) and len({a for a in axes if a}) == sum(map(bool, axes)):
        return _permuted(axes, present)
    flat = [atom for axis in axes for atom in axis]
    order = tuple(flat.index(atom) for group in present for atom in group)
    split = shape_in(exact_shape(node), [atom.exacts for atom in flat])
    merged = shape_in([flat[place].exacts for place in order], [exact_products(group) for group in present])
    if split is None or merged is None:
        raise NearMissError(f"{node.name} mixes several indices of symbolic size in one axis")
    return Layout(order=order, split=split, merged=merged)


def exact_shape(node: fx.Node) -> Lengths:
    """The lengths of a tensor, for `shape_in`."""
    return [(exact(extent),) for extent in shape_of(node) or ()]


def _permuted(axes: Axes, present: list[Axis]) -> Layout:
    """Axes that already are the groups, in another order; axes of size one stand for the groups the tensor lacks."""
    spare = [place for place, axis in enumerate(axes) if not axis]
    order: list[int] = []
    for group in present:
        if group:
            order.append(axes.index(group))
        elif spare:
            order.append(spare.pop(0))
        else:
            order.append(-1)
    if -1 not in order:
        squeezed = tuple(spare)
        kept = [place for place in range(len(axes)) if place not in spare]
        return Layout(order=tuple(kept.index(place) for place in order), squeezed=squeezed)
    # Groups without any axis: put axes of size one behind and permute them into place.
    extra = len(axes)
    filled: list[int] = []
    for place in order:
        filled.append(place if place >= 0 else extra)
        extra += place < 0
    return Layout(order=tuple(filled), appended=order.count(-1))


def reading_layout(node: fx.Node, axes: Axes, groups: Sequence[tuple[sympy.Expr, Axis]]) -> tuple[tuple[sympy.Expr, ...], Layout]:
    """For a tensor read inside an expression: the IR's indices that it has, and the layout that leaves just those axes.

    groups: the indices that there are, each with its axis.

    A tensor that runs over a part of an index (rows of a grid of keys, say) is read at that part of it: floor(j / width). A single number
    keeps one axis, which broadcasts along the keys.
    """
    axes = resolve(axes)
    held = {atom for axis in axes for atom in axis}
    indices: list[sympy.Expr] = []
    parts: list[Axis] = []
    for index, group in groups:
        whole = leaves(group)
        for run in _runs(whole, held):
            indices.append(_digit(index, whole, run))
            parts.append(run)
    layout = layout_of(node, axes, tuple(parts))
    if indices:
        return tuple(indices), layout
    return (INDICES["j"],), replace(layout, order=(0,), appended=1)


def _runs(whole: Axis, held: set[Atom]) -> list[Axis]:
    """The longest runs of an index's atoms that a tensor holds."""
    runs: list[list[Atom]] = []
    for before, atom in zip((None, *whole), whole, strict=False):
        if atom in held:
            if before in held and runs:
                runs[-1].append(atom)
            else:
                runs.append([atom])
    return [tuple(run) for run in runs]


def _digit(index: sympy.Expr, whole: Axis, run: Axis) -> sympy.Expr:
    """The part of an index that a run of its atoms is: floor(index / what lies below) modulo its own size."""
    if run == whole:
        return index
    first, after = whole.index(run[0]), whole[whole.index(run[-1]) + 1 :]
    below, own = exact_product(after), exact_product(run)
    if not below.is_Integer or (first and not own.is_Integer):
        raise NearMissError(f"a part of {index} that is read has a symbolic size")
    digit = sympy.floor(index / below)
    return sympy.Mod(digit, own) if first else digit
