"""The flow of operators that move, split, merge, repeat and join axes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import fx

from rewrite.tokens import rules
from rewrite.tokens.flow import Flow, Group, Label, Operand, Path, one_source, pointwise, tensor_arguments
from rewrite.tokens.placement import shape_of


def reshape_groups(before: tuple[Any, ...], after: tuple[Any, ...]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The smallest groups of axes of `before` and `after` that hold the same elements in the same order; axes of size one are in none.

    Where symbolic sizes leave it open which axes go together, they are in one group: never too fine.
    """
    left, right = [i for i, size in enumerate(before) if size != 1], [i for i, size in enumerate(after) if size != 1]
    tail: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    head: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    while left and right and before[left[0]] == after[right[0]]:
        head.append(((left.pop(0),), (right.pop(0),)))
    while left and right and before[left[-1]] == after[right[-1]]:
        tail.insert(0, ((left.pop(),), (right.pop(),)))
    while left and right:
        ins, outs = [left.pop(0)], [right.pop(0)]
        while (ratio := sympy.cancel(_product(before, ins) / _product(after, outs))) != 1:
            numerator, denominator = sympy.fraction(ratio)
            grow_left = bool(ratio < 1) if ratio.is_number else numerator == 1
            if not ratio.is_number and numerator != 1 and denominator != 1:
                ins, outs, left, right = ins + left, outs + right, [], []
                break
            if not (left if grow_left else right):
                ins, outs, left, right = ins + left, outs + right, [], []
                break
            if grow_left:
                ins.append(left.pop(0))
            else:
                outs.append(right.pop(0))
        head.append((tuple(ins), tuple(outs)))
    return head + tail


def _product(shape: tuple[Any, ...], axes: list[int]) -> Any:
    return sympy.prod([shape[i] for i in axes])


def _moved(node: fx.Node, order: list[int | None]) -> Flow:
    """Axis `order[i]` of the operand is axis i of the result; None is a new axis."""
    source, _, _ = one_source(node)
    return Flow((source,), tuple(("new", i) if axis is None else axis for i, axis in enumerate(order)))


def literal_sizes(node: fx.Node) -> dict[Path, int]:
    """The paths of sizes written out in a view, reshape or expand, each with the axis of the result it is for."""
    if len(node.args) > 1:
        nested = isinstance(node.args[1], (tuple, list))
        count = len(node.args[1]) if nested else len(node.args) - 1  # type: ignore[arg-type]
        return {("args", 1, i) if nested else ("args", 1 + i): i for i in range(count)}
    name = next(name for name in ("shape", "size") if name in node.kwargs)
    return {("kwargs", name, i): i for i in range(len(node.kwargs[name]))}  # type: ignore[arg-type]


def _reshape(node: fx.Node) -> Flow | None:
    name = rules.name_of(node)
    if name == "view" and isinstance(rules.argument(node, 1, "dtype"), torch.dtype):
        return pointwise(node)
    source, before, after = one_source(node)
    output: list[Label] = [("new", i) for i in range(len(after))]
    groups = []
    for ins, outs in reshape_groups(before, after):
        if len(ins) == len(outs) == 1:
            output[outs[0]] = ins[0]
        else:
            groups.append(Group(ins, tuple(output[i] for i in outs)))
    sizes: dict[Path, Label] = {}
    if name in {"view", "reshape"}:
        paths = literal_sizes(node)
        if len(paths) != len(after):
            return None
        sizes = {path: output[axis] for path, axis in paths.items()}
    return Flow((source,), tuple(output), groups=tuple(groups), sizes=sizes)


def _expand(node: fx.Node) -> Flow | None:
    if rules.name_of(node) == "expand_as":
        return pointwise(node)
    source, before, after = one_source(node)
    new = len(after) - len(before)
    output: tuple[Label, ...] = tuple(("new", i) if i < new or before[i - new] != after[i] else i - new for i in range(len(after)))
    paths = literal_sizes(node)
    if len(paths) != len(after):
        return None
    return Flow((source,), output, sizes={path: output[axis] for path, axis in paths.items()})


