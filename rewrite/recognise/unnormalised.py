"""Attention without a softmax: query @ (key^T @ value), and weights that are a function of the scores alone.

Multiplied out, both are  sum_j s(q[i] . k[j]) v[j].  Where s is the identity a model contracts keys with values first, which is linear in
the number of tokens (Katharopoulos et al. 2020): the first contraction then runs over tokens, the second over channels.
"""

from __future__ import annotations

import torch
from torch import fx

from rewrite.ir.expression import QK, W
from rewrite.recognise.assemble import Form, assemble, view_undone
from rewrite.recognise.channels import runs_over_channels
from rewrite.recognise.contraction import CONTRACTIONS, Contraction, contract, number
from rewrite.recognise.index_algebra import Atom, Axes, Axis, fresh, leaves, resolve, unify
from rewrite.recognise.operators import argument, canonical, hinted_shape, value_of
from rewrite.recognise.region import NearMissError, Region
from rewrite.recognise.steps import contractions_behind, pair
from rewrite.recognise.streams import is_parameter, sources
from rewrite.recognise.written_out import Weights, written_out_attention


def linear_attention(node: fx.Node) -> Region | None:
    """query @ (key^T @ value), ending at the contraction, or at a division by the column of ones that was put behind the values."""
    if canonical(node) in CONTRACTIONS:
        # With ones behind the values, the division that follows is part of the attention.
        return None if _divided(node) is not None else _linear(node, node, 0.0, normalised=False)
    if canonical(node) == "div" and (split := _numerator_and_sum(node)) is not None:
        product, epsilon = split
        return _linear(product, node, epsilon, normalised=True)
    return None


def _linear(product: fx.Node, output: fx.Node, epsilon: float, normalised: bool) -> Region | None:
    outer = contract(product)
    for operand in (outer.right, outer.left):
        state_axes, query, query_axes = outer.other(operand)
        behind = _through_views(operand, state_axes)
        if behind is not None and query is not operand:
            break
    else:
        return None
    first, first_axes = behind
    inner = contract(first)
    if outer.scale != 1 or inner.scale != 1 or outer.added is not None or inner.added is not None:
        return None
    for there, here in zip(inner.out, first_axes, strict=True):
        if here or not leaves(there):
            unify(there, here)
    channels = _contracted(outer, query_axes)
    left_is_key = bool(channels & _atoms(inner.left_axes))
    key = (inner.left, inner.left_axes) if left_is_key else (inner.right, inner.right_axes)
    value = (inner.right, inner.right_axes) if left_is_key else (inner.left, inner.left_axes)
    if not channels or not all(_is_activation(operand) for operand in (query, key[0], value[0])):
        return None
    tokens = _contracted(inner, inner.left_axes)
    depth = tuple(atom for axis in resolve(key[1]) for atom in axis if atom in channels)
    columns = tuple(atom for axis in resolve(key[1]) for atom in axis if atom in tokens)
    width_atoms = _atoms(value[1]) - _atoms(key[1])
    rows_atoms = _atoms(query_axes) - _atoms(key[1]) - _atoms(value[1])
    if not runs_over_channels(key[0], key[1], depth):
        return None  # maps of rows and of columns multiply a picture so, and neither attends
    out = resolve(outer.out)
    width = tuple(atom for axis in out for atom in axis if atom in width_atoms)
    # Heads that share keys are the queries' own, as their tokens are; tokens are the last of them in the result.
    places = [axis for axis in out if set(axis) & rows_atoms and not set(axis) & set(width)]
    rows: Axis = places[-1] if places else ()
    others = [axis for axis in out if not set(axis) & (set(rows) | set(width))]
    del others[len(out) - 2 :]  # axes of one token or one channel
    lead = tuple(others)
    out_axes: Axes = outer.out
    if normalised:
        ones = _without_ones(value)
        if ones is None:
            return None
        value, width, out_axes = ones[0], ones[1], tuple(ones[1] if set(leaves(axis)) & set(width) else axis for axis in outer.out)
    form = Form(score=QK, normaliser="sum" if normalised else "none", epsilon=epsilon, weight=W)
    return assemble(output, output, (query, query_axes), key, value, (_two(lead), rows, columns, depth, width), out_axes, form)


def _two(lead: Axes) -> Axes:
    """Leading axes as (batch..., heads): a single one is the batch."""
    return lead if len(lead) > 1 else (*lead, ())


