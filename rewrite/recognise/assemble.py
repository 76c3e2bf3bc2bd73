"""A region from what was read: operands brought to the IR's order, factors of queries and keys moved into the score."""

from __future__ import annotations

import sympy
import torch
from sympy.logic.boolalg import Boolean
from torch import fx

from rewrite.ir.expression import INDICES, QK, tensor
from rewrite.recognise.index_algebra import (
    Axes,
    Axis,
    MismatchError,
    back_through,
    leaves,
    origin,
    resolve,
    size,
)
from rewrite.recognise.operators import canonical, hinted_shape, value_of
from rewrite.recognise.region import NearMissError, Operand, Region, is_symbolic, layout_of, reduced_layout
from rewrite.recognise.score import number


def assemble(
    core: fx.Node,
    output: fx.Node,
    query: tuple[fx.Node, Axes],
    key: tuple[fx.Node, Axes],
    value: tuple[fx.Node, Axes],
    families: tuple[Axes, Axis, Axis, Axis, Axis],
    out_axes: Axes,
    score: sympy.Expr,
    mask: Boolean,
    tensors: dict[str, tuple[fx.Node, Axes]],
    dropout: float,
) -> Region:
    """The region of an attention whose tensors and axes are given.

    families: the axes of batch and heads, of queries, keys, channels and value channels. tensors: what the score and the mask read, by the
    symbol they are written with. Raises `NearMissError` where an operand's axes do not fit the IR.
    """
    lead, rows, columns, depth, width = families
    query_node, query_axes, query_factor = through_scale(*query)
    key_node, key_axes, key_factor = through_scale(*key)
    score = sympy.expand(score.subs(QK, QK * query_factor * key_factor)) if query_factor * key_factor != 1 else score
    in_front = tuple(atom for axis in (lead[:-1] if len(lead) > 1 else lead) for atom in axis)
    located = {
        "query": origin(query_node, query_axes, (*in_front, *(lead[-1] if len(lead) > 1 else ()), *rows, *depth)),
        "key": origin(key_node, key_axes, (*in_front, *columns, *depth)),
        "value": origin(*value, (*in_front, *columns, *width)),
    }
    heads, batch = leaves(lead[-1]) if len(lead) > 1 else (), leaves(in_front)
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
    replaced: dict[sympy.Symbol, sympy.Indexed] = {}
    for name, (node, axes) in tensors.items():
        letters, layout = reduced_layout(node, axes, {"b": batch, "h": heads, "i": rows, "j": columns})
        label = ("mask" if value_of(node).dtype == torch.bool else "bias") + name.removeprefix("t")
        named[label] = Operand(node, layout)
        replaced[sympy.Symbol(name)] = tensor(label, letters) if letters else _scalar(label)
    sizes = {
        "B": size(batch), "H": size(heads), "Hkv": size(shared), "Nq": size(leaves(rows)), "Nk": size(leaves(columns)),
        "D": size(leaves(depth)), "Dv": size(leaves(width)),
    }  # fmt: skip
    order, shape = _output(out_axes, (batch, heads, rows, width), output)
    return Region(
        core=core, output=output, query=operands["query"], key=operands["key"], value=operands["value"],
        score=score.subs(replaced), mask=mask.subs(replaced) if mask is not sympy.true else mask, tensors=named, sizes=sizes,
        output_order=order, output_shape=shape, dropout=dropout,
    )  # fmt: skip


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


def _scalar(label: str) -> sympy.Indexed:
    """A tensor of one element, read along the keys by broadcasting."""
    return sympy.Indexed(sympy.IndexedBase(label, real=True), INDICES["j"])


def _output(out_axes: Axes, groups: tuple[Axis, ...], node: fx.Node) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """How the IR's result [B, H, Nq, Dv] becomes the output node: a permutation, then a shape where axes were merged or split."""
    axes = resolve(out_axes)
    wanted = [leaves(group) for group in groups]
    if all(any(axis == group for axis in axes) for group in wanted if group) and all(axis in wanted for axis in axes if axis):
        order: list[int] = []
        empty = [place for place, group in enumerate(wanted) if not group]
        for axis in axes:
            if axis:
                order.append(wanted.index(axis))
            elif empty:
                order.append(empty.pop(0))
        if len(order) == len(groups) and not empty and len(axes) == len(groups):
            return tuple(order), None
    flat_order = [atom for group in wanted for atom in group]
    flat_out = [atom for axis in axes for atom in axis]
    if flat_order != flat_out:
        raise NearMissError(f"{node.name} orders its axes in a way that is not read yet")
    if is_symbolic(node):
        raise NearMissError(f"{node.name} mixes indices in one axis while its sizes are symbolic")
    return (0, 1, 2, 3), hinted_shape(node)
