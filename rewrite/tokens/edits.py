"""Small edits of an FX graph: a call with where it comes from, an argument in a nested place, a node replaced by numbers."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

from torch import fx

from rewrite.tokens.gather import gather_tokens, scatter_tokens
from rewrite.tokens.placement import Placement, Selection, example, first_tensor, shape_of

_PROVENANCE = ("nn_module_stack", "stack_trace", "source_fn_stack")


def insert_call(
    like: fx.Node, target: Callable[..., Any] | str, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None, *, traced: Any = None
) -> fx.Node:
    """A call at the graph's insertion point, which comes from where `like` comes from and stands for the traced value `traced`."""
    node = like.graph.create_node("call_method" if isinstance(target, str) else "call_function", target, args, kwargs or {})
    node.meta.update({key: like.meta[key] for key in _PROVENANCE if key in like.meta})
    if traced is not None:
        node.meta["example_value"] = traced
    return node


def insert_lift(like: fx.Node, value: fx.Node, count: int) -> fx.Node:
    """`value` with `count` axes of size one put in front, at the insertion point."""
    index = (*([None] * count), Ellipsis)
    return insert_call(like, operator.getitem, (value, index), traced=example(value)[index])


def insert_gather_call(like: fx.Node, value: fx.Node, axis: int, positions: fx.Node, place: Placement) -> fx.Node:
    """A gather of `value` at the insertion point. It is traced as what it gathers."""
    layout = {"batch_axis": place.batch, "rows": place.rows}
    return insert_call(like, gather_tokens, (value, positions, axis), layout, traced=example(value))


def insert_restore_call(
    like: fx.Node, value: fx.Node, axis: int, selection: Selection, place: Placement, into: fx.Node | None = None
) -> fx.Node:
    """A tensor of the full length on `axis`, with the tokens of `value` in place, at the insertion point.

    Where tokens were merged, each place has the token that holds it. into: what has the tokens that left; None: zeros.
    """
    if selection.holders is not None:
        return insert_gather_call(like, value, axis, selection.holders, place)
    beyond = selection.fused or selection.places is not None
    layout = {"batch_axis": place.batch, "rows": place.rows, **({"fused": True} if beyond else {})}
    given = {} if into is None else {"into": into}
    places = selection.places or selection.positions
    return insert_call(like, scatter_tokens, (value, places, axis, selection.length), {**layout, **given}, traced=example(value))


def set_argument(node: fx.Node, path: tuple[int | str, ...], value: Any) -> None:
    """Put `value` at a path such as ("args", 0, 1) or ("kwargs", "attn_mask")."""

    def put(container: Any, rest: tuple[int | str, ...]) -> Any:
        if not rest:
            return value
        if isinstance(container, Mapping):
            return {**container, rest[0]: put(container[rest[0]], rest[1:])}
        entries = [put(entry, rest[1:]) if i == rest[0] else entry for i, entry in enumerate(container)]
        return entries if isinstance(container, list) else tuple(entries)

    if path[0] == "args":
        node.args = put(node.args, path[1:])
    else:
        node.kwargs = put(node.kwargs, path[1:])


def substitute(node: fx.Node, value: Any) -> None:
    """Put a number, a node or a tuple of them in the place of `node` in all its users; the node itself goes."""
    for user in list(node.users):
        user.args = fx.map_arg(user.args, lambda n: value if n is node else n)
        user.kwargs = fx.map_arg(user.kwargs, lambda n: value if n is node else n)
    node.graph.erase_node(node)


def full_size(like: fx.Node, node: fx.Node, axis: int, placements: Mapping[fx.Node, Placement]) -> int | fx.Node:
    """The length an axis was traced with, as a number or a node that gives it."""
    place = placements.get(node)
    if place is not None and axis in place.axes:
        return place.axes[axis].length
    tensor = first_tensor(node)
    assert tensor is not None
    size = tensor.shape[axis]
    return size if isinstance(size, int) else insert_call(like, "size", (node, axis), traced=size)


def combine(like: fx.Node, function: Callable[[Any, Any], Any], sizes: list[int | fx.Node]) -> int | fx.Node:
    """Sizes added or multiplied: a number where all are, else a node."""
    result = sizes[0]
    for size in sizes[1:]:
        both = isinstance(result, int) and isinstance(size, int)
        result = function(result, size) if both else insert_call(like, function, (result, size))
    return result


def answer_size_query(node: fx.Node, name: str, dim: int | None, placements: Mapping[fx.Node, Placement]) -> None:
    """Put full lengths in the place of `node`, which reads sizes off a short tensor; `name` and `dim` say which sizes."""
    value = node.all_input_nodes[0]
    rank = len(shape_of(value))
    if name == "len":
        dim = 0
    if dim is not None:
        substitute(node, full_size(node, value, dim % rank, placements))
        return
    sizes = [full_size(node, value, axis, placements) for axis in range(rank)]
    if name in {"numel", "sym_numel"}:
        substitute(node, combine(node, operator.mul, sizes))
        return
    for user in list(node.users):
        if user.target is operator.getitem and isinstance(user.args[1], (int, slice)):
            substitute(user, tuple(sizes)[user.args[1]])
    substitute(node, tuple(sizes))
