"""IR to FX: a site's region is replaced by the nodes of its body."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from rewrite.ir.operations import (
    Attend,
    DepthwiseConv,
    GridBias,
    Operation,
    PlainOperation,
    Pool,
    ReceivedSinks,
    RegionRoutes,
    ReinforceHeads,
    SinkGroups,
    SparseMap,
    Statistic,
    Sum,
    VisualGroups,
)
from rewrite.ir.site import Site
from rewrite.lower import functions
from rewrite.lower.cursor import Cursor
from rewrite.recognise.operators import value_of
from rewrite.recognise.region import Region, SizeOf


def lower_site(graph: fx.Graph, site: Site, region: Region, given: Mapping[str, fx.Node]) -> dict[str, fx.Node]:
    """Replace the region's output by the site's body, and return the body's nodes by IR name.

    given: as for `lower_body`. The nodes that the region no longer needs are left to dead-code elimination.
    """
    result, values = lower_body(graph, site, region, given)
    result.meta["example_value"] = value_of(region.output)
    region.output.replace_all_uses_with(result)
    return values


def lower_body(graph: fx.Graph, site: Site, region: Region, given: Mapping[str, fx.Node]) -> tuple[fx.Node, dict[str, fx.Node]]:
    """The site's body in front of the region's output: the node of its result, and the body's nodes by IR name.

    Every new node gets the value it would have been traced with.

    given: nodes for operands that are not the region's own ("hidden", "visual", "cached_groups") and for added parameters, by IR name.
    """
    values: dict[str, fx.Node] = dict(given)
    old = set(graph.nodes)
    with graph.inserting_before(region.output):
        values.update({name: _operand(graph, region, name, operand.node) for name, operand in region.operands().items()})
        for operation in site.body.operations:
            if isinstance(operation, PlainOperation):
                _plain_operation(graph, operation, values)
            else:
                _LOWER[type(operation)](graph, operation, values)
        result = values[site.body.result]
        if region.output_order != (0, 1, 2, 3):
            result = graph.call_method("permute", (result, region.output_order))
        if region.output_shape is not None:
            result = _viewed(graph, result, region.output_shape)
    _trace_new(graph, old, region)
    return result, values


def lower_statistic(
    graph: fx.Graph, statistic: Statistic, region: Region, copies: Mapping[fx.Node, fx.Node], given: Mapping[str, fx.Node] | None = None
) -> fx.Node:
    """The statistic of a region's attention, computed beside it from its queries, keys and tensors.

    copies: nodes to take in the place of those that the region reads; the statistic then follows the last of them. given: as for
    `lower_body`.
    """
    old = set(graph.nodes)
    read = ("query", "key", *statistic.tensors())
    values: dict[str, fx.Node] = dict(given or {})
    with graph.inserting_after(max(copies.values())) if copies else graph.inserting_before(region.output):
        at = graph.call_function(operator.getitem, ((0,), 0))
    with graph.inserting_before(at):
        for name in read:
            if name in values:
                continue
            node = region.operands()[name].node
            values[name] = _operand(graph, region, name, copies.get(node, node))
        _statistic(graph, statistic, values)
    graph.erase_node(at)
    _trace_new(graph, old, region)
    return values[statistic.result]


def lower_operand(at: Cursor, region: Region, name: str) -> fx.Node:
    """An operand of a region, as the IR lays it out, at the cursor."""
    old = set(at.graph.nodes)
    marker = at.call(operator.getitem, ((0,), 0))
    with at.graph.inserting_before(marker):
        result = _operand(at.graph, region, name, region.operands()[name].node)
    at.last = marker.prev
    at.graph.erase_node(marker)
    _trace_new(at.graph, old, region)
    return result


def traced(node: fx.Node) -> fx.Node:
    """The node, with the value that its inputs' traced values make."""
    _trace(node)
    return node


