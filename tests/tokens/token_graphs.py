"""Small traced graphs, as a compiler backend gets them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from rewrite.tokens.gather import gather_tokens, scatter_tokens
from rewrite.tokens.placement import expression
from rewrite.tokens.surgery import Pushed, Selection, push_selections

B, N, K, C, H = 2, 6, 4, 8, 2
POSITIONS = torch.tensor([[0, 2, 3, 5], [1, 2, 4, 5]])


def traced(function: Callable[..., Any], *inputs: Any, dynamic: bool | None = False) -> fx.GraphModule:
    """The graph that Dynamo makes of `function`."""
    modules: list[fx.GraphModule] = []
    given: list[Any] = []

    def backend(module: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        modules.append(module)

        def run(*arguments: Any) -> Any:
            given.extend(arguments)
            return module.forward(*arguments)

        return run

    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True):
        torch.compile(function, backend=backend, dynamic=dynamic, fullgraph=True)(*inputs)
    (module,) = modules
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    copied = fx.GraphModule(module, graph)
    copied.meta["inputs"] = given
    return copied


def pushed(
    function: Callable[..., Any],
    *inputs: Any,
    short: dict[int, int] | None = None,
    stay: bool = False,
    positions: Tensor = POSITIONS,
    dynamic: bool | None = False,
) -> tuple[Any, Pushed]:
    """`function` run with some inputs short (input -> axis; by default the first on axis 1), and what the surgery said.

    `stay`: outputs stay short.
    """
    short = {0: 1} if short is None else short
    module = traced(function, *inputs, dynamic=dynamic)
    graph = module.graph
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    names = [f"L_{name}_" for name in inspect.signature(function).parameters]
    numbers = {node: names.index(str(node.target)) for node in placeholders if str(node.target) in names}
    cut = {node: short[i] for node, i in numbers.items() if i in short}
    positions = positions[: inputs[0].shape[0]]
    with graph.inserting_before(placeholders[0]):
        node = graph.placeholder("positions")

    def selection(tensor: fx.Node, axis: int) -> Selection:
        size = tensor.meta["example_value"].shape[axis]
        length = size if isinstance(size, int) else next(n for n in placeholders if expression(n) == expression(size))
        return Selection(node, length, positions.shape[1])

    seeds = {tensor: {axis: selection(tensor, axis)} for tensor, axis in cut.items()}
    output = next(n for n in graph.nodes if n.op == "output")
    result = push_selections(graph, seeds, frozenset(output.all_input_nodes) if stay else frozenset())
    graph.lint()
    given = zip(placeholders, module.meta["inputs"], strict=True)
    values = [gather_tokens(value, positions, cut[tensor]) if tensor in cut else value for tensor, value in given]
    outputs = fx.GraphModule(module, graph)(positions, *values)
    return (outputs[0] if len(outputs) == 1 else outputs), result


def zeroed(value: Tensor, axis: int = 1, positions: Tensor = POSITIONS) -> Tensor:
    """`value` with the dropped tokens set to zero."""
    positions = positions[: value.shape[0]]
    return scatter_tokens(gather_tokens(value, positions, axis), positions, axis, value.shape[axis])
