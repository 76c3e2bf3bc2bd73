"""Fused attention calls as regions."""

from __future__ import annotations

import math

import sympy
import torch
from torch import fx

from rewrite.ir.expression import QK, I, J
from rewrite.recognise.assemble import Form, assemble
from rewrite.recognise.contraction import number
from rewrite.recognise.index_algebra import (
    Axes,
    Axis,
    fresh,
    leaves,
    regroup,
    size,
    unify,
)
from rewrite.recognise.operators import argument, hinted_shape, shape_of, value_of
from rewrite.recognise.reading import leaf_symbol
from rewrite.recognise.region import NearMissError, Region


def fused_attention(node: fx.Node) -> Region:
    """A `scaled_dot_product_attention` call."""
    names = ("query", "key", "value")
    given = [node.args[place] if place < len(node.args) else node.kwargs[name] for place, name in enumerate(names)]
    query, key, value = (entry for entry in given if isinstance(entry, fx.Node))
    if shape_of(key)[-2] != shape_of(value)[-2]:  # type: ignore[index]
        # Compared as sizes of the trace, which then knows that two symbols of it are one: the call itself does not say so.
        raise NearMissError("there are not as many keys as values")
    shapes = [hinted_shape(operand) for operand in (query, key, value)]
    lead = tuple(fresh("b" if place < len(shapes[0]) - 3 else "h", extent) for place, extent in enumerate(shapes[0][:-2]))
    rows, columns = fresh("i", shapes[0][-2]), fresh("j", shapes[1][-2])
    inner, width = fresh("d", shapes[0][-1]), fresh("e", shapes[2][-1])
    grouped = bool(node.kwargs.get("enable_gqa", False))

    def leading(shape: tuple[int, ...]) -> Axes:
        axes: list[Axis] = []
        for axis, extent in zip(lead[len(lead) - (len(shape) - 2) :], shape[:-2], strict=True):
            if extent == size(leaves(axis)):
                axes.append(axis)
            elif extent == 1:
                axes.append(())
            elif grouped and axis is lead[-1]:
                axes.append(_shared_heads(axis, extent))
            else:
                raise NearMissError(f"{extent} heads of keys for {size(leaves(axis))} of queries without enable_gqa")
        return tuple(axes)

    scale = node.kwargs.get("scale")
    factor = sympy.Float(1 / math.sqrt(shapes[0][-1])) if scale is None else number(scale)
    if factor is None:
        raise NearMissError("its scale is not a number")
    score, mask, extra = factor * QK, sympy.true, {}
    bias = argument(node, "attn_mask")
    if bias is not None:
        shape = hinted_shape(bias)
        map_axes = (*lead, rows, columns)[len(lead) + 2 - len(shape) :]
        extra["t0"] = (bias, tuple(axis if extent != 1 else () for axis, extent in zip(map_axes, shape, strict=True)))
        if value_of(bias).dtype == torch.bool:
            mask = sympy.Ne(leaf_symbol("t0"), 0)
        else:
            score += leaf_symbol("t0")
    if argument(node, "is_causal", False):
        mask = sympy.And(mask, J <= I)
    value_columns = fresh("j", shapes[2][-2])
    unify(columns, value_columns)
    query_axes = (*leading(shapes[0]), rows, inner)
    key_axes = (*leading(shapes[1]), columns, inner)
    return assemble(
        core=node,
        output=node,
        query=(query, query_axes),
        key=(key, key_axes),
        value=(value, (*leading(shapes[2]), value_columns, width)),
        families=(lead, rows, columns, inner, width),
        out_axes=(*lead, rows, width),
        form=Form(score=score, mask=mask, tensors=extra, dropout=_rate(node)),
    )


def _rate(node: fx.Node) -> float:
    """The dropout rate; one that is given when the graph runs is taken to be active."""
    rate = argument(node, "dropout_p", 0.0) or 0.0
    return float(rate) if isinstance(rate, int | float) else 1.0


def _shared_heads(axis: Axis, heads: int) -> Axis:
    """The axis of `heads` shared heads inside the axis of query heads: (shared, group)."""
    whole = leaves(axis)
    if len(whole) == 1:
        return regroup((whole,), (heads, whole[0].size // heads))[0]
    return whole[:1]
