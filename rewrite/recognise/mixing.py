"""Heads mixed into each other: a linear map, a convolution or an einsum over the head axis of scores or of a map."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import sympy
from torch import fx

from rewrite.recognise.contraction import contract
from rewrite.recognise.index_algebra import Axes, Axis, leaves, unify
from rewrite.recognise.operators import argument, canonical, hinted_shape, spelled
from rewrite.recognise.region import NearMissError


@dataclass
class Mixture:
    """mixed[g] = sum_h matrix[g, h] * inner[h] + bias[g], over the heads on `axis`. matrix: the node, and its axes (g, h) by place."""

    inner: sympy.Expr
    axis: Axis
    matrix: fx.Node
    order: tuple[int, int]
    squeezed: tuple[int, ...] = ()
    bias: fx.Node | None = None


def mixing(node: fx.Node, axes: Axes, depends: Callable[[fx.Node], bool]) -> tuple[Mixture, fx.Node, Axes]:
    """(the mixture with its `inner` left open, the tensor that is mixed, its axes).

    In the IR heads before and after are one index, so that the axis of the result is that of the input. depends: whether a node is computed
    from what is read. Raises `NearMissError` where the operator is no square map of one axis.
    """
    return _by_einsum(node, axes, depends) if canonical(node) == "einsum" else _by_projection(node, axes, depends)


def _by_einsum(node: fx.Node, axes: Axes, depends: Callable[[fx.Node], bool]) -> tuple[Mixture, fx.Node, Axes]:
    found = contract(node)
    operand = found.left if depends(found.left) else found.right
    inner_axes, matrix, matrix_axes = found.other(operand)
    for here, there in zip(axes, found.out, strict=True):
        unify(there, here)
    kept = [leaves(axis) for axis in found.out]
    contracted = [place for place, axis in enumerate(inner_axes) if leaves(axis) and leaves(axis) not in kept]
    if len(matrix_axes) != 2 or len(contracted) != 1 or depends(matrix):
        raise NearMissError(f"{node.name} (einsum) stands between the scores and the softmax")
    place_in = next(place for place, axis in enumerate(matrix_axes) if leaves(axis) == leaves(inner_axes[contracted[0]]))
    heads = matrix_axes[1 - place_in]
    undone = tuple(heads if place == contracted[0] else axis for place, axis in enumerate(inner_axes))
    return Mixture(sympy.S.Zero, heads, matrix, (1 - place_in, place_in)), operand, undone


def _by_projection(node: fx.Node, axes: Axes, depends: Callable[[fx.Node], bool]) -> tuple[Mixture, fx.Node, Axes]:
    source, weight, bias = (argument(node, name) for name in ("input", "weight", "bias"))
    assert isinstance(source, fx.Node)
    assert isinstance(weight, fx.Node)
    shape = hinted_shape(weight)
    square = shape[0] == shape[1] and all(extent == 1 for extent in shape[2:]) and hinted_shape(source) == hinted_shape(node)
    if not square or not depends(source):
        raise NearMissError(f"{node.name} ({spelled(node)}) stands between the scores and the softmax")
    place = len(axes) - 1 if canonical(node) == "linear" else 1
    squeezed = tuple(range(2, len(shape)))
    return Mixture(sympy.S.Zero, axes[place], weight, (0, 1), squeezed, bias if isinstance(bias, fx.Node) else None), source, axes
