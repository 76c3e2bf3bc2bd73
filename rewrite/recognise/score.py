"""Reading a score: from the normaliser's input back to the contraction of queries with keys."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from sympy.logic.boolalg import Boolean
from torch import fx

from rewrite.ir.expression import QK
from rewrite.recognise.index_algebra import Axes, MismatchError, back_through, fresh, unify
from rewrite.recognise.operators import canonical, hinted_shape, spelled, value_of
from rewrite.recognise.region import NearMissError

_CONTRACTIONS = frozenset({"matmul", "baddbmm", "einsum"})
_UNCHANGED = frozenset({"cast", "contiguous", "clone"})
# What a score may be made of on the way from the contraction to the normaliser.
_ELEMENTWISE = frozenset({"add", "sub", "mul", "div", "masked_fill", "where"})

# What reads a tensor's shape and type and none of its numbers.
_SHAPE_ONLY = frozenset({"full_like", "zeros_like", "ones_like", "empty_like", "new_full", "new_zeros", "new_ones", "new_empty"})


@dataclass
class Contraction:
    """sum over d of left[..., i, d] * right[..., d, j]: the operands with their axes, and the axes of the result.

    lead: the axes that both operands and the result share (batch, heads), in the result's order.
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


@dataclass
class Score:
    """A score as it was read: the expression with its leaves named t0, t1, ... and what they are."""

    expression: sympy.Expr
    contraction: Contraction
    leaves: dict[str, tuple[fx.Node, Axes]] = field(default_factory=dict)
    mask: Boolean = sympy.true


def number(value: Any) -> sympy.Expr | None:
    """A Python number as a sympy one, exactly; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if isinstance(value, int):
        return sympy.Integer(value)
    return sympy.Float(value) if math.isfinite(value) else (sympy.oo if value > 0 else -sympy.oo)


def find_contraction(node: fx.Node) -> fx.Node | None:
    """The contraction that a score comes from, through views and elementwise operators."""
    return next((end for end in _ends(node) if canonical(end) in _CONTRACTIONS), None)


def blockers(node: fx.Node) -> list[fx.Node]:
    """The operators at which the way back from a score ends where it meets no contraction."""
    return [end for end in _ends(node) if end.op != "placeholder"] or [node]


def _ends(node: fx.Node) -> Iterator[fx.Node]:
    """Where the ways back from a score end, the first operands' first."""
    stack, seen = [node], {node}
    while stack:
        current = stack.pop()
        if canonical(current) not in _ELEMENTWISE | _UNCHANGED and not _is_view(current):
            yield current
            continue
        for source in reversed(current.all_input_nodes):
            if source not in seen:
                seen.add(source)
                stack.append(source)


def _is_view(node: fx.Node) -> bool:
    return canonical(node) in {"transpose", "permute", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "expand"}


def contract(node: fx.Node) -> Contraction:
    """The axes of a contraction's operands and result, written in fresh indices."""
    name = canonical(node)
    if name == "einsum":
        return _contract_einsum(node)
    added = None
    scale: sympy.Expr = sympy.Integer(1)
    if name == "baddbmm":
        bias, left, right = node.args[:3]
        alpha, beta = number(node.kwargs.get("alpha", 1)), number(node.kwargs.get("beta", 1))
        if alpha is None or beta is None:
            raise NearMissError(f"{node.name} (baddbmm) takes a factor that is not a number")
        scale = alpha
    else:
        left, right = node.args[:2] if len(node.args) >= 2 else (node.args[0], node.kwargs["other"])
        bias, beta = None, sympy.Integer(0)
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        raise NearMissError(f"{node.name} does not contract two tensors")
    left_shape, right_shape = hinted_shape(left), hinted_shape(right)
    if min(len(left_shape), len(right_shape)) < 3:
        raise NearMissError(f"{node.name} contracts matrices without a batch axis")
    rank = max(len(left_shape), len(right_shape))
    out_shape = hinted_shape(node)
    lead = tuple(fresh(f"batch{place}", extent) for place, extent in enumerate(out_shape[:-2]))
    rows, columns = fresh("row", left_shape[-2]), fresh("column", right_shape[-1])
    inner = fresh("inner", left_shape[-1])
    left_axes = (*_broadcast(lead[rank - len(left_shape) :], left_shape[:-2]), rows, inner)
    right_axes = (*_broadcast(lead[rank - len(right_shape) :], right_shape[:-2]), inner, columns)
    out = (*lead, rows, columns)
    if isinstance(bias, fx.Node) and beta != 0:
        added = (bias, _broadcast(out[len(out) - len(hinted_shape(bias)) :], hinted_shape(bias)), beta)
    return Contraction(node, left, left_axes, right, right_axes, out, lead, scale, added)


