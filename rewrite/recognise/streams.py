"""Where an attention's tensors come from: self or cross, the residual stream in front of it, the stack of layers it belongs to."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import fx

from rewrite.recognise.operators import argument, canonical, hinted_shape, value_of
from rewrite.recognise.region import Region

# Projections from channels to channels; the walk back from queries and keys ends at their input.
PROJECTIONS = frozenset({"linear", "conv", "addmm"})
# Per-token normalisation and what does not change the tokens: the walk from a projection to the residual stream goes through these.
_NORMALISATION = frozenset({"layer_norm", "rms_norm", "cast", "dropout", "contiguous", "clone"})

# What lays the same tokens out otherwise: a grid cut into windows, and rolled before.
_LAYOUT = frozenset({"reshape", "flatten", "unflatten", "permute", "transpose", "roll", "pad"})

# What makes tokens of tokens one by one, but for projections.
_TOKEN_BY_TOKEN = _NORMALISATION | {"add", "sub", "mul", "div", "clamp", "clamp_min", "clamp_max", "relu"}


def is_parameter(node: fx.Node) -> bool:
    """True for a placeholder or attribute that holds a parameter or buffer of the model."""
    if node.op == "get_attr":
        return True
    return node.op == "placeholder" and ("_parameters_" in str(node.target) or "_buffers_" in str(node.target))


def sources(node: fx.Node) -> set[fx.Node]:
    """The activations that were projected on the way to a node; a KV cache entry on the way is a placeholder and contributes nothing."""
    found: set[fx.Node] = set()
    stack, seen = [node], {node}
    while stack:
        current = stack.pop()
        projected = _projected(current)
        if projected is not None:
            found.add(projected)
            continue
        for previous in current.all_input_nodes:
            if previous not in seen and isinstance(value_of(previous), torch.Tensor | tuple | list):
                seen.add(previous)
                stack.append(previous)
    return found


def _projected(node: fx.Node) -> fx.Node | None:
    """What a projection projects: its input, or the operand of a product that is no parameter while the other is one."""
    name = canonical(node)
    if name in ("linear", "conv"):
        source = argument(node, "input")
        return source if isinstance(source, fx.Node) and not _keeps_channels_apart(node) else None
    if name not in ("addmm", "matmul", "einsum"):
        return None
    factors = node.all_input_nodes[-2:]
    own = [factor for factor in factors if not _of_parameters(factor)]
    return own[0] if len(factors) == 2 and len(own) == 1 else None


def _keeps_channels_apart(node: fx.Node) -> bool:
    """True for a depthwise convolution: it filters what was projected."""
    weight = argument(node, "weight")
    return canonical(node) == "conv" and isinstance(weight, fx.Node) and hinted_shape(weight)[0] > 1 == hinted_shape(weight)[1]


def _of_parameters(node: fx.Node) -> bool:
    """True for a parameter and views of it."""
    while len(node.all_input_nodes) == 1 and not is_parameter(node):
        node = node.all_input_nodes[0]
    return is_parameter(node)


def cache_entries(node: fx.Node) -> list[fx.Node]:
    """The placeholders of earlier keys or values that are joined in front of a node's own (``cat([past, new], -2)``), nearest first."""
    found: list[fx.Node] = []
    stack, seen = [node], {node}
    while stack:
        current = stack.pop()
        if canonical(current) in PROJECTIONS:
            continue
        if canonical(current) == "cat":
            parts = argument(current, "tensors", current.args[0] if current.args else ())
            found += [part for part in parts if part.op == "placeholder" and not is_parameter(part)]
        for previous in current.all_input_nodes:
            if previous not in seen and isinstance(value_of(previous), torch.Tensor):
                seen.add(previous)
                stack.append(previous)
    return found


