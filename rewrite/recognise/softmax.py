"""Attention written out as a region: a softmax between two contractions."""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from rewrite.recognise.assemble import assemble, through_scale, view_undone
from rewrite.recognise.index_algebra import (
    Atom,
    Axes,
    Axis,
    back_through,
    fresh,
    leaves,
    resolve,
    unify,
)
from rewrite.recognise.operators import argument, canonical, hinted_shape, spelled
from rewrite.recognise.region import NearMissError, Region
from rewrite.recognise.score import ScoreReader, blockers, contract, find_contraction

# What may stand between the map and its contraction with the values.
_AFTER_MAP = frozenset({"dropout", "cast", "contiguous", "clone", "reshape", "transpose", "permute", "flatten", "unflatten", "expand"})


def contraction_after(softmax: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The contraction that multiplies the values by the map, and the map as it enters there."""
    stack, seen = [softmax], {softmax}
    while stack:
        node = stack.pop(0)
        for user in node.users:
            if canonical(user) in ("matmul", "einsum", "baddbmm") and node in user.all_input_nodes:
                return user, node
            if canonical(user) in _AFTER_MAP and user.args[:1] == (node,) and user not in seen:
                seen.add(user)
                stack.append(user)
    return None


def written_out_attention(softmax: fx.Node, product: fx.Node, weights: fx.Node) -> Region:
    """softmax(score(query @ key)) @ value, written out."""
    source = softmax.args[0] if softmax.args else softmax.kwargs["input"]
    assert isinstance(source, fx.Node)
    first = find_contraction(source)
    if first is None:
        stands = ", ".join(f"{node.name} ({spelled(node)})" for node in blockers(source))
        raise NearMissError(f"no contraction of queries with keys was found in front of the softmax: {stands} stands there")
    contraction = contract(first)
    shape = hinted_shape(softmax)
    axes: Axes = tuple(fresh(f"s{place}", extent) for place, extent in enumerate(shape))
    reader = ScoreReader(contraction)
    if not reader.depends(source):
        raise NearMissError("the score is not elementwise in the product of queries and keys")
    score = reader.read(source, axes)
    dim = argument(softmax, "dim")
    if not isinstance(dim, int):
        raise NearMissError("the softmax does not say its dimension")
    normalised = axes[dim if dim >= 0 else dim + len(axes)]

    second = contract(product)
    weights_axes, value, value_axes = (
        (second.left_axes, second.right, second.right_axes)
        if second.left is weights
        else (second.right_axes, second.left, second.left_axes)
    )
    if second.scale != 1 or second.added is not None:
        raise NearMissError(f"{product.name} scales or adds to what it contracts")
    dropout = _unify_map(softmax, axes, weights, weights_axes)
    contracted = set(leaves(normalised))
    if not contracted:
        raise NearMissError("the softmax runs over an axis of size one")
    if any(contracted & set(leaves(axis)) for axis in resolve(second.out)):
        raise NearMissError(f"{product.name} does not contract the axis that the softmax normalises")
    left_is_query = not any(contracted & set(axis) for axis in resolve(contraction.left_axes))
    query, query_axes, key, key_axes = (
        (contraction.left, contraction.left_axes, contraction.right, contraction.right_axes)
        if left_is_query
        else (contraction.right, contraction.right_axes, contraction.left, contraction.left_axes)
    )
    columns = tuple(leaves(normalised))
    key_set = {atom for axis in resolve(key_axes) for atom in axis}
    query_set = {atom for axis in resolve(query_axes) for atom in axis}
    value_set = {atom for axis in resolve(value_axes) for atom in axis}
    map_atoms = [atom for axis in resolve(axes) for atom in axis]
    depth = tuple(atom for axis in resolve(query_axes) for atom in axis if atom in key_set and atom not in map_atoms)
    width = tuple(
        atom for axis in resolve(second.out) for atom in axis if atom in value_set and atom not in map_atoms and atom not in contracted
    )
    channels = set(leaves((*_channels((query, query_axes), depth), *_channels((key, key_axes), depth))))
    alone = [atom for atom in map_atoms if atom in query_set and atom not in key_set and atom not in value_set]
    rows = _rows(alone, channels, contraction.out)
    lead = _batch_and_heads(contraction.lead, _leading(axes, rows, normalised), channels)
    chain = _chain(softmax, weights)
    readers = tuple(user.name for node in chain for user in node.users if user is not product and user not in chain)
    region = assemble(
        core=softmax,
        output=product,
        query=(query, query_axes),
        key=(key, key_axes),
        value=(value, value_axes),
        families=(lead, rows, columns, depth, width),
        out_axes=second.out,
        score=score.expression,
        mask=score.mask,
        tensors=score.leaves,
        dropout=dropout,
    )
    return replace(region, map_readers=readers)


def _chain(softmax: fx.Node, weights: fx.Node) -> list[fx.Node]:
    """The nodes from the softmax to the map as it is contracted."""
    chain = [weights]
    while chain[-1] is not softmax:
        previous = chain[-1].args[0]
        assert isinstance(previous, fx.Node)
        chain.append(previous)
    return chain


def _unify_map(softmax: fx.Node, axes: Axes, weights: fx.Node, weights_axes: Axes) -> float:
    """Make the map's axes at the contraction those at the softmax; returns the dropout on the way that was active."""
    dropout, node = 0.0, weights
    while node is not softmax:
        name, source = canonical(node), node.args[0]
        if name == "dropout" and argument(node, "training", True):
            dropout = max(dropout, float(argument(node, "p", 0.5)))
        if name in ("dropout", "cast") and isinstance(source, fx.Node):
            node = source
            continue
        undone = back_through(node, weights_axes)
        if undone is None:
            raise NearMissError(f"{node.name} ({spelled(node)}) stands between the softmax and the values")
        node, weights_axes = undone
    for here, there in zip(axes, weights_axes, strict=True):
        if there or not leaves(here):
            unify(here, there)
    return dropout


def _leading(axes: Axes, rows: Axis, normalised: Axis) -> Axes:
    """The map's axes at the softmax without those of queries and keys.

    A single query has no index to be told by: it stands in front of the keys.
    """
    left = [axis for axis in axes if axis is not normalised]
    places = [place for place, axis in enumerate(left) if set(rows) & set(leaves(axis))]
    del left[places[0] if places else -1]
    return tuple(left)


def _channels(operand: tuple[fx.Node, Axes], depth: Axis) -> set[Atom]:
    """The indices that channels hold beside `depth` somewhere in front of an operand, which are heads.

    Either one axis runs over both ([B, N, H * D]), or an index stands behind an axis of size one, the batch ([1, H, N, D]). Going back
    through the views also tells apart what they merged.
    """
    node, axes, _ = through_scale(*operand)
    views = [axes]
    while True:
        step = view_undone(node, axes)
        if step is None:
            break
        node, axes = step
        views.append(axes)
    inner = set(leaves(depth))
    found: set[Atom] = set()
    for view in map(resolve, views):
        found |= {atom for axis in view if inner & set(axis) for atom in axis if atom not in inner}
        if len(view) > 3 and not view[0]:
            found |= {atom for axis in view[1:-2] for atom in axis if len(view) == 4 and atom not in inner}
    return found


def _rows(alone: list[Atom], channels: set[Atom], out: Axes) -> Axis:
    """The queries' index among those that the queries alone run over: heads are there too where all share one head of keys."""
    queries = [atom for atom in leaves(tuple(alone)) if atom not in channels] or alone
    last = next((set(axis) & set(queries) for axis in reversed(resolve(out)) if set(axis) & set(queries)), set())
    return tuple(atom for atom in queries if atom in last)


def _batch_and_heads(contracted: Axes, at_softmax: Axes, channels: set[Atom]) -> Axes:
    """The map's leading axes as (batch..., heads), from wherever they stand apart: at the contraction, or at the softmax.

    Heads are what channels hold; where that does not show, the last axis, or of one axis whatever is not its slowest index.
    """
    lead = at_softmax if len(at_softmax) > len(contracted) else contracted
    atoms = tuple(atom for axis in lead for atom in leaves(axis))
    first = next((place for place, atom in enumerate(atoms) if atom in channels), len(atoms))
    if first < len(atoms) and all(atom in channels for atom in atoms[first:]):
        return (atoms[:first], atoms[first:])
    if len(lead) != 1:
        return lead
    return (atoms[:1], atoms[1:])
