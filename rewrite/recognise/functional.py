"""Operators that write into a tensor, made readable: a graph that recognition can take as equations.

Recognition reads a node as the value it was given when it was made. An operator that writes in place breaks that, so on our own copy of
the graph each write is, as far as can be shown to be safe, replaced by the operator that makes a new tensor:

    x.mul_(y)               x.mul(y), where nobody else sees x's memory afterwards
    x[:, :, 0:] = value     value.clone(), likewise, where the index covers all of x
    x[:, :, 1:] = value     assigned(x, (:, :, 1:), value), likewise
    x[:, 0:, :]             x itself
    cache.index_copy_(...)  as it is, and later readers of a cache of fixed length read this operator

What is left writes on: later readers of x read the operator that wrote (the same object), and `writes.overwritten` says of a region
whether a write comes between what it was read from and what it would be replaced by.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from typing import Any

import torch
from torch import fx

from rewrite.recognise.assignment import assigned
from rewrite.recognise.fixed_caches import cache_write
from rewrite.recognise.operators import value_of
from rewrite.recognise.writes import IN_PLACE_OPERATORS, written_by
from rewrite.tokens.placement import Storage, storages_of

# Tensor methods that write their result into their first operand, each with a namesake (less the underscore) that makes a new tensor.
_METHODS = frozenset(
    {
        *("add_", "sub_", "subtract_", "mul_", "multiply_", "masked_fill_", "clamp_", "clip_", "clamp_min_", "clamp_max_"),
        *("logical_and_", "logical_or_", "logical_not_", "bitwise_and_", "bitwise_or_", "bitwise_not_"),
    }
)
# Likewise, where the result is of the same type only for floating-point tensors.
_FLOATING_METHODS = frozenset(
    {"div_", "divide_", "true_divide_", "exp_", "neg_", "relu_", "sigmoid_", "tanh_", "square_", "sqrt_", "rsqrt_", "reciprocal_"}
)

# Scores have a batch, heads, queries and keys. Assignments to tensors of fewer axes are left as they are: features that join a text are
# found by them.
_SCORES_RANK = 4


def forwarded_writes(graph: fx.Graph) -> None:
    """Make the graph's writes into tensors readable, as this module says; what the graph computes stays the same."""
    memory = _Memory(graph)
    for node in list(graph.nodes):
        if node.target is operator.getitem:
            _whole_view(node)
        elif node.target is operator.setitem:
            covers = isinstance(node.args[0], fx.Node) and _covers(node.args[1], value_of(node.args[0]))
            (_whole_assignment if covers else _part_assignment)(node, memory)
        else:
            _in_place(node, memory)


class _Memory:
    """Which nodes share memory."""

    def __init__(self, graph: fx.Graph) -> None:
        self._holders: dict[Storage, list[fx.Node]] = defaultdict(list)
        for node in graph.nodes:
            self.add(node)

    def add(self, node: fx.Node) -> None:
        for storage in storages_of(node):
            self._holders[storage].append(node)

    def only_seen_through(self, tensor: fx.Node, write: fx.Node) -> bool:
        """True where what `write` does to `tensor`'s memory is seen by later readers of `tensor` itself and by nobody else."""
        storages = storages_of(tensor)
        holders = [holder for storage in storages for holder in self._holders[storage]]
        if not storages or any(holder.op in ("placeholder", "get_attr") for holder in holders):
            return False
        earlier = (holder for holder in holders if holder is not tensor and holder < write)
        return not any(write < user for holder in earlier for user in holder.users)


def _in_place(node: fx.Node, memory: _Memory) -> None:
    """x.mul_(y): later readers of x read this node, which becomes x.mul(y) where that is the same."""
    written = cache_write(node)
    if written is not None:
        _rename(written.cache, node, node)
    functional = _functional(node)
    if functional is None:
        return
    tensor = node.args[0]
    assert isinstance(tensor, fx.Node)
    if storages_of(tensor) != storages_of(node):
        return
    if _keeps_type(node) and memory.only_seen_through(tensor, node):
        node.op, node.target, node.args, node.kwargs = functional
    _rename(tensor, node, node)


def _functional(node: fx.Node) -> tuple[str, Any, tuple[Any, ...], dict[str, Any]] | None:
    """(op, target, args, kwargs) of the operator that makes what an in-place one writes; None where the node is no such operator."""
    if not node.args or not isinstance(node.args[0], fx.Node) or not isinstance(value_of(node.args[0]), torch.Tensor):
        return None
    keywords = dict(node.kwargs)
    if node.op == "call_method":
        name = str(node.target)
        if name in _METHODS | _FLOATING_METHODS:
            return "call_method", name[:-1], node.args, keywords
        if name == "copy_" and isinstance(node.args[1], fx.Node) and _alike(value_of(node.args[0]), value_of(node.args[1])):
            return "call_method", "clone", (node.args[1],), {}
        return None
    if node.op != "call_function":
        return None
    if node.target in IN_PLACE_OPERATORS:
        return "call_function", IN_PLACE_OPERATORS[node.target], node.args, keywords  # type: ignore[index]
    if keywords.get("inplace") is True:
        return "call_function", node.target, node.args, {**keywords, "inplace": False}
    return None