def residual_stream(projected: fx.Node) -> fx.Node:
    """The residual stream that a projection's input was normalised from: the layer's input in a pre-norm layer, the tensor itself else.

    Where windows were cut of it, it is what they were cut of, if there is such a layer's input.
    """
    node, found = projected, False
    while not (found := _is_added_to(node)):
        shape = hinted_shape(node)
        previous: fx.Node | None = None
        if canonical(node) in _NORMALISATION | _LAYOUT:
            source = argument(node, "input", node.args[0] if node.args else None)
            previous = source if isinstance(source, fx.Node) and math.prod(hinted_shape(source)) == math.prod(shape) else None
        elif canonical(node) == "mul":
            full = [entry for entry in node.args if isinstance(entry, fx.Node) and not is_parameter(entry)]
            full = [entry for entry in full if isinstance(value_of(entry), torch.Tensor) and hinted_shape(entry) == shape]
            previous = full[0] if len(full) == 1 else None
        if previous is None:
            break
        node = previous
    shape, own = hinted_shape(node), hinted_shape(projected)
    return node if shape == own or (found and shape[-1] == own[-1]) else projected


def _is_added_to(node: fx.Node) -> bool:
    """Whether something of its shape is added to a tensor."""
    return any(canonical(user) in ("add", "sub") and hinted_shape(user) == hinted_shape(node) for user in _tensor_users(node))


def _tensor_users(node: fx.Node) -> Iterable[fx.Node]:
    return (user for user in node.users if isinstance(value_of(user), torch.Tensor))


def reaches(node: fx.Node, targets: set[fx.Node]) -> fx.Node | None:
    """The nearest of the targets that a tensor was computed from without its tokens and channels ever changing: one residual stream."""
    shape = hinted_shape(node)
    queue, seen = [node], {node}
    while queue:
        current = queue.pop(0)
        for previous in current.all_input_nodes:
            if previous in seen or not isinstance(value_of(previous), torch.Tensor):
                continue
            seen.add(previous)
            if previous in targets:
                return previous
            if same_tokens(hinted_shape(previous), shape):
                queue.append(previous)
    return None


def ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes, and all that they are computed from."""
    found = set(nodes)
    stack = list(found)
    while stack:
        fresh = [one for one in stack.pop().all_input_nodes if one not in found]
        found.update(fresh)
        stack += fresh
    return found


def same_tokens(shape: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether shapes are equal but for how tokens lie on axes: [B, N, C], [B * N, C] and [B, H, W, C]."""
    return shape == other or (shape[-1:] == other[-1:] and len(shape) != len(other) and math.prod(shape) == math.prod(other))


def self_source(region: Region) -> fx.Node | None:
    """The tensor that both queries and keys were projected from, or None where they have no source in common (cross-attention).

    Where each was projected from a tensor of its own (bounds or positions of its own), the tensor that both of these were made of, token by
    token. Keys may be of fewer tokens than queries where a strided convolution made these of the queries' (spatial reduction).
    """
    own, other = sources(region.query.node), sources(region.key.node)
    common = own & other
    if common:
        return min(common)
    if region.sizes["Nq"] != region.sizes["Nk"]:
        return next((source for node in sorted(other) if (source := _reduced_from(node)) in own), None)
    common = _made_of(own) & _made_of(other)
    return max(common) if common else None


def _reduced_from(node: fx.Node) -> fx.Node | None:
    """The tokens that one convolution brought down to a tensor's, normalised since or laid out otherwise; None where there is none."""
    reduced = False
    while canonical(node) in _NORMALISATION | _LAYOUT | {"conv"}:
        if canonical(node) == "conv" and reduced:
            return None
        reduced |= canonical(node) == "conv"
        source = argument(node, "input", node.args[0] if node.args else None)
        if not isinstance(source, fx.Node):
            return None
        node = source
        # The image that is convolved is the tokens themselves, laid out otherwise.
        if reduced and canonical(node) not in _LAYOUT:
            return node
    return None


def _made_of(tensors: set[fx.Node]) -> set[fx.Node]:
    """The tensors, and those that they were made of without tokens being mixed, up to the projections in front of them."""
    found, stack = set(tensors), list(tensors)
    while stack:
        node = stack.pop()
        if canonical(node) not in _TOKEN_BY_TOKEN:
            continue
        operands = [previous for previous in node.all_input_nodes if isinstance(value_of(previous), torch.Tensor)]
        shape = hinted_shape(node)
        for previous in operands:
            # Positions and parameters are no stream of tokens: nothing was projected to make them.
            if previous not in found and hinted_shape(previous) == shape and not is_parameter(previous) and sources(previous):
                found.add(previous)
                stack.append(previous)
    return found
