"""Costs as closed forms: multiply-adds and bytes moved, in the sizes of a site or of an operator.

One multiply-add counts once here; `torch.utils.flop_counter` counts two operations for it. Elementwise work is left out of
multiply-adds, as it is there, and is part of the bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import sympy
import torch
from torch import fx

import codegen
from rewrite.ir.operations import (
    Attend,
    DepthwiseConv,
    Operation,
    PlainOperation,
    Pool,
    RegionRoutes,
    ReinforceHeads,
    SparseMap,
    Statistic,
    Sum,
)
from rewrite.ir.plain_operations import Axes
from rewrite.ir.site import Site
from rewrite.recognise.operators import argument, canonical, hinted_shape, value_of

SIZES: Mapping[str, sympy.Symbol] = {
    name: sympy.Symbol(name, integer=True, positive=True)
    for name in ("B", "H", "Hkv", "Nq", "Nk", "D", "Dv", "P", "pairs", "k", "itemsize")
}
_S = SIZES


def _put(formula: sympy.Expr, sizes: Mapping[str, int]) -> sympy.Expr:
    """The formula with what is known of its sizes."""
    found = sympy.sympify(formula)
    return found.subs({symbol: sizes[symbol.name] for symbol in found.free_symbols if symbol.name in sizes})


@dataclass(frozen=True)
class Cost:
    """multiply_adds and bytes as expressions, and the sizes to put into them."""

    multiply_adds_formula: sympy.Expr
    bytes_formula: sympy.Expr
    sizes: tuple[tuple[str, int], ...]

    @property
    def multiply_adds(self) -> int:
        return int(self._value(self.multiply_adds_formula))

    @property
    def bytes(self) -> int:
        return int(self._value(self.bytes_formula))

    def _value(self, formula: sympy.Expr) -> sympy.Expr:
        return _put(formula, dict(self.sizes))


@dataclass(frozen=True)
class GraphCost:
    """Totals of a whole graph at the traced shapes: multiply-adds of every contraction, bytes of their operands and results."""

    multiply_adds: int = 0
    bytes: int = 0

    def __add__(self, other: GraphCost) -> GraphCost:
        return GraphCost(self.multiply_adds + other.multiply_adds, self.bytes + other.bytes)


def attention_cost(sizes: Mapping[str, int], itemsize: int, materialised: bool) -> Cost:
    """Softmax attention: B H pairs (D + Dv) multiply-adds; bytes of query, key, value and result, and of the map where it is written.

    A materialised map moves four times: the scores are written and read by the softmax, its result is written and read again.
    """
    fused = _S["B"] * (_S["H"] * _S["Nq"] * (_S["D"] + _S["Dv"]) + _S["Hkv"] * _S["Nk"] * (_S["D"] + _S["Dv"]))
    moved = fused + (4 * _S["B"] * _S["H"] * _S["Nq"] * _S["Nk"] if materialised else 0)
    pairs = {"pairs": sizes["Nq"] * sizes["Nk"], **sizes, "itemsize": itemsize}
    return Cost(_S["B"] * _S["H"] * _S["pairs"] * (_S["D"] + _S["Dv"]), _S["itemsize"] * moved, tuple(sorted(pairs.items())))


def original_cost(site: Site, itemsize: int, materialised: bool) -> Cost:
    """The cost of a site as the model computes it: every pair of query and key, whatever its mask hides (as torch counts it too)."""
    return attention_cost(site.dims, itemsize, materialised)


@dataclass(frozen=True)
class OperationCost:
    """One operation of a body. sizes: those of an attention's own operands, by name."""

    operation: Operation
    sizes: Mapping[str, int]
    multiply_adds: int
    bytes: int


def operation_costs(site: Site, itemsize: int) -> list[OperationCost]:
    """What `rewritten_cost` adds up, operation by operation."""
    if len(site.body.operations) == 1:
        cost = rewritten_cost(site, itemsize)
        return [OperationCost(site.body.operations[0], site.dims, cost.multiply_adds, cost.bytes)]
    sizes = {**site.dims, "itemsize": itemsize}
    return [
        OperationCost(operation, own, int(_put(multiply_adds, sizes)), int(itemsize * _put(moved, sizes)))
        for operation, own, multiply_adds, moved in _body_parts(site)
    ]


def rewritten_cost(site: Site, itemsize: int) -> Cost:
    """The cost of a site's body as it is lowered: no map is written, and pairs that positions alone hide are not computed."""
    if len(site.body.operations) > 1:
        return _body_cost(site, itemsize)
    cost = attention_cost(site.dims, itemsize, materialised=False)
    formula, counts = codegen.multiply_adds_formula(site.attend, site.dims)
    return replace(cost, multiply_adds_formula=formula, sizes=tuple(sorted({**dict(cost.sizes), **counts}.items())))


