"""A region from what was read: operands brought to the IR's order, factors of queries and keys moved into the score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import sympy
import torch
from sympy.logic.boolalg import Boolean
from torch import fx

from rewrite.ir.expression import QK, TOTAL, B, H, I, J, W, read
from rewrite.ir.operations import Attend, HeadMix, Normaliser
from rewrite.recognise.channels import runs_over_channels
from rewrite.recognise.contraction import number
from rewrite.recognise.index_algebra import (
    Axes,
    Axis,
    MismatchError,
    back_through,
    exact_product,
    exact_products,
    leaves,
    origin,
    resolve,
    size,
)
from rewrite.recognise.mixing import Mixture
from rewrite.recognise.operators import Extent, canonical, value_of
from rewrite.recognise.reading import Part, leaf_symbol
from rewrite.recognise.region import Layout, Length, NearMissError, Operand, Region, exact_shape, layout_of, reading_layout, shape_in


@dataclass(frozen=True)
class Form:
    """What becomes of the product of queries and keys, in the symbols of `Attend`; leaves are named t0, t1, ... as in `tensors`."""

    score: sympy.Expr = QK
    mask: Boolean = sympy.true
    normaliser: Normaliser = "softmax"
    epsilon: float = 0.0
    sink: sympy.Expr | None = None
    weight: sympy.Expr = W
    renormalised: bool = False
    score_mixture: Mixture | None = None
    weight_mixture: Mixture | None = None
    tensors: Mapping[str, tuple[fx.Node, Axes]] = field(default_factory=dict)
    parts: Sequence[Part] = ()
    dropout: float = 0.0


def assemble(
    core: fx.Node,
    output: fx.Node,
    query: tuple[fx.Node, Axes],
    key: tuple[fx.Node, Axes],
    value: tuple[fx.Node, Axes],
    families: tuple[Axes, Axis, Axis, Axis, Axis],
    out_axes: Axes,
    form: Form,
) -> Region:
    """The region of an attention whose tensors and axes are given.

    families: the axes of batch and heads, of queries, keys, channels and value channels. Raises `NearMissError` where an operand's axes do
    not fit the IR.
    """
    lead, rows, columns, depth, width = families
    query_node, query_axes, query_factor = through_scale(*query)
    key_node, key_axes, key_factor = through_scale(*key)
    factor = query_factor * key_factor
    score = form.score if factor == 1 else sympy.expand_mul(form.score.subs(QK, QK * factor))
    in_front = tuple(atom for axis in (lead[:-1] if len(lead) > 1 else lead) for atom in axis)
    located = {
        "query": origin(query_node, query_axes, (*in_front, *(lead[-1] if len(lead) > 1 else ()), *rows, *depth)),
        "key": origin(key_node, key_axes, (*in_front, *columns, *depth)),
        "value": origin(*value, (*in_front, *columns, *width)),
    }
    heads, batch = leaves(lead[-1]) if len(lead) > 1 else (), leaves(in_front)
    batch, heads, (order, shape) = _output(out_axes, batch, heads, (rows, width), output)
    held = {name: {atom for axis in resolve(axes) for atom in axis} for name, (_, axes) in located.items()}
    for name, (node, _) in located.items():
        if not set(batch) <= held[name] or (name == "query" and not set(heads) <= held[name]):
            along = "rows of the batch" if set(batch) - held[name] else "heads"
            raise NearMissError(f"{node.name}, the {name}, is the same for several {along}")
    shared = tuple(atom for atom in heads if atom in held["key"])
    if shared != tuple(atom for atom in heads if atom in held["value"]):
        raise NearMissError("keys and values have different heads")
    if shared != heads[: len(shared)]:
        raise NearMissError("heads of queries share keys in an order other than consecutive groups")
    groups = {
        "query": (batch, heads, rows, depth),
        "key": (batch, shared, columns, depth),
        "value": (batch, shared, columns, width),
    }
    operands = {name: Operand(node, layout_of(node, axes, groups[name])) for name, (node, axes) in located.items()}
    named: dict[str, Operand] = {}
    indices: list[tuple[sympy.Expr, Axis]] = [(B, batch), (H, heads), (I, rows), (J, columns)]
    replaced: dict[sympy.Symbol, sympy.Expr] = {part.position: _index_of(part.of, indices) for part in form.parts}
    indices += [(replaced[part.position] - part.rows.start, part.axis) for part in form.parts]
    for name, (node, axes) in form.tensors.items():
        read_at, layout = reading_layout(node, axes, indices)
        label = ("mask" if value_of(node).dtype == torch.bool else "bias") + name.removeprefix("t")
        named[label] = Operand(node, layout)
        replaced[leaf_symbol(name)] = read(label, *read_at)
    attend = Attend(
        "output", "query", "key", "value",
        score=score.subs(replaced), mask=form.mask.subs(replaced) if form.mask is not sympy.true else form.mask,
        normaliser=form.normaliser, denominator=TOTAL + form.epsilon if form.epsilon else TOTAL,
        sink=None if form.sink is None else form.sink.subs(replaced),
        weight=form.weight.subs(replaced), renormalised=form.renormalised,
        score_mix=_head_mix("score", form.score_mixture, heads, named), weight_mix=_head_mix("weight", form.weight_mixture, heads, named),
    )  # fmt: skip
    axes_of = {
        "B": batch, "H": heads, "Hkv": shared, "Nq": leaves(rows), "Nk": leaves(columns), "D": leaves(depth), "Dv": leaves(width),
    }  # fmt: skip
    sizes: dict[str, int] = {name: Extent(size(axis), exact_product(axis)) for name, axis in axes_of.items()}
    channels = runs_over_channels(*located["query"], leaves(rows))
    return Region(
        core=core, output=output, query=operands["query"], key=operands["key"], value=operands["value"], attend=attend, tensors=named,
        sizes=sizes, output_order=order, output_shape=shape, dropout=form.dropout, channels=channels,
    )  # fmt: skip


def _index_of(axis: Axis, indices: list[tuple[sympy.Expr, Axis]]) -> sympy.Expr:
    for index, group in indices:
        if leaves(group) == leaves(axis):
            return index
    raise NearMissError("a part of an axis is written that is no index of the attention")


def _head_mix(where: str, mixture: Mixture | None, heads: Axis, named: dict[str, Operand]) -> HeadMix | None:
    """The mixture as the IR has it, its matrix and bias among the operands."""
    if mixture is None:
        return None
    if leaves(mixture.axis) != leaves(heads):
        raise NearMissError(f"{mixture.matrix.name} mixes something else than heads")
    named[f"{where}_mix"] = Operand(mixture.matrix, Layout(order=mixture.order, squeezed=mixture.squeezed))
    if mixture.bias is not None:
        named[f"{where}_mix_bias"] = Operand(mixture.bias, Layout(order=(0,)))
    return HeadMix(f"{where}_mix", f"{where}_mix_bias" if mixture.bias is not None else None)


def through_scale(node: fx.Node, axes: Axes) -> tuple[fx.Node, Axes, sympy.Expr]:
    """Back through views and multiplications by a number to the tensor itself, and the factor that was passed."""
    factor: sympy.Expr = sympy.Integer(1)
    while True:
        name = canonical(node)
        operands = list(node.args[:2])
        if name in ("mul", "div") and len(operands) == 2:
            numbers = [number(operand) for operand in operands]
            if numbers[1] is not None and isinstance(operands[0], fx.Node):
                factor = factor * numbers[1] if name == "mul" else factor / numbers[1]
                node = operands[0]
                continue
            if name == "mul" and numbers[0] is not None and isinstance(operands[1], fx.Node):
                factor, node = factor * numbers[0], operands[1]
                continue
        step = view_undone(node, axes)
        if step is None or not _leads_to_scale(step[0]):
            return node, axes, factor
        node, axes = step


def view_undone(node: fx.Node, axes: Axes) -> tuple[fx.Node, Axes] | None:
    """One view undone, or None where the node is no view or its axes cannot be told apart."""
    try:
        return back_through(node, axes)
    except MismatchError:
        return None


def _leads_to_scale(node: fx.Node) -> bool:
    """True where views lead back to a multiplication by a number, so that going on is worth it."""
    while True:
        name = canonical(node)
        if name in ("mul", "div"):
            return any(number(operand) is not None for operand in node.args[:2])
        if name not in ("transpose", "permute", "reshape", "contiguous", "expand", "unsqueeze", "flatten"):
            return False
        source = node.args[0]
        if not isinstance(source, fx.Node):
            return False
        node = source


def _output(
    out_axes: Axes, batch: Axis, heads: Axis, rest: tuple[Axis, Axis], node: fx.Node
) -> tuple[Axis, Axis, tuple[tuple[int, ...], tuple[Length, ...] | None]]:
    """How a result becomes the output node, and with it which of the indices that all operands share are of the batch and which of heads.

    An index is one of heads rather than of the batch where the output holds it apart from the batch (queries in between).
    """
    for count in range(len(batch), -1, -1):
        groups = (batch[:count], batch[count:] + heads, *rest)
        order = _order(out_axes, groups, node)
        if order is not None:
            return groups[0], groups[1], order
    raise NearMissError(f"{node.name} orders its axes in a way that the IR's cannot be brought to")


def _order(out_axes: Axes, groups: tuple[Axis, ...], node: fx.Node) -> tuple[tuple[int, ...], tuple[Length, ...] | None] | None:
    """How the IR's result [B, H, Nq, Dv] becomes the output node: a permutation, then a shape where axes were merged or split."""
    axes = resolve(out_axes)
    wanted = [leaves(group) for group in groups]
    order: list[int]
    if all(any(axis == group for axis in axes) for group in wanted if group) and all(axis in wanted for axis in axes if axis):
        order = []
        empty = [place for place, group in enumerate(wanted) if not group]
        for axis in axes:
            if axis:
                order.append(wanted.index(axis))
            elif empty:
                order.append(empty.pop(0))
        if len(order) == len(groups) and not empty and len(axes) == len(groups):
            return tuple(order), None
    # Otherwise the IR's axes are permuted whole, and the view merges or drops them.
    flat_out = [atom for axis in axes for atom in axis]
    held = [place for place, group in enumerate(wanted) if group]
    whole = sorted(held, key=lambda place: flat_out.index(wanted[place][0]) if wanted[place][0] in flat_out else -1)
    if [atom for place in whole for atom in wanted[place]] != flat_out:
        return None
    order = [*whole, *(place for place, group in enumerate(wanted) if not group)]
    lengths = shape_in([exact_products(wanted[place]) for place in order], exact_shape(node))
    if lengths is None:
        raise NearMissError(f"{node.name} mixes several indices of symbolic size in one axis")
    return tuple(order), lengths
