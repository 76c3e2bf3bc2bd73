"""Reading an expression off the graph: from a node back to the one it is computed from, element by element.

A score is read so from the normaliser's input back to the product of queries and keys, and a weight from the contraction with the values
back to the normaliser. Everything else that is met is a leaf: a tensor that the expression reads, with the indices it runs over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from sympy.logic.boolalg import Boolean
from torch import fx

from rewrite.ir.expression import W
from rewrite.recognise.contraction import broadcast, number
from rewrite.recognise.index_algebra import Axes, Axis, MismatchError, back_through, fresh, leaves, size, unify
from rewrite.recognise.mixing import Mixture, mixing
from rewrite.recognise.operators import argument, canonical, hinted_shape, spelled, value_of
from rewrite.recognise.region import NearMissError
from rewrite.recognise.steps import (
    BOUNDS,
    FUNCTIONS,
    MIXES,
    OPERATORS,
    UNCHANGED,
    Total,
    branches,
    is_step,
    pair,
    slices,
    summed,
)

# What reads a tensor's shape and type and none of its numbers.
_SHAPE_ONLY = frozenset({"full_like", "zeros_like", "ones_like", "empty_like", "new_full", "new_zeros", "new_ones", "new_empty"})

# Stands for what is subtracted from every score of a query alike: no softmax changes by it.
SHIFT = sympy.Symbol("shift", real=True)
# Stands for the heads' mixture that `Mixture.inner` goes into.
MIXED = sympy.Symbol("mixed", real=True)


def leaf_symbol(name: str) -> sympy.Symbol:
    """What a leaf is written with until it is known which indices it runs over."""
    return sympy.Symbol(name, real=True)


@dataclass
class Joined:
    """Scores with one more logit on the normalised axis: whole is that axis, keys the part of it that keys have, from `start` on."""

    whole: Axis
    keys: Axis
    start: int
    scores: sympy.Expr
    sink: sympy.Expr

    def rows(self, extent: int) -> range:
        """The positions of the keys among all `extent` logits."""
        return range(self.start, self.start + extent - 1)


@dataclass(frozen=True)
class Part:
    """A slice of an axis, as an index of its own: axis counts from rows.start on; position is written for the index `of`."""

    of: Axis
    axis: Axis
    rows: range
    position: sympy.Symbol


@dataclass
class ExpressionReader:
    """Reads the expression between one node and a later one.

    base, axes, expression: where it begins, the indices there, and what it is written as. normalised: the axis that the expression is
    normalised over afterwards, where one is. leaves: what was read, by name; shared between the readers of one region.
    """

    base: fx.Node
    axes: Axes
    expression: sympy.Expr
    leaves: dict[str, tuple[fx.Node, Axes]]
    normalised: Axis | None = None
    joined: Joined | None = None
    mask: Boolean = sympy.true
    mixture: Mixture | None = None
    parts: list[Part] = field(default_factory=list)
    renormalised: bool = False
    dropout: float = 0.0
    _depends: dict[fx.Node, bool] = field(default_factory=dict)

    def read(self, node: fx.Node, axes: Axes) -> sympy.Expr:
        """The expression at `node`, whose axes are given; they are unified with those of the base on arrival."""
        return self._operand(node, axes)

    def depends(self, node: fx.Node) -> bool:
        """True where the node is computed from the base by what an expression may be made of."""
        if node is self.base:
            return True
        if node not in self._depends:
            self._depends[node] = False
            self._depends[node] = is_step(node) and any(self.depends(source) for source in node.all_input_nodes)
        return self._depends[node]

    def _computed_from_base(self, node: fx.Node) -> bool:
        """True where a tensor comes from the base by anything else than what an expression may be made of."""
        stack, seen = [node], {node}
        while stack:
            current = stack.pop()
            if current is self.base:
                return True
            if spelled(current) in _SHAPE_ONLY or not isinstance(value_of(current), torch.Tensor | tuple | list):
                continue
            earlier = [source for source in current.all_input_nodes if source not in seen and not source < self.base]
            seen.update(earlier)
            stack += earlier
        return False

    def leaf(self, node: fx.Node, axes: Axes) -> sympy.Symbol:
        """The symbol of a tensor read with the given indices."""
        for name, (known, its_axes) in self.leaves.items():
            if known is node and [leaves(axis) for axis in its_axes] == [leaves(axis) for axis in axes]:
                return leaf_symbol(name)
        name = f"t{len(self.leaves)}"
        self.leaves[name] = (node, axes)
        return leaf_symbol(name)

    def _operand(self, value: Any, axes: Axes) -> sympy.Expr:
        constant = number(value)
        if constant is not None:
            return constant
        if not isinstance(value, fx.Node):
            raise NearMissError(f"{value!r} in the score is neither a tensor nor a number")
        if not isinstance(value_of(value), torch.Tensor):
            raise NearMissError(f"{value.name} in the score is a size, not a tensor or a number")
        aligned = broadcast(axes, hinted_shape(value))
        if self.depends(value):
            return self._expression(value, aligned)
        if self._computed_from_base(value):
            if self.normalised is not None and not set(leaves(self.normalised)) & {atom for axis in aligned for atom in leaves(axis)}:
                return SHIFT
            raise NearMissError(f"{value.name} ({spelled(value)}) computes a part of the score from the scores themselves")
        return self.leaf(value, aligned)

    def _expression(self, node: fx.Node, axes: Axes) -> sympy.Expr:
        if node is self.base:
            for here, there in zip(axes, self.axes, strict=True):
                if here or not leaves(there):
                    unify(there, here)
            return self.expression
        name = canonical(node)
        if name == "dropout" and argument(node, "training", True):
            rate = argument(node, "p", 0.5)
            self.dropout = max(self.dropout, float(rate) if isinstance(rate, int | float) else 1.0)
        if name in UNCHANGED:
            return self._operand(node.args[0], axes)
        if name == "div" and self.expression == W and (total := summed(pair(node)[1])) is not None and total.of is pair(node)[0]:
            return self._renormalised(node, total, axes)
        if name in OPERATORS:
            left, right = pair(node)
            return OPERATORS[name](self._operand(left, axes), self._times(node, self._operand(right, axes)))
        if name in FUNCTIONS:
            return FUNCTIONS[name](self._operand(node.args[0], axes))
        if name in BOUNDS:
            return self._bounded(node, axes)
        if name == "masked_fill":
            source, mask, value = node.args[0], node.args[1], node.args[2] if len(node.args) > 2 else node.kwargs["value"]
            return self._filled(self._operand(source, axes), self._operand(mask, axes), value, axes)
        if name == "where":
            condition, yes, no = branches(node)
            if isinstance(yes, fx.Node) and self.depends(yes):
                return self._filled(self._operand(yes, axes), self._operand(condition, axes), no, axes, keep_where_true=True)
            return self._filled(self._operand(no, axes), self._operand(condition, axes), yes, axes)
        if name in MIXES or name == "einsum":
            return self._mixed(node, axes)
        if name == "cat":
            return self._with_sink(node, axes)
        if name == "assigned":
            return self._assigned(node, axes)
        if name == "getitem" and (taken := slices(node.args[1], hinted_shape(node.all_input_nodes[0]))) is not None:
            return self._part(node, axes, taken)
        return self._viewed(node, axes)

    def _viewed(self, node: fx.Node, axes: Axes) -> sympy.Expr:
        try:
            step = back_through(node, axes)
        except MismatchError as error:
            raise NearMissError(f"{node.name}: {error}") from None
        if step is None:
            raise NearMissError(f"{node.name} ({spelled(node)}) stands between the scores and the softmax")
        return self._operand(step[0], step[1])

    def _times(self, node: fx.Node, right: sympy.Expr) -> sympy.Expr:
        """The second operand of a sum, times the `alpha` it may be given."""
        factor = number(node.kwargs.get("alpha", 1))
        if factor is None:
            raise NearMissError(f"{node.name} takes a factor that is not a number")
        return right if factor == 1 else right * factor

    def _bounded(self, node: fx.Node, axes: Axes) -> sympy.Expr:
        expression = self._operand(node.args[0], axes)
        for name in BOUNDS[canonical(node)]:
            bound = argument(node, name)
            if bound is not None:
                expression = (sympy.Max if name == "min" else sympy.Min)(expression, self._operand(bound, axes))
        return expression

    def _filled(self, expression: sympy.Expr, mask: sympy.Expr, value: Any, axes: Axes, keep_where_true: bool = False) -> sympy.Expr:
        replaced = self._operand(value, axes)
        keep = sympy.Ne(mask, 0) if keep_where_true else sympy.Eq(mask, 0)
        if replaced == -sympy.oo:
            # Minus infinity takes the pair out of the softmax altogether.
            self.mask = sympy.And(self.mask, keep)
            return expression
        return sympy.Piecewise((expression, keep), (replaced, True))

    def _renormalised(self, node: fx.Node, total: Total, axes: Axes) -> sympy.Expr:
        """x / x.sum(over the keys), of what became of the normalised weights."""
        expression = self._operand(total.of, axes)
        if self.normalised is None or leaves(axes[total.dim]) != leaves(self.normalised) or total.epsilon != 0:
            raise NearMissError(f"{node.name} (div) divides the weights by a sum that is not the one over the keys")
        self.renormalised = True
        return expression

    def _mixed(self, node: fx.Node, axes: Axes) -> sympy.Expr:
        """A linear map over heads: in the IR heads before and after it are one index."""
        if self.mixture is not None:
            raise NearMissError(f"{node.name} mixes heads a second time")
        mixture, source, its_axes = mixing(node, axes, self.depends)
        self.mixture = mixture
        mixture.inner = self._operand(source, its_axes)
        return MIXED

    def _with_sink(self, node: fx.Node, axes: Axes) -> sympy.Expr:
        """cat([scores, logit]) along the normalised axis: one more logit, without a key."""
        parts, dim = list(argument(node, "tensors", node.args[0])), argument(node, "dim", 0)
        places = [place for place, part in enumerate(parts) if self.depends(part)]
        dim = dim + len(axes) if dim < 0 else dim
        whole = axes[dim]
        if len(parts) != 2 or len(places) != 1 or self.normalised is None or leaves(whole) != leaves(self.normalised):
            raise NearMissError(f"{node.name} (cat) stands between the scores and the softmax")
        scores, sink = parts[places[0]], parts[1 - places[0]]
        if hinted_shape(sink)[dim] != 1:
            raise NearMissError(f"{node.name} (cat) joins {hinted_shape(sink)[dim]} more logits to the scores; one is read")
        keys = fresh("key", hinted_shape(scores)[dim])
        logit = self._operand(sink, (*axes[:dim], (), *axes[dim + 1 :]))
        read = self._operand(scores, (*axes[:dim], keys, *axes[dim + 1 :]))
        self.joined = Joined(whole, keys, places[0], read, logit)
        return read

    def _part(self, node: fx.Node, axes: Axes, taken: Sequence[range]) -> sympy.Expr:
        """x[..., :-1], the weights of the keys alone; or x[:, 1:] inside of what is assigned to that part."""
        source = node.args[0]
        assert isinstance(source, fx.Node)
        before: list[Axis] = []
        for axis, rows, extent in zip(axes, taken, hinted_shape(source), strict=True):
            if len(rows) == extent:
                before.append(axis)
            elif self.joined is not None and extent == size(leaves(self.joined.whole)) and rows == self.joined.rows(extent):
                unify(self.joined.keys, axis)
                before.append(self.joined.whole)
            elif (part := next((part for part in self.parts if part.rows == rows and leaves(part.axis) == leaves(axis)), None)) is not None:
                before.append(part.of)
            else:
                raise NearMissError(f"{node.name} (getitem) takes a part of the scores or of the map")
        return self._operand(source, tuple(before))

    def _assigned(self, node: fx.Node, axes: Axes) -> sympy.Expr:
        """x with a value at a part of it: one expression there, another elsewhere."""
        target, index, value = node.args
        assert isinstance(target, fx.Node)
        shape = hinted_shape(target)
        taken = slices(index, shape)
        if taken is None:
            raise NearMissError(f"{node.name} assigns to something else than slices")
        inside: list[Axis] = []
        holds: list[Boolean] = []
        for axis, rows, extent in zip(axes, taken, shape, strict=True):
            if len(rows) == extent:
                inside.append(axis)
                continue
            part = Part(axis, fresh("part", len(rows)), rows, sympy.Symbol(f"p{len(self.parts)}", integer=True, nonnegative=True))
            self.parts.append(part)
            inside.append(part.axis)
            holds += [part.position >= rows.start] if rows.start else []
            holds += [part.position < rows.stop] if rows.stop != extent else []
        elsewhere = self._operand(target, axes)
        there = self._operand(value, tuple(inside))
        more = sympy.expand_mul(there - elsewhere)
        if not more.has(*self.expression.free_symbols):
            return elsewhere + sympy.Piecewise((more, sympy.And(*holds)), (0, True))
        return sympy.Piecewise((there, sympy.And(*holds)), (elsewhere, True))