def _keeps_type(node: fx.Node) -> bool:
    """True where making a new tensor gives the type that writing in place keeps."""
    tensor = value_of(node.args[0])  # type: ignore[arg-type]
    if not tensor.dtype.is_floating_point and node.target in _FLOATING_METHODS | {operator.itruediv}:
        return False
    if node.target in ("masked_fill_", "copy_"):
        return True
    others = [value_of(entry) if isinstance(entry, fx.Node) else entry for entry in (*node.args[1:], *node.kwargs.values())]
    operands = [other for other in others if isinstance(other, torch.Tensor | int | float | torch.SymInt | torch.SymFloat)]
    return all(_promoted(tensor, other) == tensor.dtype for other in operands if not isinstance(other, bool))


def _promoted(tensor: torch.Tensor, other: Any) -> torch.dtype:
    # A symbolic number promotes as a plain one does; asking with the symbol would pin its value.
    plain = 1 if isinstance(other, torch.SymInt) else 1.0 if isinstance(other, torch.SymFloat) else other
    return torch.result_type(tensor, plain)


def _whole_assignment(node: fx.Node, memory: _Memory) -> None:
    """x[...] = value over all of x: later readers of x read a copy of the value."""
    tensor, _, value = node.args
    if not isinstance(tensor, fx.Node) or not isinstance(value, fx.Node) or not _alike(value_of(tensor), value_of(value)):
        return
    if not memory.only_seen_through(tensor, node):
        return
    with node.graph.inserting_before(node):
        copied = node.graph.call_method("clone", (value,))
    copied.meta = dict(node.meta) | {"example_value": value_of(tensor)}
    memory.add(copied)
    _rename(tensor, copied, node)
    node.graph.erase_node(node)


def _part_assignment(node: fx.Node, memory: _Memory) -> None:
    """x[:, 1:] = value over a part of x that slices cut out: later readers of x read a new tensor."""
    tensor, index, value = node.args
    if not isinstance(tensor, fx.Node) or not isinstance(value, fx.Node) or not isinstance(value_of(value), torch.Tensor):
        return
    entries = index if isinstance(index, tuple) else (index,)
    if not all(entry is Ellipsis or (isinstance(entry, slice) and _plain_slice(entry)) for entry in entries):
        return
    if (
        value_of(value).dtype != value_of(tensor).dtype
        or value_of(tensor).dim() < _SCORES_RANK
        or not memory.only_seen_through(tensor, node)
    ):
        return
    with node.graph.inserting_before(node):
        made = node.graph.call_function(assigned, (tensor, index, value))
    made.meta = dict(node.meta) | {"example_value": value_of(tensor)}
    memory.add(made)
    _rename(tensor, made, node)
    node.graph.erase_node(node)


def _plain_slice(entry: slice) -> bool:
    return all(part is None or isinstance(part, int) for part in (entry.start, entry.stop, entry.step))


def _whole_view(node: fx.Node) -> None:
    """x[:, 0:] over all of x is x, which readers then read; a graph's outputs stay apart."""
    source = node.args[0]
    if not isinstance(source, fx.Node) or not isinstance(value_of(source), torch.Tensor) or not _covers(node.args[1], value_of(source)):
        return
    node.replace_all_uses_with(source, delete_user_cb=lambda user: user.op != "output" and not written_by(user))


def _rename(old: fx.Node, new: fx.Node, since: fx.Node) -> None:
    """Readers of `old` after `since` read `new`."""
    for user in list(old.users):
        if since < user and user is not new:
            user.replace_input_with(old, new)


def _alike(one: Any, other: Any) -> bool:
    """True for two tensors of one shape, type and device."""
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return False
    sizes_match = one.dim() == other.dim() and all(_same_size(a, b) for a, b in zip(one.shape, other.shape, strict=True))
    return sizes_match and one.dtype == other.dtype and one.device == other.device


def _same_size(one: Any, other: Any) -> bool:
    """Equality that asks no new question of a symbolic size."""
    symbolic = [isinstance(size, torch.SymInt) for size in (one, other)]
    if any(symbolic):
        return all(symbolic) and bool(one.node.expr == other.node.expr)
    return bool(one == other)


def _covers(index: Any, tensor: torch.Tensor) -> bool:
    """True for an index that takes every element of the tensor, in order."""
    entries = index if isinstance(index, tuple) else (index,)
    if sum(entry is Ellipsis for entry in entries) > 1 or len(entries) > tensor.dim() + (Ellipsis in entries):
        return False
    place = 0
    for entry in entries:
        if entry is Ellipsis:
            place += tensor.dim() - len(entries) + 1
            continue
        if not isinstance(entry, slice) or not _spans(entry, tensor.shape[place]):
            return False
        place += 1
    return True


def _spans(entry: slice, size: Any) -> bool:
    start, stop, step = (value_of(part) if isinstance(part, fx.Node) else part for part in (entry.start, entry.stop, entry.step))
    from_the_first = start is None or (isinstance(start, int) and start == 0)
    to_the_last = stop is None or _same_size(stop, size) or (isinstance(stop, int) and isinstance(size, int) and stop >= size)
    return from_the_first and to_the_last and (step is None or (isinstance(step, int) and step == 1))
