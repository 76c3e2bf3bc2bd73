"""A recognised region: the nodes an attention is made of, and how its operands lie in memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

import sympy
import torch
from sympy.logic.boolalg import Boolean
from torch import fx

from rewrite.recognise.index_algebra import Axes, Axis, leaves, resolve, size


class NearMissError(Exception):
    """What looked like attention and is not one that can be handled; the message is the first thing that did not fit."""


@dataclass(frozen=True)
class Layout:
    """How to bring a tensor into the IR's order, each step left out where it is empty.

    squeezed: axes of size one to drop. split: shape to view it as. appended: axes of size one to put behind. order: permutation.
    merged: shape at the end.
    """

    order: tuple[int, ...]
    split: tuple[int, ...] | None = None
    merged: tuple[int, ...] | None = None
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
            tensor = getattr(tensor, method)(*arguments)
        return tensor


@dataclass(frozen=True)
class Operand:
    """A node of the graph and how it becomes an operand of the IR."""

    node: fx.Node
    layout: Layout


@dataclass
class Region:
    """One attention as it stands in a graph.

    output: the node whose value the site computes, [B, H, Nq, Dv] after `output_layout` is undone (`output_order` says which of the IR's
    axes each of its axes is). sizes: the IR's sizes by name. core: the softmax or the fused call, which names the site.
    """

    core: fx.Node
    output: fx.Node
    query: Operand
    key: Operand
    value: Operand
    score: sympy.Expr
    mask: Boolean
    tensors: dict[str, Operand]
    sizes: dict[str, int]
    output_order: tuple[int, ...]
    output_shape: tuple[int, ...] | None
    dropout: float = 0.0
    map_readers: tuple[str, ...] = ()

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
    if is_symbolic(node):
        raise NearMissError(f"{node.name} mixes indices in one axis while its sizes are symbolic")
    return Layout(order=order, split=tuple(atom.size for atom in flat), merged=tuple(size(group) for group in present))


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


def is_symbolic(node: fx.Node) -> bool:
    """True where some size of the node is symbolic."""
    value = node.meta.get("example_value")
    return isinstance(value, torch.Tensor) and any(isinstance(extent, torch.SymInt) for extent in value.shape)


def reduced_layout(node: fx.Node, axes: Axes, groups: dict[str, Axis]) -> tuple[str, Layout]:
    """For a tensor read inside the score: the axes it has among "bhij" and the layout that leaves just those.

    A single number keeps one axis, which broadcasts along the keys.
    """
    axes = resolve(axes)
    present = {letter: leaves(group) for letter, group in groups.items()}
    letters = "".join(letter for letter, group in present.items() if group and any(set(axis) & set(group) for axis in axes))
    layout = layout_of(node, axes, tuple(present[letter] for letter in letters))
    return letters, layout if letters else replace(layout, order=(0,), appended=1)
