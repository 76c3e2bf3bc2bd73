"""Contractions of two tensors, however they are written, with the axes of operands and result in fresh indices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
from torch import fx

from rewrite.recognise.index_algebra import Axes, Axis, fresh, unify
from rewrite.recognise.operators import argument, canonical, hinted_shape
from rewrite.recognise.region import NearMissError

CONTRACTIONS = frozenset({"matmul", "baddbmm", "einsum"})


@dataclass
class Contraction:
    """sum over d of left[..., i, d] * right[..., d, j]: the operands with their axes, and the axes of the result.

    lead: the axes that both operands and the result share (batch, heads), in the result's order. scale, added: what multiplies and what
    is added to the product (baddbmm).
    """

    node: fx.Node
    left: fx.Node
    left_axes: Axes
    right: fx.Node
    right_axes: Axes
    out: Axes
    lead: Axes
    scale: sympy.Expr = field(default=sympy.S.One)
    added: tuple[fx.Node, Axes, sympy.Expr] | None = None

    def other(self, operand: fx.Node) -> tuple[Axes, fx.Node, Axes]:
        """(axes of the given operand, the other operand, its axes)."""
        if self.left is operand:
            return self.left_axes, self.right, self.right_axes
        return self.right_axes, self.left, self.left_axes


def number(value: Any) -> sympy.Expr | None:
    """A Python number as a sympy one, exactly; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if isinstance(value, int):
        return sympy.Integer(value)
    return sympy.Float(value) if math.isfinite(value) else (sympy.oo if value > 0 else -sympy.oo)


def broadcast(axes: Axes, shape: Sequence[int]) -> Axes:
    """The axes of a tensor of `shape` that broadcasts against the given ones: aligned at the end, none where it has size one."""
    return tuple(axis if extent != 1 else () for axis, extent in zip(axes[len(axes) - len(shape) :], shape, strict=True))


def contract(node: fx.Node) -> Contraction:
    """The axes of a contraction's operands and result, written in fresh indices."""
    name = canonical(node)
    if name == "einsum":
        return _contract_einsum(node)
    bias: Any = None
    scale: sympy.Expr | None = sympy.Integer(1)
    beta: sympy.Expr | None = sympy.Integer(0)
    if name == "baddbmm":
        bias, left, right = (argument(node, name) for name in ("input", "batch1", "batch2"))
        scale, beta = number(node.kwargs.get("alpha", 1)), number(node.kwargs.get("beta", 1))
        if scale is None or beta is None:
            raise NearMissError(f"{node.name} (baddbmm) takes a factor that is not a number")
    else:
        left, right = argument(node, "input"), argument(node, "other", node.kwargs.get("mat2"))
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        raise NearMissError(f"{node.name} does not contract two tensors")
    left_shape, right_shape = hinted_shape(left), hinted_shape(right)
    if min(len(left_shape), len(right_shape)) < 2:
        raise NearMissError(f"{node.name} contracts a vector")
    lead = tuple(fresh(f"batch{place}", extent) for place, extent in enumerate(hinted_shape(node)[:-2]))
    rows, columns, inner = fresh("row", left_shape[-2]), fresh("column", right_shape[-1]), fresh("inner", left_shape[-1])
    same = fresh("inner", right_shape[-2])
    unify(inner, same)
    left_axes = (*broadcast(lead, left_shape[:-2]), rows, inner)
    right_axes = (*broadcast(lead, right_shape[:-2]), same, columns)
    out = (*lead, rows, columns)
    added = None
    if isinstance(bias, fx.Node) and beta != 0:
        added = (bias, broadcast(out, hinted_shape(bias)), beta)
    return Contraction(node, left, left_axes, right, right_axes, out, lead, scale, added)


def _contract_einsum(node: fx.Node) -> Contraction:
    equation, *operands = node.args
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = list(operands[0])
    if not isinstance(equation, str) or len(operands) != 2 or not all(isinstance(operand, fx.Node) for operand in operands):
        raise NearMissError(f"{node.name} is an einsum this does not read: {equation!r}")
    left, right = operands
    assert isinstance(left, fx.Node)
    assert isinstance(right, fx.Node)
    shapes = [hinted_shape(left), hinted_shape(right)]
    names, result = _letters(equation, [len(shape) for shape in shapes], len(hinted_shape(node)))
    sizes: dict[str, int] = {}
    for letters, shape in zip(names, shapes, strict=True):
        if len(set(letters)) != len(letters):
            raise NearMissError(f"{node.name} is an einsum that reads a diagonal: {equation!r}")
        for letter, extent in zip(letters, shape, strict=True):
            sizes[letter] = extent if sizes.get(letter, 1) == 1 else sizes[letter]
    atoms: dict[str, Axis] = {letter: fresh(letter, extent) for letter, extent in sizes.items()}
    for letters, shape in zip(names, shapes, strict=True):
        for letter, extent in zip(letters, shape, strict=True):
            if extent != 1:
                unify(atoms[letter], fresh(letter, extent))
    axes = [
        tuple(atoms[letter] if extent != 1 else () for letter, extent in zip(*pair, strict=True))
        for pair in zip(names, shapes, strict=True)
    ]
    shared = tuple(atoms[letter] for letter in result if all(letter in letters for letter in names))
    return Contraction(node, left, axes[0], right, axes[1], tuple(atoms[letter] for letter in result), shared)


def _letters(equation: str, ranks: Sequence[int], result_rank: int) -> tuple[list[str], str]:
    """The letters of the operands and of the result: an ellipsis written out, the result's letters where they are left out."""
    left, arrow, result = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow:
        once = sorted(letter for letter in set(left) - set(",.") if left.count(letter) == 1)
        result = ("..." if "..." in left else "") + "".join(once)
    # Digits stand for the axes under an ellipsis, counted from the last, which is how they broadcast.
    hidden = [rank - len(term.replace("...", "")) if "..." in term else 0 for term, rank in zip(terms, ranks, strict=True)]
    names = [
        term.replace("...", "".join(str(place) for place in reversed(range(count)))) for term, count in zip(terms, hidden, strict=True)
    ]
    under = result_rank - len(result.replace("...", ""))
    return names, result.replace("...", "".join(str(place) for place in reversed(range(under))))