def _operand(graph: fx.Graph, region: Region, name: str, node: fx.Node) -> fx.Node:
    """An operand of a region, which is `node` or a copy of it, as the IR lays it out."""
    operand, dtype = region.operands()[name], _tensor(region.output).dtype
    traced = _tensor(operand.node).dtype
    for method, arguments in operand.layout.steps():
        node = _viewed(graph, node, arguments[0]) if method == "reshape" else graph.call_method(method, (node, *arguments))  # type: ignore[arg-type]
    # Under autocast the contraction ran in the output's type; an operand in another one is brought to it.
    return graph.call_method("to", (node, dtype)) if name in ("query", "key", "value") and traced != dtype else node


def _trace_new(graph: fx.Graph, old: set[fx.Node], region: Region) -> None:
    """Say of every new node where it comes from and what it would have been traced with."""
    for node in graph.nodes:
        if node not in old:
            node.meta.setdefault("nn_module_stack", region.output.meta.get("nn_module_stack"))
            _trace(node)


def _viewed(graph: fx.Graph, node: fx.Node, shape: object) -> fx.Node:
    """A view of the node; lengths that change from call to call are read off the node itself."""
    assert isinstance(shape, tuple)
    lengths: list[int | fx.Node] = []
    for length in shape:
        if isinstance(length, SizeOf):
            own = graph.call_method("size", (node, length.axis))
            lengths.append(graph.call_function(operator.floordiv, (own, length.divisor)) if length.divisor != 1 else own)
        else:
            lengths.append(length)
    return graph.call_method("reshape", (node, tuple(lengths)))


def _trace(node: fx.Node) -> None:
    """Give a node the value that its inputs' traced values make, where they all have one."""
    if any(value_of(source) is None for source in node.all_input_nodes):
        return
    arguments, keywords = fx.map_arg(node.args, value_of), fx.map_arg(dict(node.kwargs), value_of)
    fake = next((value.fake_mode for value in map(value_of, node.all_input_nodes) if isinstance(value, FakeTensor)), nullcontext())
    with torch.no_grad(), fake:
        if node.op == "call_method":
            node.meta["example_value"] = getattr(arguments[0], str(node.target))(*arguments[1:], **keywords)
        elif callable(node.target):
            node.meta["example_value"] = node.target(*arguments, **keywords)


def _tensor(node: fx.Node) -> torch.Tensor:
    value = value_of(node)
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{node.name} is not a tensor")
    return value


def _attend(graph: fx.Graph, operation: Attend, values: dict[str, fx.Node]) -> None:
    tensors = [values[name] for name in operation.tensors()]
    both = graph.call_function(
        torch.ops.rewrite.attend.default,
        (values[operation.query], values[operation.key], values[operation.value], tensors, operation.to_json()),
    )
    values[operation.result] = graph.call_function(operator.getitem, (both, 0))


def _statistic(graph: fx.Graph, operation: Statistic, values: dict[str, fx.Node]) -> None:
    """The log-sum-exp is the attention's own, where the body computes that too."""
    attend, tensors = operation.attend, [values[name] for name in operation.tensors()]
    saved = next((node for node in graph.nodes if _computes(node, attend, values)), None)
    lse = None if saved is None else graph.call_function(operator.getitem, (saved, 1))
    values[operation.result] = graph.call_function(
        torch.ops.rewrite.attention_statistic.default, (values[attend.query], values[attend.key], tensors, lse, operation.to_json())
    )


def _computes(node: fx.Node, attend: Attend, values: dict[str, fx.Node]) -> bool:
    """Whether the node is the attention itself, of the same operands."""
    if node.op != "call_function" or node.target is not torch.ops.rewrite.attend.default:
        return False
    query, key, _, tensors, text = node.args
    return (
        (query, key) == (values[attend.query], values[attend.key])
        and tensors == [values[name] for name in attend.tensors()]
        and text == attend.to_json()
    )


def _pool(graph: fx.Graph, operation: Pool, values: dict[str, fx.Node]) -> None:
    values[operation.result] = graph.call_function(
        functions.pool, (values[operation.source], operation.grid, operation.size, operation.prefix)
    )


def _depthwise_conv(graph: fx.Graph, operation: DepthwiseConv, values: dict[str, fx.Node]) -> None:
    tensors = (values[name] for name in (operation.source, operation.weight, operation.bias))
    values[operation.result] = graph.call_function(functions.depthwise_conv, (*tensors, operation.grid, operation.prefix))


