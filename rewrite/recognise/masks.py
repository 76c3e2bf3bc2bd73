"""What a mask tensor hides, by evaluating the part of the graph that builds it on the inputs the model was traced with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from rewrite.recognise.operators import canonical, hint, value_of
from rewrite.recognise.region import Region

# A mask is made of positions, comparisons and lookups; a subgraph with one of these computes with activations and is no mask.
_COMPUTES = frozenset({"linear", "conv", "matmul", "einsum", "baddbmm", "softmax", "attention", "layer_norm"})
# Building a mask takes a few dozen operators; a longer way back is something else.
_LONGEST = 300
# An additive mask hides a key where it adds this or less: e^-1e4 is zero in every floating type.
_HIDDEN = -1e4


def hides_later(region: Region, inputs: Mapping[fx.Node, Any]) -> bool:
    """True where a mask tensor of the region hides every key after the query (queries aligned with the last keys)."""
    n_queries, n_keys = region.sizes["Nq"], region.sizes["Nk"]
    for name, operand in region.tensors.items():
        if not name.startswith(("mask", "bias")):
            continue
        built = evaluate(operand.node, inputs)
        if built is None or built.ndim < 2 or built.shape[-2:] != (n_queries, n_keys):
            continue
        visible = built if built.dtype == torch.bool else built > _HIDDEN
        later = torch.ones(n_queries, n_keys, dtype=torch.bool, device=built.device).triu(n_keys - n_queries + 1)
        if not bool((visible & later).any()):
            return True
    return False


def evaluate(node: fx.Node, inputs: Mapping[fx.Node, Any]) -> torch.Tensor | None:
    """The tensor a node held for the given graph inputs, or None where it is computed from activations."""
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
    values: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for current in sorted(needed):
            values[current] = _value(current, values, inputs)
    result = values[node]
    return result if isinstance(result, torch.Tensor) else None


def _value(node: fx.Node, values: dict[fx.Node, Any], inputs: Mapping[fx.Node, Any]) -> Any:
    if node.op == "placeholder":
        held = inputs[node]
        return hint(held) if isinstance(held, torch.SymInt) else held
    if isinstance(value_of(node), int | torch.SymInt):
        return hint(value_of(node))
    arguments = fx.map_arg(node.args, values.__getitem__)
    keywords = fx.map_arg(dict(node.kwargs), values.__getitem__)
    if node.op == "call_method":
        return getattr(arguments[0], str(node.target))(*arguments[1:], **keywords)
    return node.target(*arguments, **keywords)  # type: ignore[operator]