def _broadcast(axes: Axes, shape: tuple[int, ...]) -> Axes:
    """The axes of a tensor that broadcasts against the given ones: none where it has size one."""
    return tuple(axis if extent != 1 else () for axis, extent in zip(axes, shape, strict=True))


def _contract_einsum(node: fx.Node) -> Contraction:
    equation, *operands = node.args
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = list(operands[0])
    if not isinstance(equation, str) or len(operands) != 2 or "." in equation or "->" not in equation:
        raise NearMissError(f"{node.name} is an einsum this does not read: {equation!r}")
    terms, result = equation.replace(" ", "").split("->")
    names = terms.split(",")
    sizes: dict[str, int] = {}
    for letters, operand in zip(names, operands, strict=True):
        if not isinstance(operand, fx.Node) or len(set(letters)) != len(letters):
            raise NearMissError(f"{node.name} is an einsum this does not read: {equation!r}")
        for letter, extent in zip(letters, hinted_shape(operand), strict=True):
            sizes[letter] = max(sizes.get(letter, 1), extent)
    atoms = {letter: fresh(letter, extent) for letter, extent in sizes.items()}
    axes = [
        tuple(atoms[letter] if extent != 1 else () for letter, extent in zip(letters, hinted_shape(operand), strict=True))
        for letters, operand in zip(names, operands, strict=True)
        if isinstance(operand, fx.Node)
    ]
    left, right = operands
    assert isinstance(left, fx.Node)
    assert isinstance(right, fx.Node)
    shared = tuple(atoms[letter] for letter in result if all(letter in letters for letter in names))
    return Contraction(node, left, axes[0], right, axes[1], tuple(atoms[letter] for letter in result), shared)