def _permute(node: fx.Node) -> Flow | None:
    rank = len(shape_of(node))
    order: list[int | None] = list(range(rank))
    name = rules.name_of(node)
    if name == "permute":
        order = [d % rank for d in rules.variadic(node, "dims")]
    elif name == "movedim":
        source, target = (rules.argument(node, i, n) for i, n in ((1, "source"), (2, "destination")))
        pairs = sorted(zip(*((d % rank for d in ([x] if isinstance(x, int) else x)) for x in (target, source)), strict=True))
        moved = {s for _, s in pairs}
        order = [axis for axis in order if axis not in moved]
        for place, axis in pairs:
            order.insert(place, axis)
    elif rank > 1:
        default = (0, 1) if name in {"t", "getattr"} else (None, None)
        a, b = (rules.argument(node, 1 + i, f"dim{i}", default=default[i]) for i in range(2))
        if name == "getattr":
            attribute = node.args[1]
            if attribute not in {"T", "mT"}:
                return None
            order, (a, b) = (order[::-1], (0, 0)) if attribute == "T" else (order, (-2, -1))
        order[a % rank], order[b % rank] = order[b % rank], order[a % rank]
    return _moved(node, order)


def _unsqueeze(node: fx.Node) -> Flow:
    rank = len(shape_of(node))
    at = rules.argument(node, 1, "dim") % rank
    return _moved(node, [None if i == at else i - (i > at) for i in range(rank)])


def _squeeze(node: fx.Node) -> Flow:
    _, before, _ = one_source(node)
    given = rules.argument(node, 1, "dim")
    dims = range(len(before)) if given is None else [d % len(before) for d in ([given] if isinstance(given, int) else given)]
    return _moved(node, [i for i, size in enumerate(before) if not (size == 1 and i in dims)])


def _repeat(node: fx.Node) -> Flow:
    source, before, after = one_source(node)
    repeats = rules.variadic(node, "repeats", "dims")
    repeats = (1,) * (len(after) - len(repeats)) + repeats
    new = len(after) - len(before)
    output: tuple[Label, ...] = tuple(i - new if i >= new and repeats[i] == 1 else ("new", i) for i in range(len(after)))
    groups = tuple(Group((i,), (("new", i + new),), cut=True) for i in range(len(before)) if repeats[i + new] != 1)
    return Flow((source,), output, groups=groups)


def _repeat_interleave(node: fx.Node) -> Flow:
    source, before, _ = one_source(node)
    dim = rules.argument(node, 2, "dim")
    times = rules.argument(node, 1, "repeats")
    if dim is None:
        return Flow((source,), (("new", 0),), groups=(Group(source.labels, (("new", 0),), cut=True),))
    at = dim % len(before)
    output: tuple[Label, ...] = tuple(("new", i) if i == at else i for i in range(len(before)))
    return Flow((source,), output, groups=(Group((at,), (("new", at),), cut=not isinstance(times, int)),))


def _cat(node: fx.Node) -> Flow | None:
    """Parts side by side along one axis; a part of shape (0,) adds nothing."""
    rank = len(shape_of(node))
    at = rules.argument(node, 1, "dim", "axis", default=0) % rank
    parts = [(path, part) for path, part in tensor_arguments(node) if tuple(shape_of(part)) != (0,)]
    out: Label = ("new", at)

    def labels(part: Label) -> tuple[Label, ...]:
        return tuple(part if i == at else i - rank for i in range(rank))

    if len(parts) == 1:
        return Flow((Operand(*parts[0], labels(at)),), labels(at))
    marks: tuple[Label, ...] = tuple(("part", i) for i in range(len(parts)))
    operands = tuple(Operand(path, part, labels(mark)) for mark, (path, part) in zip(marks, parts, strict=True))
    return Flow(operands, labels(out), groups=(Group(marks, (out,), cut=True),), joined=(marks, out))


def _stack(node: fx.Node) -> Flow:
    rank = len(shape_of(node))
    at = rules.argument(node, 1, "dim", default=0) % rank
    axes: tuple[Label, ...] = tuple(range(rank - 1))
    return Flow(tuple(Operand(path, part, axes) for path, part in tensor_arguments(node)), (*axes[:at], ("new", at), *axes[at:]))


STRUCTURE: dict[str, Callable[[fx.Node], Flow | None]] = {
    **dict.fromkeys(("view", "reshape", "flatten", "unflatten", "ravel"), _reshape),
    **dict.fromkeys(("expand", "expand_as"), _expand),
    **dict.fromkeys(("transpose", "permute", "movedim", "t", "adjoint", "getattr"), _permute),
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "repeat": _repeat,
    "repeat_interleave": _repeat_interleave,
    "cat": _cat,
    "stack": _stack,
}
