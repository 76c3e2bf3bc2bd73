"""What a mask tensor hides, by evaluating the part of the graph that builds it on the inputs the model was traced with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch._functorch.predispatch import _vmap_decrement_nesting, _vmap_increment_nesting

from rewrite.ir.expression import conjuncts, tensors_in
from rewrite.ir.semantics import all_positions, evaluate_expression, positions, read_at
from rewrite.recognise.call_sizes import CallSizes
from rewrite.recognise.operators import canonical, hint, shape_of, value_of
from rewrite.recognise.region import Region
from rewrite.recognise.writes import written_by
from rewrite.tokens.placement import storages_of

# A mask is made of positions, comparisons and lookups; a subgraph with one of these computes with activations and is no mask.
_COMPUTES = frozenset({"linear", "conv", "matmul", "einsum", "baddbmm", "softmax", "attention", "layer_norm"})
# Building a mask takes a few dozen operators; a longer way back is something else.
_LONGEST = 300
# An additive mask hides a key where it adds this or less: e^-1e4 is zero in every floating type.
_HIDDEN = -1e4
_LEVELS = (_vmap_increment_nesting, _vmap_decrement_nesting)


def hides_later(region: Region, inputs: Mapping[fx.Node, Any]) -> bool:
    """True where the mask tensors of the region hide every key after the query (queries aligned with the last keys)."""
    call = CallSizes(inputs)
    sizes = tuple(call.of(region.sizes[name]) for name in ("B", "H", "Nq", "Nk"))
    n_queries, n_keys = sizes[2:]
    axes = tensors_in(region.attend.score, region.attend.mask)
    values: dict[str, Any] = {}
    has_pairs = False
    for name, operand in region.tensors.items():
        built = evaluate(operand.node, inputs) if name in axes else None
        if built is None:
            continue
        if tuple(built.shape) != tuple(map(call.of, shape_of(operand.node) or ())):
            return False  # a size that depends on data, which the region holds a stand-in for
        has_pairs |= built.ndim >= 2 and built.shape[-2:] == (n_queries, n_keys)
        values[name] = read_at(operand.layout.apply(built), axes[name], all_positions(sizes, built.device))
    if not has_pairs:
        return False
    device = next(iter(values.values())).device
    values.update(positions(n_queries, n_keys, device), qk=torch.zeros((), device=device))
    unknown = {name for name in axes if name not in values}
    visible = torch.ones(1, 1, n_queries, n_keys, dtype=torch.bool, device=device)
    for term in conjuncts(region.attend.mask):
        if not unknown & tensors_in(term).keys():
            visible = visible & evaluate_expression(term, values)
    # What is computed from activations is taken for a number of no consequence, unless it decides which score there is.
    if any(value_of(region.tensors[name].node).dtype == torch.bool for name in unknown & tensors_in(region.attend.score).keys()):
        return False
    values.update({name: torch.zeros((), device=device) for name in unknown})
    if tensors_in(region.attend.score):
        visible = visible & (evaluate_expression(region.attend.score, values) > _HIDDEN)
    later = torch.ones(n_queries, n_keys, dtype=torch.bool, device=device).triu(n_keys - n_queries + 1)
    return bool(visible.any()) and not bool((visible & later).any())


def evaluate(node: fx.Node, inputs: Mapping[fx.Node, Any], call: CallSizes | None = None) -> torch.Tensor | None:
    """The tensor a node held for the given graph inputs, or None where it is computed from activations; call: of the same inputs."""
    needed: list[fx.Node] = []
    stack, seen = [node], {node}
    while stack:
        current = stack.pop()
        needed.append(current)
        if isinstance(value_of(current), int | torch.SymInt):
            continue  # a size, whatever it is the size of
        if canonical(current) in _COMPUTES or len(needed) > _LONGEST or (current.op == "placeholder" and current not in inputs):
            return None
        for source in current.all_input_nodes:
            if source not in seen:
                seen.add(source)
                stack.append(source)
    if any(_writes_beside(user, current, node) for current in needed for user in current.users if user not in seen):
        return None  # what was written into a tensor beside is not among its operands
    given = {storage for current in needed if current.op == "placeholder" for storage in storages_of(current)}
    if any(given & storages_of(target) for current in needed for target in written_by(current)):
        return None  # evaluated, it would be written into the call's own tensors
    values: dict[fx.Node, Any] = {}
    call = CallSizes(inputs) if call is None else call
    with torch.no_grad():
        for current in sorted([*needed, *_vmap_levels(node)]):
            values[current] = _value(current, values, inputs, call)
    result = values[node]
    return result if isinstance(result, torch.Tensor) else None


def _writes_beside(user: fx.Node, current: fx.Node, node: fx.Node) -> bool:
    """Whether `user` writes into `current` so that it is seen in `node`: in front of it, or into its own memory."""
    return any(target is current and (user < node or storages_of(target) & storages_of(node)) for target in written_by(user))


def _vmap_levels(node: fx.Node) -> list[fx.Node]:
    """What opens and closes the levels of a traced vmap that the node may be computed in: no operand holds it, batched operands need it."""
    levels: list[fx.Node] = []
    opened = 0
    for each in node.graph.nodes:
        if each > node and not opened:
            break
        if each.op == "call_function" and each.target in _LEVELS:
            levels.append(each)
            opened += 1 if each.target is _vmap_increment_nesting else -1
    return levels


def _value(node: fx.Node, values: dict[fx.Node, Any], inputs: Mapping[fx.Node, Any], call: CallSizes) -> Any:
    if node.op == "placeholder":
        held = inputs[node]
        return hint(held) if isinstance(held, torch.SymInt) else held
    if isinstance(value_of(node), int | torch.SymInt):
        return call.of(value_of(node))
    arguments = fx.map_arg(node.args, values.__getitem__)
    keywords = fx.map_arg(dict(node.kwargs), values.__getitem__)
    if node.op == "call_method":
        return getattr(arguments[0], str(node.target))(*arguments[1:], **keywords)
    return node.target(*arguments, **keywords)  # type: ignore[operator]