class ScoreReader:
    """Reads the expression between one contraction and a normaliser."""

    def __init__(self, contraction: Contraction) -> None:
        self.contraction = contraction
        self.leaves: dict[str, tuple[fx.Node, Axes]] = {}
        self.mask: Boolean = sympy.true
        self._depends: dict[fx.Node, bool] = {contraction.node: True}

    def read(self, node: fx.Node, axes: Axes) -> Score:
        """The score at `node`, whose axes are given; they are unified with the contraction's on arrival."""
        expression = self._expression(node, axes)
        return Score(expression, self.contraction, self.leaves, self.mask)

    def depends(self, node: fx.Node) -> bool:
        """True where the node is computed from the contraction by what a score may be made of."""
        if node not in self._depends:
            self._depends[node] = False
            through = canonical(node) in _ELEMENTWISE | _UNCHANGED or _is_view(node)
            self._depends[node] = through and any(self.depends(source) for source in node.all_input_nodes)
        return self._depends[node]

    def _computed_from_scores(self, node: fx.Node) -> bool:
        """True where a tensor comes from the contraction by anything else than what a score may be made of."""
        contraction, stack, seen = self.contraction.node, [node], {node}
        while stack:
            current = stack.pop()
            if current is contraction:
                return True
            if spelled(current) in _SHAPE_ONLY or not isinstance(value_of(current), torch.Tensor):
                continue
            earlier = [source for source in current.all_input_nodes if source not in seen and not source < contraction]
            seen.update(earlier)
            stack += earlier
        return False

    def _leaf(self, node: fx.Node, axes: Axes) -> sympy.Symbol:
        for name, (known, _) in self.leaves.items():
            if known is node:
                return sympy.Symbol(name)
        if self._computed_from_scores(node):
            raise NearMissError(f"{node.name} ({spelled(node)}) computes a part of the score from the scores themselves")
        name = f"t{len(self.leaves)}"
        self.leaves[name] = (node, axes)
        return sympy.Symbol(name)

    def _operand(self, value: Any, axes: Axes) -> sympy.Expr:
        constant = number(value)
        if constant is not None:
            return constant
        if not isinstance(value, fx.Node):
            raise NearMissError(f"{value!r} in the score is neither a tensor nor a number")
        traced = value_of(value)
        if not isinstance(traced, torch.Tensor):
            raise NearMissError(f"{value.name} in the score is a size, not a tensor or a number")
        shape = hinted_shape(value)
        aligned = _broadcast(axes[len(axes) - len(shape) :], shape)
        return self._expression(value, aligned) if self.depends(value) else self._leaf(value, aligned)

    def _expression(self, node: fx.Node, axes: Axes) -> sympy.Expr:
        if node is self.contraction.node:
            for here, there in zip(axes, self.contraction.out, strict=True):
                unify(there, here)
            expression = self.contraction.scale * QK
            if self.contraction.added is not None:
                bias, bias_axes, beta = self.contraction.added
                expression += beta * self._leaf(bias, bias_axes)
            return expression
        name = canonical(node)
        if name in _UNCHANGED:
            return self._operand(node.args[0], axes)
        if name in ("add", "sub"):
            left, right = (self._operand(value, axes) for value in _pair(node))
            right = right * (number(node.kwargs.get("alpha", 1)) or sympy.Integer(1))
            return left + right if name == "add" else left - right
        if name == "mul":
            left, right = (self._operand(value, axes) for value in _pair(node))
            return left * right
        if name == "div":
            left, right = (self._operand(value, axes) for value in _pair(node))
            return left / right
        if name == "masked_fill":
            source, mask, value = node.args[0], node.args[1], node.args[2] if len(node.args) > 2 else node.kwargs["value"]
            return self._filled(self._operand(source, axes), self._operand(mask, axes), value, axes)
        if name == "where":
            condition, yes, no = _branches(node)
            if isinstance(yes, fx.Node) and self.depends(yes):
                return self._filled(self._operand(yes, axes), self._operand(condition, axes), no, axes, keep_where_true=True)
            return self._filled(self._operand(no, axes), self._operand(condition, axes), yes, axes)
        try:
            step = back_through(node, axes)
        except MismatchError as error:
            raise NearMissError(f"{node.name}: {error}") from None
        if step is None:
            raise NearMissError(f"{node.name} ({spelled(node)}) stands between the scores and the softmax")
        return self._operand(step[0], step[1])

    def _filled(self, expression: sympy.Expr, mask: sympy.Expr, value: Any, axes: Axes, keep_where_true: bool = False) -> sympy.Expr:
        replaced = self._operand(value, axes)
        keep = sympy.Ne(mask, 0) if keep_where_true else sympy.Eq(mask, 0)
        if replaced == -sympy.oo:
            # Minus infinity takes the pair out of the softmax altogether.
            self.mask = sympy.And(self.mask, keep)
            return expression
        return sympy.Piecewise((expression, keep), (replaced, True))


def _pair(node: fx.Node) -> tuple[Any, Any]:
    return (node.args[0], node.args[1]) if len(node.args) > 1 else (node.args[0], node.kwargs["other"])


def _branches(node: fx.Node) -> tuple[Any, Any, Any]:
    """Condition, value where it holds and value where it does not: torch.where(condition, yes, no), yes.where(condition, no)."""
    if len(node.args) != 3:
        raise NearMissError(f"{node.name} (where) names its arguments in a way this does not read")
    first, second, third = node.args
    return (second, first, third) if node.op == "call_method" else (first, second, third)