def _through_views(node: fx.Node, axes: Axes) -> tuple[fx.Node, Axes] | None:
    """The contraction that an operand is, behind views and casts, and its axes."""
    while canonical(node) not in CONTRACTIONS:
        if canonical(node) == "cast" and isinstance(node.args[0], fx.Node):
            node = node.args[0]
            continue
        step = view_undone(node, axes)
        if step is None:
            return None
        node, axes = step
    return node, axes


def _atoms(axes: Axes) -> set[Atom]:
    return {atom for axis in resolve(axes) for atom in axis}


def _contracted(contraction: Contraction, operand_axes: Axes) -> set[Atom]:
    return _atoms(operand_axes) - _atoms(contraction.out)


def _is_activation(node: fx.Node) -> bool:
    return not is_parameter(node) and bool(sources(node))


def _slice_of(node: object) -> tuple[fx.Node, slice] | None:
    """(x, s) where the node is x[..., s]."""
    if not isinstance(node, fx.Node) or canonical(node) != "getitem" or not isinstance(node.args[1], tuple):
        return None
    source, entries = node.args[0], node.args[1]
    assert isinstance(source, fx.Node)
    whole = all(entry is Ellipsis or entry == slice(None) for entry in entries[:-1])
    reaches = Ellipsis in entries[:-1] or len(entries) == len(hinted_shape(source))
    return (source, entries[-1]) if whole and reaches and isinstance(entries[-1], slice) else None


def _numerator_and_sum(node: fx.Node) -> tuple[fx.Node, float] | None:
    """(x, epsilon) where the node is x[..., :-1] / (x[..., -1:] + epsilon)."""
    above, below = pair(node)
    epsilon = 0.0
    if isinstance(below, fx.Node) and canonical(below) == "add" and (added := number(pair(below)[1])) is not None:
        epsilon, below = float(added), below.args[0]
    numerator, divisor = _slice_of(above), _slice_of(below)
    if numerator is None or divisor is None or numerator[0] is not divisor[0]:
        return None
    product, extent = numerator[0], hinted_shape(numerator[0])[-1]
    if range(extent)[numerator[1]] != range(extent - 1) or range(extent)[divisor[1]] != range(extent - 1, extent):
        return None
    while canonical(product) == "cast" and isinstance(product.args[0], fx.Node):
        product = product.args[0]
    return (product, epsilon) if canonical(product) in CONTRACTIONS else None


def _divided(product: fx.Node) -> fx.Node | None:
    """The division that normalises a product with ones behind its values."""
    for user in product.users:
        for later in (user, *user.users):
            for division in later.users if canonical(later) == "getitem" else ():
                if canonical(division) == "div" and _numerator_and_sum(division) is not None:
                    return division
    return None


def _without_ones(value: tuple[fx.Node, Axes]) -> tuple[tuple[fx.Node, Axes], Axis] | None:
    """The values in front of pad(value, (0, 1), value=1), and the index of their channels."""
    node, axes = value
    while canonical(node) in ("cast", "contiguous"):
        node = node.args[0]  # type: ignore[assignment]
    if canonical(node) != "pad" or tuple(argument(node, "pad")) != (0, 1) or argument(node, "value") != 1:
        return None
    source = node.args[0]
    assert isinstance(source, fx.Node)
    channels = fresh("value", hinted_shape(source)[-1])
    return (source, (*axes[:-1], channels)), channels


def quadratic_attention(node: fx.Node) -> Region | None:
    """f(score(query @ key)) @ value with an elementwise f: sigmoid, ReLU and squared attention, or no function at all."""
    if canonical(node) not in CONTRACTIONS:
        return None
    for entering in node.all_input_nodes[:2]:
        if canonical(entering) in CONTRACTIONS or not isinstance(value_of(entering), torch.Tensor):
            continue
        first = next(contractions_behind(entering), None)
        if first is None or not all(_is_activation(operand) for operand in (*first.all_input_nodes[:2], *node.all_input_nodes[:2])):
            continue
        weights = Weights(entering, entering, _map_dim(node, entering), "none")
        return written_out_attention(weights, node, entering)
    return None


def _map_dim(product: fx.Node, entering: fx.Node) -> int:
    """The axis of the map that the product contracts."""
    found = contract(product)
    axes, _, _ = found.other(entering)
    out = _atoms(found.out)
    dims = [place for place, axis in enumerate(axes) if leaves(axis) and not set(leaves(axis)) & out]
    if len(dims) != 1:
        raise NearMissError(f"{product.name} contracts {len(dims)} axes of the map")
    return dims[0]