def _body_cost(site: Site, itemsize: int) -> Cost:
    """The sum over a body's operations."""
    parts = _body_parts(site)
    multiply_adds = sum((part[2] for part in parts), sympy.Integer(0))
    moved = sum((part[3] for part in parts), sympy.Integer(0))
    return Cost(multiply_adds, _S["itemsize"] * moved, tuple(sorted({**site.dims, "itemsize": itemsize}.items())))


def _body_parts(site: Site) -> list[tuple[Operation, dict[str, int], sympy.Expr, sympy.Expr]]:
    """Every operation of a body with the sizes of an attention's operands, its multiply-adds, and the elements that it moves.

    Numbers of tokens follow from the pooling operations, widths from the feature maps.
    """
    parts: list[tuple[Operation, dict[str, int], sympy.Expr, sympy.Expr]] = []
    tokens: dict[str, int] = {"query": site.dims["Nq"], "key": site.dims["Nk"], "value": site.dims["Nk"]}
    axes: dict[str, Axes] = {
        name: Axes(site.dims[heads], tokens[name], site.dims[width])
        for name, heads, width in (("query", "H", "D"), ("key", "Hkv", "D"), ("value", "Hkv", "Dv"))
    }
    # Tokens that were not cut into heads yet.
    axes |= {name: Axes(1, site.dims["Nq"], site.dims[width]) for name, width in (("hidden", "C"), ("input", "Cin")) if width in site.dims}
    for operation in site.body.operations:
        multiply_adds: sympy.Expr = sympy.Integer(0)
        moved: sympy.Expr = sympy.Integer(0)
        sizes = site.dims
        match operation:
            case Pool():
                tokens[operation.result] = math.prod(operation.size)
                axes[operation.result] = axes[operation.source]._replace(tokens=tokens[operation.result])
                moved += _S["B"] * _S["H"] * _S["D"] * (tokens[operation.source] + tokens[operation.result])
            case Attend():
                n_queries, n_keys = tokens[operation.query], tokens[operation.key]
                tokens[operation.result] = n_queries
                seen, read = axes[operation.key], axes[operation.value]
                axes[operation.result] = Axes(site.dims["H"], n_queries, read.width)
                own = {"Hkv": seen.heads, "Nq": n_queries, "Nk": n_keys, "D": seen.width, "Dv": read.width}
                sizes = {**site.dims, **own}
                formula, counts = codegen.multiply_adds_formula(operation, sizes)
                multiply_adds += _put(formula, {**counts, **{name: size for name, size in own.items() if size != site.dims[name]}})
                channels = sum(_S[name] if own[name] == site.dims[name] else own[name] for name in ("D", "Dv"))
                moved += _S["B"] * _S["H"] * (n_queries + n_keys) * channels
            case DepthwiseConv():
                tokens[operation.result], axes[operation.result] = tokens[operation.source], axes[operation.source]
                taps = next(math.prod(each.shape[2:]) for each in site.body.parameters if each.name == operation.weight)
                multiply_adds += _S["B"] * _S["H"] * _S["Dv"] * math.prod(operation.grid) * taps
                moved += 2 * _S["B"] * _S["H"] * _S["Dv"] * tokens[operation.source]
            case Statistic():
                n_queries, n_keys = tokens[operation.attend.query], tokens[operation.attend.key]
                multiply_adds += _S["B"] * _S["H"] * codegen.visible_pairs(operation.attend.mask, n_queries, n_keys) * _S["D"]
                moved += _S["B"] * _S["H"] * ((n_queries + n_keys) * _S["D"] + n_keys)
            case ReinforceHeads():
                tokens[operation.result], axes[operation.result] = tokens[operation.output], axes[operation.output]
                multiply_adds += _S["B"] * _S["H"] * _S["Dv"] * tokens[operation.output]
                # Two outputs are read, one is written.
                moved += 3 * _S["B"] * _S["H"] * _S["Dv"] * tokens[operation.output]
            case RegionRoutes():
                multiply_adds += _S["B"] * _S["H"] * _S["D"] * math.prod(operation.regions) ** 2
                moved += _S["B"] * _S["D"] * (_S["H"] * tokens[operation.query] + _S["Hkv"] * tokens[operation.key])
            case SparseMap():
                (narrow, _), (length, rank) = (
                    next(each.shape for each in site.body.parameters if each.name == name) for name in (operation.weight, operation.down)
                )
                # Narrowed, keys brought down, the coefficients, and the map from those of them that are kept.
                multiply_adds += _S["B"] * length * narrow * (_S["H"] + _S["Hkv"]) * _S["D"]
                multiply_adds += _S["B"] * length * rank * narrow * (_S["H"] + _S["Hkv"]) + _S["B"] * _S["H"] * length**2 * rank
                moved += _S["B"] * _S["D"] * length * (_S["H"] + _S["Hkv"])
            case PlainOperation():
                given = {field: axes[name] for field, name in operation.reads().items() if name in axes}
                axes[operation.result] = operation.axes(given)
                tokens[operation.result] = axes[operation.result].tokens
                multiply_adds += _S["B"] * operation.cost(given)
                moved += _S["B"] * sum(math.prod(each) for each in (*given.values(), axes[operation.result]))
            case Sum() if operation.terms[0] in axes:  # of tensors by token and channel; a sum may name a mask anew
                tokens[operation.result], axes[operation.result] = tokens[operation.terms[0]], axes[operation.terms[0]]
            case _:
                pass
        parts.append((operation, sizes, multiply_adds, moved))
    return parts


