"""From a normaliser outward to a region: softmax between two contractions, or a fused attention call."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import sympy
import torch
from sympy.logic.boolalg import Boolean
from torch import fx

from rewrite.ir.expression import INDICES, QK, I, J, tensor
from rewrite.recognise.index_algebra import (
    Atom,
    Axes,
    Axis,
    MismatchError,
    back_through,
    fresh,
    leaves,
    origin,
    regroup,
    resolve,
    size,
    unify,
)
from rewrite.recognise.operators import argument, canonical, hinted_shape, module_path, spelled, value_of
from rewrite.recognise.region import NearMissError, Operand, Region, is_symbolic, layout_of, reduced_layout
from rewrite.recognise.score import ScoreReader, blockers, contract, find_contraction, number

# What may stand between the map and its contraction with the values.
_AFTER_MAP = frozenset({"dropout", "cast", "contiguous", "clone", "reshape", "transpose", "permute", "flatten", "unflatten", "expand"})


@dataclass(frozen=True)
class NearMiss:
    """A softmax that feeds a contraction, or a call named attention, that was not recognised: where, and what did not fit first."""

    node: str
    module: str
    reason: str


def find_regions(graph: fx.Graph) -> tuple[list[Region], list[NearMiss]]:
    """Every attention of a graph in program order, and what looked like one."""
    regions: list[Region] = []
    misses: list[NearMiss] = []
    for node in graph.nodes:
        name = canonical(node)
        try:
            if name == "attention":
                regions.append(_fused(node))
            elif name == "softmax" and isinstance(value_of(node), torch.Tensor):
                product = _contraction_after(node)
                if product is not None:
                    regions.append(_spelt_out(node, *product))
            elif not name and node.op.startswith("call") and "attention" in spelled(node).lower():
                raise NearMissError(f"{spelled(node)} is an attention call this does not read")
        except (NearMissError, MismatchError) as error:
            misses.append(NearMiss(node.name, module_path(node), str(error)))
    return regions, misses


def _fused(node: fx.Node) -> Region:
    """A `scaled_dot_product_attention` call."""
    names = ("query", "key", "value")
    given = [node.args[place] if place < len(node.args) else node.kwargs[name] for place, name in enumerate(names)]
    query, key, value = (entry for entry in given if isinstance(entry, fx.Node))
    shapes = [hinted_shape(operand) for operand in (query, key, value)]
    if min(map(len, shapes)) < 3:
        raise NearMissError("it is called without a batch axis")
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
            mask = sympy.Ne(sympy.Symbol("t0"), 0)
        else:
            score += sympy.Symbol("t0")
    if argument(node, "is_causal", False):
        mask = sympy.And(mask, J <= I)
    query_axes = (*leading(shapes[0]), rows, inner)
    key_axes = (*leading(shapes[1]), columns, inner)
    return _assemble(
        core=node,
        output=node,
        query=(query, query_axes),
        key=(key, key_axes),
        value=(value, (*leading(shapes[2]), columns, width)),
        families=(lead, rows, columns, inner, width),
        out_axes=(*lead, rows, width),
        score=score,
        mask=mask,
        tensors=extra,
        dropout=float(argument(node, "dropout_p", 0.0) or 0.0),
    )


def _shared_heads(axis: Axis, heads: int) -> Axis:
    """The axis of `heads` shared heads inside the axis of query heads: (shared, group)."""
    whole = leaves(axis)
    if len(whole) == 1:
        return regroup((whole,), (heads, whole[0].size // heads))[0]
    return whole[:1]


def _contraction_after(softmax: fx.Node) -> tuple[fx.Node, fx.Node] | None:
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


def _spelt_out(softmax: fx.Node, product: fx.Node, weights: fx.Node) -> Region:
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
    dim = argument(softmax, "dim", -1)
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
    region = _assemble(
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
    node, axes, _ = _through_scale(*operand)
    views = [axes]
    while True:
        step = _safe_back(node, axes)
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


def _through_scale(node: fx.Node, axes: Axes) -> tuple[fx.Node, Axes, sympy.Expr]:
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
        step = _safe_back(node, axes)
        if step is None or not _leads_to_scale(step[0]):
            return node, axes, factor
        node, axes = step


def _safe_back(node: fx.Node, axes: Axes) -> tuple[fx.Node, Axes] | None:
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


def _assemble(
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
    lead, rows, columns, depth, width = families
    query_node, query_axes, query_factor = _through_scale(*query)
    key_node, key_axes, key_factor = _through_scale(*key)
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


def interior(region: Region) -> Iterator[fx.Node]:
    """The nodes from the operands (exclusive) to the output (inclusive), in reverse order of need."""
    stop = {operand.node for operand in region.operands().values()}
    stack, seen = [region.output], {region.output}
    while stack:
        node = stack.pop()
        yield node
        for source in node.all_input_nodes:
            if source not in stop and source not in seen:
                seen.add(source)
                stack.append(source)
