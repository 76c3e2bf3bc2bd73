"""Attention written out as a region: weights, made of scores and normalised or not, between two contractions."""

from __future__ import annotations

from dataclasses import dataclass, replace

import sympy
import torch
from torch import fx

from rewrite.ir.expression import QK, W
from rewrite.ir.operations import Normaliser
from rewrite.recognise.assemble import Form, assemble, through_scale, view_undone
from rewrite.recognise.contraction import CONTRACTIONS, Contraction, contract
from rewrite.recognise.index_algebra import Atom, Axes, Axis, MismatchError, fresh, leaves, resolve
from rewrite.recognise.operators import argument, canonical, hinted_shape, spelled, value_of
from rewrite.recognise.reading import MIXED, SHIFT, ExpressionReader
from rewrite.recognise.region import NearMissError, Region
from rewrite.recognise.steps import blockers, contractions_behind, is_step, pair, summed


@dataclass(frozen=True)
class Weights:
    """Where scores become weights.

    node: holds the weights. source: holds the scores. dim: the axis they are normalised over. kind, epsilon: as in `Attend`.
    """

    node: fx.Node
    source: fx.Node
    dim: int
    kind: Normaliser
    epsilon: float = 0.0


def normalised_weights(node: fx.Node) -> Weights | None:
    """The weights that a node holds, where it is a softmax, in one call or written out, or a division by a sum."""
    name = canonical(node)
    if not isinstance(value_of(node), torch.Tensor):
        return None
    if name == "softmax":
        return _softmax(node, node)
    if name == "exp" and isinstance(node.args[0], fx.Node) and canonical(node.args[0]) == "log_softmax":
        return _softmax(node, node.args[0])
    if name == "div":
        total = summed(pair(node)[1])
        if total is not None and total.of is pair(node)[0] and next(contractions_behind(total.of), None) is not None:
            return Weights(node, total.of, total.dim, "sum", total.epsilon)
    return None


def _softmax(node: fx.Node, call: fx.Node) -> Weights:
    source = call.args[0] if call.args else call.kwargs["input"]
    assert isinstance(source, fx.Node)
    rank = len(hinted_shape(call))
    dim = argument(call, "dim")
    if not isinstance(dim, int):
        dim = 0 if rank in (0, 1, 3) else 1  # torch's own rule where none is given
    return Weights(node, source, dim % rank, "softmax")


