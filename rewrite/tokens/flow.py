"""How axes flow through one operator: which axis of which operand becomes which axis of the result.

Each axis is given a label, as in an einsum. The same label on two axes means that they run over the same tokens in the same order:

    linear          x[b, n, c]                          -> out[b, n, new]      reduced: c
    matmul          a[b, n, k], b[b, k, m]              -> out[b, n, m]
    view            x[0, 1, 2], 2 split in two          -> out[0, 1, new, new] group: {2} -> {new, new}

A flow is read off the node and the shapes it was traced with. It changes nothing, and knows nothing of selections; both the surgery
and the analysis of token layouts interpret it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from rewrite.ir.expression import I, J, letters
from rewrite.ir.operations import Attend, Statistic
from rewrite.tokens import rules
from rewrite.tokens.placement import example, first_tensor, is_tensor, shape_of

Label = Hashable
Path = tuple[int | str, ...]


@dataclass(frozen=True)
class Operand:
    """One tensor argument. Where `labels` are more than its axes, it is broadcast: the axes it lacks are in front."""

    path: Path
    node: fx.Node
    labels: tuple[Label, ...]


@dataclass(frozen=True)
class Group:
    """Axes `ins` that become axes `outs`, not one to one: reshaped into each other, or cut (sliced, padded, indexed).

    `span` is (start, stop) of a slice with numbers written out.
    """

    ins: tuple[Label, ...]
    outs: tuple[Label, ...]
    cut: bool = False
    span: tuple[int, int | None] | None = None


@dataclass(frozen=True)
class Flow:
    """The axes of one operator. An axis of size one may be in none of these: it is gone."""

    operands: tuple[Operand, ...]
    output: tuple[Label, ...] = ()
    contracted: frozenset[Label] = frozenset()  # summed over, operands side by side
    reduced: frozenset[Label] = frozenset()  # computed over: fewer tokens would give another result
    normalised: frozenset[Label] = frozenset()  # computed over, to weights that sum to one
    groups: tuple[Group, ...] = ()
    joined: tuple[tuple[Label, ...], Label] | None = None  # concatenated: a label per operand, and the one of the result
    sizes: Mapping[Path, Label] = field(default_factory=dict)  # literal sizes, and the axis of the result that each is for


def axis_flow(node: fx.Node) -> Flow | None:
    """The flow of a node; None where the operator has no rule."""
    from rewrite.tokens.indexing import INDEXING
    from rewrite.tokens.structure import STRUCTURE

    name = rules.name_of(node)
    if (name in {"max", "min"} and is_tensor(rules.argument(node, 1, "other"))) or name in rules.POINTWISE:
        return pointwise(node)
    if name in rules.FOLLOWS_FIRST:
        return Flow((_first(node),), _axes(node))
    if name in rules.FRESH:
        return Flow(())
    if name in rules.LAST_AXES:
        return _last_axes(node, rules.LAST_AXES[name])
    if name in rules.REDUCE or name in rules.ALONG or name in rules.NORMALISE:
        return _reduction(node, name)
    rule: Callable[[fx.Node], Flow | None] | None = {**_PRODUCTS, **STRUCTURE, **INDEXING}.get(name)
    return rule(node) if rule is not None and first_tensor(node) is not None else None


def tensor_arguments(node: fx.Node) -> list[tuple[Path, fx.Node]]:
    """Every tensor argument with the path to it, those in lists included."""
    found: list[tuple[Path, fx.Node]] = []
    for path, value in [(("args", i), v) for i, v in enumerate(node.args)] + [(("kwargs", k), v) for k, v in node.kwargs.items()]:
        entries = enumerate(value) if isinstance(value, (tuple, list)) else [(None, value)]
        for index, entry in entries:
            if isinstance(entry, fx.Node) and is_tensor(entry):
                found.append((path if index is None else (*path, index), entry))
    return found


def pointwise(node: fx.Node) -> Flow | None:
    """Operands aligned from the right: the last axis is -1 in all of them."""
    if first_tensor(node) is None:
        return None
    rank = len(shape_of(node))
    labels = tuple(range(-rank, 0))
    return Flow(tuple(Operand(path, operand, labels) for path, operand in tensor_arguments(node)), labels)


def dimensions(node: fx.Node, place: int, default: int | None, rank: int) -> tuple[int, ...]:
    """The dimensions an operator works on, from zero; all where none is given."""
    given = rules.argument(node, place, "dim", "axis", "dims", default=default)
    if given is None or given == ():
        return tuple(range(rank))
    return tuple(d % rank for d in (given if isinstance(given, (tuple, list)) else (given,)))


def one_source(node: fx.Node) -> tuple[Operand, tuple[Any, ...], tuple[Any, ...]]:
    """The operand of an operator of one tensor, axes labelled by number, with the shapes before and after."""
    path, operand = tensor_arguments(node)[0]
    shape = shape_of(operand)
    return Operand(path, operand, tuple(range(len(shape)))), shape, shape_of(node)


def _axes(node: fx.Node) -> tuple[Label, ...]:
    return tuple(range(len(shape_of(node))))


def _first(node: fx.Node) -> Operand:
    """The first operand, its axes labelled by number."""
    if node.args:
        return Operand(("args", 0), node.args[0], _axes(node.args[0]))  # type: ignore[arg-type]
    name = "input" if "input" in node.kwargs else "self"
    return Operand(("kwargs", name), node.kwargs[name], _axes(node.kwargs[name]))  # type: ignore[arg-type]


def _last_axes(node: fx.Node, count: int | str) -> Flow:
    first = _first(node)
    last = len(rules.argument(node, 1, "normalized_shape")) if count == "shape" else int(count)
    touched = first.labels[len(first.labels) - last :]
    return Flow((first,), (*first.labels[: len(first.labels) - last], *(("new", i) for i in range(last))), reduced=frozenset(touched))


def _reduction(node: fx.Node, name: str) -> Flow:
    first = _first(node)
    rank = len(first.labels)
    table = next(table for table in (rules.REDUCE, rules.ALONG, rules.NORMALISE) if name in table)
    dims = frozenset(dimensions(node, *table[name], rank))
    labels: frozenset[Label] = frozenset(first.labels[d] for d in dims)
    if table is rules.NORMALISE:
        return Flow((first,), first.labels, normalised=labels)
    if len(shape_of(node)) == rank:
        output: tuple[Label, ...] = tuple(("new", i) if i in dims else label for i, label in enumerate(first.labels))
    else:
        output = tuple(label for label in first.labels if label not in labels)
    return Flow((first,), output, reduced=labels)


def _matmul(node: fx.Node) -> Flow:
    """a[..., n, k] b[..., k, m] -> [..., n, m], with an axis less for each vector; baddbmm and addmm add a broadcast term."""
    (path_a, a), (path_b, b), *rest = (tensor_arguments(node)[-2:]) + tensor_arguments(node)[:-2]
    ranks = len(shape_of(a)), len(shape_of(b))
    batch: tuple[Label, ...] = tuple(range(-max(*ranks, 2), -2))
    rows, columns = (("n",) if ranks[0] > 1 else ()), (("m",) if ranks[1] > 1 else ())
    left = (*batch, *rows, "k") if ranks[0] > 1 else ("k",)
    right = (*batch, "k", *columns) if ranks[1] > 1 else ("k",)
    output = (*batch, *rows, *columns)
    return Flow(
        (Operand(path_a, a, left), Operand(path_b, b, right), *(Operand(path, node, output) for path, node in rest)),
        output,
        frozenset({"k"}),
    )


def _attention(node: fx.Node) -> Flow:
    """q[..., n, d] k[..., m, d] v[..., m, e] mask[..., n, m] -> [..., n, e]; grouped heads are an axis of their own."""
    rank = len(shape_of(node))
    batch: tuple[Label, ...] = tuple(range(-rank, -2))
    grouped = bool(node.kwargs.get("enable_gqa", False)) and len(batch) > 0
    shared: tuple[Label, ...] = (*batch[:-1], "g") if grouped else batch
    labels: dict[str, tuple[Label, ...]] = {
        "query": (*batch, "n", "d"),
        "key": (*shared, "m", "d"),
        "value": (*shared, "m", "e"),
        "attn_mask": (*batch, "n", "m"),
    }
    found: list[Operand] = []
    for place, (name, axes) in enumerate(labels.items()):
        if isinstance(operand := rules.argument(node, place, name), fx.Node):
            found.append(Operand(("args", place) if place < len(node.args) else ("kwargs", name), operand, axes))
    return Flow(tuple(found), (*batch, "n", "e"), contracted=frozenset({"m"}), normalised=frozenset({"m"}), reduced=frozenset({"d"}))


def _attend(node: fx.Node) -> Flow | None:
    """The IR's attention, as a pass left it: its positions are those of the tokens that are there.

    query[b, h, n, d] key[b, g, m, d] value[b, g, m, e] tensors[of b h n m] -> [b, h, n, e]
    """
    query, key, value, tensors, text = node.args
    labels: list[tuple[Path, Any, str]] = [(("args", 0), query, "bhnd"), (("args", 1), key, "bgmd"), (("args", 2), value, "bgme")]
    indices = Attend.from_json(str(text)).tensors().values()
    for place, (operand, where) in enumerate(zip(tensors, indices, strict=True)):  # type: ignore[arg-type]
        # A tensor that is read by the number of a token would be read for another token once some have left.
        if letters(where) is None and any({I, J} & index.free_symbols for index in where):
            return None
        axes = letters(where) or "xyzw"[: len(where)]
        labels.append((("args", 3, place), operand, axes.translate(str.maketrans("ij", "nm"))))
    found = tuple(Operand(path, operand, tuple(axes)) for path, operand, axes in labels)
    return Flow(found, tuple("bhne"), contracted=frozenset("m"), normalised=frozenset("m"), reduced=frozenset("d"))


def _attention_statistic(node: fx.Node) -> Flow | None:
    """What keys receive, or what queries give: sums over the tokens that are there.

    query[b, h, n, d] key[b, g, m, d] tensors[of b h n m] lse[b, h, n] -> [b, h, m], or [b, h, n] where every query's is asked for
    """
    query, key, tensors, lse, text = node.args
    statistic = Statistic.from_json(str(text))
    labels: list[tuple[Path, Any, str]] = [(("args", 0), query, "bhnd"), (("args", 1), key, "bgmd")]
    for place, (operand, where) in enumerate(zip(tensors, statistic.tensors().values(), strict=True)):  # type: ignore[arg-type]
        if letters(where) is None and any({I, J} & index.free_symbols for index in where):
            return None
        axes = letters(where) or "xyzw"[: len(where)]
        labels.append((("args", 2, place), operand, axes.translate(str.maketrans("ij", "nm"))))
    if lse is not None:
        labels.append((("args", 3), lse, "bhn"))
    kept, summed = ("m", "n") if statistic.over == "queries" else ("n", "m")
    if kept == "n" and statistic.rows is not None:
        return None
    found = tuple(Operand(path, operand, tuple(axes)) for path, operand, axes in labels)
    return Flow(found, ("b", "h", kept), contracted=frozenset({summed}), normalised=frozenset("m"), reduced=frozenset("d"))


def _einsum(node: fx.Node) -> Flow | None:
    """The labels are the letters; an ellipsis stands for broadcast axes, numbered from the right."""
    equation = node.args[0]
    if not isinstance(equation, str) or "->" not in equation:
        return None
    left, output = equation.replace(" ", "").split("->")
    operands = tensor_arguments(node)
    terms = left.split(",")
    if len(terms) != len(operands):
        return None
    broadcast = max([len(shape_of(n)) - len(t) + 3 for t, (_, n) in zip(terms, operands, strict=True) if "..." in t], default=0)

    def letters(term: str) -> tuple[Label, ...]:
        before, _, after = term.partition("...")
        return (*before, *(range(-broadcast, 0) if "..." in term else ()), *after)

    if any(len(set(letters(term))) != len(letters(term)) for term in terms):
        return None
    if any("..." in t[1:] and len(letters(t)) != len(shape_of(n)) for t, (_, n) in zip(terms, operands, strict=True)):
        return None  # broadcast axes in the middle that an operand lacks
    found = tuple(Operand(path, n, letters(term)) for term, (path, n) in zip(terms, operands, strict=True))
    return Flow(found, letters(output), frozenset(label for o in found for label in o.labels) - set(letters(output)))


def _embedding(node: fx.Node) -> Flow:
    """The index comes first as a function, and its axes stay; the weight has axes of its own."""
    index = next(o for o in tensor_arguments(node) if not example(o[1]).is_floating_point())
    labels: tuple[Label, ...] = _axes(index[1])
    others = tuple(Operand(path, n, tuple(("own", i) for i in _axes(n))) for path, n in tensor_arguments(node) if n is not index[1])
    reduced: frozenset[Label] = frozenset(label for operand in others for label in operand.labels)
    return Flow((Operand(*index, labels), *others), (*labels, ("new", 0)), reduced=reduced)


_PRODUCTS: dict[str, Callable[[fx.Node], Flow | None]] = {
    "matmul": _matmul,
    "bmm": _matmul,
    "mm": _matmul,
    "mv": _matmul,
    "addmm": _matmul,
    "baddbmm": _matmul,
    "einsum": _einsum,
    "scaled_dot_product_attention": _attention,
    "attend": _attend,
    "attention_statistic": _attention_statistic,
    "embedding": _embedding,
    "one_hot": _embedding,
}