def _grid_bias(graph: fx.Graph, operation: GridBias, values: dict[str, fx.Node]) -> None:
    tensors = (values[name] for name in (operation.table, operation.rows, operation.columns))
    prefix = None if operation.prefix is None else values[operation.prefix]
    values[operation.result] = graph.call_function(functions.grid_bias, (*tensors, prefix, operation.grid, operation.transposed))


def _sum(graph: fx.Graph, operation: Sum, values: dict[str, fx.Node]) -> None:
    total = values[operation.terms[0]]
    for term in operation.terms[1:]:
        total = graph.call_function(operator.add, (total, values[term]))
    values[operation.result] = total


def _sink_groups(graph: fx.Graph, operation: SinkGroups, values: dict[str, fx.Node]) -> None:
    results = graph.call_function(
        functions.sink_groups,
        (
            values[operation.hidden],
            values[operation.visual],
            values.get("cached_groups"),
            operation.dims,
            operation.threshold,
            operation.epsilon,
        ),
    )
    for place, name in enumerate((operation.result, operation.active, operation.count)):
        values[name] = graph.call_function(operator.getitem, (results, place))


def _visual_groups(graph: fx.Graph, operation: VisualGroups, values: dict[str, fx.Node]) -> None:
    results = graph.call_function(functions.visual_groups, (values[operation.visual], values.get("cached_groups")))
    for place, name in enumerate((operation.result, operation.active)):
        values[name] = graph.call_function(operator.getitem, (results, place))


def _received_sinks(graph: fx.Graph, operation: ReceivedSinks, values: dict[str, fx.Node]) -> None:
    """Behind a KV cache the attention that keys receive is not looked at, and not computed."""
    cached, query = values.get("cached_groups"), values[operation.query]
    values[operation.result] = (
        graph.call_function(functions.received_sinks, (values[operation.received], query, operation.threshold, operation.heads))
        if cached is None
        else graph.call_function(functions.kept_sinks, (cached, query))
    )


def _reinforce_heads(graph: fx.Graph, operation: ReinforceHeads, values: dict[str, fx.Node]) -> None:
    tensors = (values[name] for name in (operation.output, operation.without, operation.active))
    values[operation.result] = graph.call_function(functions.reinforce_heads, (*tensors, operation.heads, operation.factor))


def _region_routes(graph: fx.Graph, operation: RegionRoutes, values: dict[str, fx.Node]) -> None:
    tensors = (values[name] for name in (operation.query, operation.key))
    facts = (operation.grid, operation.regions, operation.topk, operation.prefix)
    values[operation.result] = graph.call_function(functions.region_routes, (*tensors, *facts))


def _sparse_map(graph: fx.Graph, operation: SparseMap, values: dict[str, fx.Node]) -> None:
    tensors = (values[name] for name in (operation.query, operation.key))
    parameters = tuple(values[name] for name in (operation.weight, operation.bias, operation.down, operation.up))
    facts = (operation.keys, operation.scale, operation.coefficients, operation.threshold, operation.prefix)
    values[operation.result] = graph.call_function(functions.sparse_map, (*tensors, parameters, *facts))


def _plain_operation(graph: fx.Graph, operation: PlainOperation, values: dict[str, fx.Node]) -> None:
    reads = operation.reads()
    first, *others = (values[name] for name in reads.values())
    target = functions.token_by_token if operation.token_by_token else functions.plain_operation
    values[operation.result] = graph.call_function(
        target, (first, type(operation).__name__, tuple(reads), tuple(others), operation.facts())
    )


_LOWER: Mapping[type[Operation], Callable[[fx.Graph, Any, dict[str, fx.Node]], None]] = {
    Attend: _attend,
    Pool: _pool,
    DepthwiseConv: _depthwise_conv,
    GridBias: _grid_bias,
    Sum: _sum,
    SinkGroups: _sink_groups,
    VisualGroups: _visual_groups,
    ReceivedSinks: _received_sinks,
    ReinforceHeads: _reinforce_heads,
    RegionRoutes: _region_routes,
    SparseMap: _sparse_map,
    Statistic: _statistic,
}