def node_itemsize(node: fx.Node) -> int:
    """Bytes of one element of a traced tensor."""
    value = value_of(node)
    return value.element_size() if isinstance(value, torch.Tensor) else 0


def _count_fused_attention_on_cpu() -> None:
    """torch's FLOP counter has formulas for every fused attention but the CPU's; give it those, as for the others."""
    from torch.utils import flop_counter

    aten = torch.ops.aten
    pairs = (
        (aten._scaled_dot_product_flash_attention_for_cpu, flop_counter.sdpa_flop),
        (aten._scaled_dot_product_flash_attention_for_cpu_backward, flop_counter.sdpa_backward_flop),
    )
    for operator, formula in pairs:
        if operator not in flop_counter.flop_registry:
            flop_counter.flop_registry[operator] = formula


_count_fused_attention_on_cpu()

Shapes = Mapping[fx.Node, Mapping[int, int]]


def _shape(node: fx.Node, shapes: Shapes) -> list[int]:
    """A node's traced shape with the axes on which tokens have left since."""
    shape: list[int] = list(hinted_shape(node))
    for axis, extent in shapes.get(node, {}).items():
        shape[axis] = extent
    return shape


def _linear(node: fx.Node, shapes: Shapes) -> int:
    source, weight = argument(node, "input"), argument(node, "weight")
    assert isinstance(source, fx.Node)
    assert isinstance(weight, fx.Node)
    return math.prod(_shape(source, shapes)) * hinted_shape(weight)[0]


def _matmul(node: fx.Node, shapes: Shapes) -> int:
    source = argument(node, "input")
    assert isinstance(source, fx.Node)
    return math.prod(_shape(node, shapes)) * _shape(source, shapes)[-1]


def _baddbmm(node: fx.Node, shapes: Shapes) -> int:
    left = argument(node, "batch1")
    assert isinstance(left, fx.Node)
    return math.prod(_shape(node, shapes)) * _shape(left, shapes)[-1]


def _conv(node: fx.Node, shapes: Shapes) -> int:
    weight = argument(node, "weight")
    assert isinstance(weight, fx.Node)
    return math.prod(_shape(node, shapes)) * math.prod(hinted_shape(weight)[1:])


def _attention(node: fx.Node, shapes: Shapes) -> int:
    query, key, value = (
        node.args[place] if place < len(node.args) else node.kwargs[name] for place, name in enumerate(("query", "key", "value"))
    )
    assert isinstance(query, fx.Node)
    assert isinstance(key, fx.Node)
    assert isinstance(value, fx.Node)
    rows, columns = math.prod(_shape(query, shapes)[:-1]), _shape(key, shapes)[-2]
    return rows * columns * (_shape(query, shapes)[-1] + _shape(value, shapes)[-1])


def _einsum(node: fx.Node, shapes: Shapes) -> int:
    equation, *operands = node.args
    if not isinstance(equation, str) or "." in equation or not all(isinstance(operand, fx.Node) for operand in operands):
        return 0
    sizes: dict[str, int] = {}
    for letters, operand in zip(equation.replace(" ", "").split("->")[0].split(","), operands, strict=True):
        assert isinstance(operand, fx.Node)
        sizes.update(zip(letters, _shape(operand, shapes), strict=True))
    return math.prod(sizes.values())


_NODE_COST: Mapping[str, Callable[[fx.Node, Shapes], int]] = {
    "linear": _linear,
    "matmul": _matmul,
    "baddbmm": _baddbmm,
    "conv": _conv,
    "attention": _attention,
    "einsum": _einsum,
}


def node_cost(node: fx.Node, shapes: Shapes) -> GraphCost:
    """Multiply-adds of a node (none where it is no contraction) and bytes of its operands and result, with tokens gone as in `shapes`."""
    formula = _NODE_COST.get(canonical(node))
    touched = [entry for entry in (node, *node.all_input_nodes) if isinstance(value_of(entry), torch.Tensor)]
    moved = sum(math.prod(_shape(entry, shapes)) * node_itemsize(entry) for entry in touched)
    return GraphCost(formula(node, shapes) if formula is not None else 0, moved)


def graph_cost(graph: fx.Graph, shapes: Shapes) -> GraphCost:
    """Multiply-adds and bytes of every contraction of a graph of the original model, with tokens gone on the axes in `shapes`."""
    contractions = (node for node in graph.nodes if canonical(node) in _NODE_COST and isinstance(value_of(node), torch.Tensor))
    return sum((node_cost(node, shapes) for node in contractions), GraphCost())