def contraction_after(weights: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The contraction that multiplies the values by the map, and the map as it enters there."""
    stack, seen = [weights], {weights}
    while stack:
        node = stack.pop(0)
        for user in node.users:
            if canonical(user) in CONTRACTIONS and node in user.all_input_nodes and not _mixes_heads(user, node):
                return user, node
            if user not in seen and is_step(user) and isinstance(value_of(user), torch.Tensor):
                seen.add(user)
                stack.append(user)
    return None


def _mixes_heads(product: fx.Node, weights: fx.Node) -> bool:
    """True for an einsum of the map with a matrix: it mixes heads, and the values are met later."""
    others = [node for node in product.all_input_nodes if node is not weights]
    return canonical(product) == "einsum" and len(others) == 1 and len(hinted_shape(others[0])) == 2


def written_out_attention(weights: Weights, product: fx.Node, entering: fx.Node) -> Region:
    """weights(score(query @ key)) @ value, written out; `entering` is the map as the product reads it.

    Where the score is computed from several contractions, the first that it can be read from is the product of queries and keys.
    """
    failure: Exception | None = None
    for first in contractions_behind(weights.source):
        try:
            return _attention(weights, product, entering, first)
        except (NearMissError, MismatchError) as error:
            failure = failure or error
    if failure is not None:
        raise failure
    stands = ", ".join(f"{node.name} ({spelled(node)})" for node in blockers(weights.source))
    raise NearMissError(f"no contraction of queries with keys was found in front of the softmax: {stands} stands there")


def _attention(weights: Weights, product: fx.Node, entering: fx.Node, first: fx.Node) -> Region:
    contraction = contract(first)
    axes: Axes = tuple(fresh(f"s{place}", extent) for place, extent in enumerate(hinted_shape(weights.node)))
    normalised = axes[weights.dim]
    scores = ExpressionReader(first, contraction.out, contraction.scale * QK, {}, normalised)
    if contraction.added is not None:
        bias, bias_axes, beta = contraction.added
        scores.expression += beta * scores.leaf(bias, bias_axes)
    if not scores.depends(weights.source):
        raise NearMissError("the score is not elementwise in the product of queries and keys")
    score, kind = scores.read(weights.source, axes), weights.kind
    if kind == "sum" and weights.epsilon == 0 and isinstance(score, sympy.exp):
        score, kind = score.args[0], "softmax"  # written out as exp and sum
    score = _unshifted(score, scores, kind)
    if scores.dropout:
        raise NearMissError("dropout is applied to the scores, in front of the softmax")
    keys = normalised if scores.joined is None else scores.joined.keys

    second = contract(product)
    map_axes, value, value_axes = second.other(entering)
    if second.scale != 1 or second.added is not None:
        raise NearMissError(f"{product.name} scales or adds to what it contracts")
    after = ExpressionReader(weights.node, axes, W, scores.leaves, normalised, scores.joined)
    weight = after.read(entering, map_axes)
    if scores.joined is not None and not set(leaves(scores.joined.keys)) & {atom for axis in resolve(map_axes) for atom in axis}:
        raise NearMissError("the logit that was joined to the scores is not taken off the map again")
    contracted = set(leaves(keys))
    if not contracted:
        raise NearMissError("the softmax runs over an axis of size one")
    if any(contracted & set(leaves(axis)) for axis in resolve(second.out)):
        raise NearMissError(f"{product.name} does not contract the axis that the softmax normalises")
    axes = tuple(keys if axis is normalised else axis for axis in axes)
    families, query, key = _families(contraction, second, axes, keys, (value, value_axes))
    form = Form(
        score=score if scores.mixture is None else scores.mixture.inner,
        mask=scores.mask,
        normaliser=kind,
        epsilon=weights.epsilon,
        sink=None if scores.joined is None else scores.joined.sink,
        weight=weight.subs(MIXED, W),
        renormalised=after.renormalised,
        score_mixture=scores.mixture,
        weight_mixture=after.mixture,
        tensors=scores.leaves,
        parts=(*scores.parts, *after.parts),
        dropout=after.dropout,
    )
    if after.mixture is not None and after.mixture.inner != W:
        raise NearMissError("the weights are changed before their heads are mixed")
    region = assemble(weights.node, product, query, key, (value, value_axes), families, second.out, form)
    interior = _between(weights.node, entering)
    readers = {
        user.name for node in interior for user in node.users if user is not product and user not in interior and not _reads_shape(user)
    }
    return replace(region, map_readers=tuple(sorted(readers)))


def _unshifted(expression: sympy.Expr, reader: ExpressionReader, kind: Normaliser) -> sympy.Expr:
    """The score without what is subtracted from every score of a query alike, which no softmax notices."""
    if expression.has(SHIFT):
        expression = sympy.expand_mul(expression)
        terms = sympy.Add.make_args(expression)
        shifts = [term for term in terms if term.has(SHIFT)]
        if kind != "softmax" or any(term.free_symbols - {SHIFT} for term in shifts):
            raise NearMissError("the score is computed from a reduction of the scores themselves")
        expression = sympy.Add(*(term for term in terms if term not in shifts))
    if reader.joined is not None and expression != _plain(reader.joined.scores):
        raise NearMissError("the scores are changed after a logit was joined to them")
    if reader.mixture is not None and expression != MIXED:
        raise NearMissError("the scores are changed after their heads were mixed")
    return expression


def _plain(expression: sympy.Expr) -> sympy.Expr:
    return sympy.expand_mul(expression) if expression.has(SHIFT) else expression


def _between(first: fx.Node, last: fx.Node) -> set[fx.Node]:
    """The nodes from the weights to the map as it is contracted, through which the latter is computed from the former."""
    needed: set[fx.Node] = {last}
    stack = [last]
    while stack:
        for source in stack.pop().all_input_nodes:
            if source not in needed and not source < first:
                needed.add(source)
                stack.append(source)
    reached = {first}
    for node in sorted(needed):
        if any(source in reached for source in node.all_input_nodes):
            reached.add(node)
    return reached & (needed | {first})


def _reads_shape(node: fx.Node) -> bool:
    return isinstance(value_of(node), int | torch.SymInt | torch.Size | torch.dtype | torch.device)


def _families(
    contraction: Contraction, second: Contraction, axes: Axes, keys: Axis, value: tuple[fx.Node, Axes]
) -> tuple[tuple[Axes, Axis, Axis, Axis, Axis], tuple[fx.Node, Axes], tuple[fx.Node, Axes]]:
    """The axes of batch and heads, queries, keys, channels and value channels; queries and keys with their axes."""
    contracted = set(leaves(keys))
    left_is_query = not any(contracted & set(axis) for axis in resolve(contraction.left_axes))
    left, right = (contraction.left, contraction.left_axes), (contraction.right, contraction.right_axes)
    query, key = (left, right) if left_is_query else (right, left)
    columns = tuple(leaves(keys))
    held = [{atom for axis in resolve(operand[1]) for atom in axis} for operand in (query, key, value)]
    query_set, key_set, value_set = held
    map_atoms = [atom for axis in resolve(axes) for atom in axis]
    depth = tuple(atom for axis in resolve(query[1]) for atom in axis if atom in key_set and atom not in map_atoms)
    width = tuple(
        atom for axis in resolve(second.out) for atom in axis if atom in value_set and atom not in map_atoms and atom not in contracted
    )
    channels = set(leaves((*_channels(query, depth), *_channels(key, depth))))
    alone = [atom for atom in map_atoms if atom in query_set and atom not in key_set and atom not in value_set]
    rows = _rows(alone, channels, contraction.out)
    lead = _batch_and_heads(contraction.lead, _leading(axes, rows, keys), channels)
    return (lead, rows, columns, depth, width), query, key


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

    Either one axis runs over both ([B, N, H * D]), or, where that is nowhere so, an index stands behind a batch of one ([1, H, N, D]).
    Going back through the views also tells apart what they merged.
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
    resolved = [resolve(view) for view in views]
    beside = {atom for view in resolved for axis in view if inner & set(axis) for atom in axis if atom not in inner}
    behind_batch = (view[1] for view in resolved if len(view) == 4 and not view[0] and inner in (set(view[-1]), set(view[-2])))
    return beside or {atom for axis in behind_batch for atom in axis if atom not in inner}


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
