"""Capture with torch.compile, recognise with the real inputs, and run the module with every site lowered as it was read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

import codegen  # noqa: F401  registers the attention operator that a lowered site calls
from rewrite.engine import copy_graph
from rewrite.lower.lowering import lower_site
from rewrite.recognise.operators import canonical
from rewrite.recognise.sites import Recognition, recognise
from rewrite.recognise.verify import verify
from rewrite.recognise.writes import writes


@dataclass
class Capture:
    """A torch.compile backend that keeps what was recognised and runs the graph with its sites re-emitted (or as it is)."""

    lower: bool = False
    graphs: list[fx.GraphModule] = field(default_factory=list)
    recognitions: list[Recognition] = field(default_factory=list)
    inputs: list[dict[fx.Node, Any]] = field(default_factory=list)
    proofs: list[str | None] = field(default_factory=list)

    def __call__(self, module: fx.GraphModule, example_inputs: list[Any]) -> Any:
        ready: list[fx.GraphModule] = []

        def run(*arguments: Any) -> Any:
            if not ready:
                ready.append(self._prepare(module, arguments))
            return ready[0].forward(*arguments)

        return run

    def _prepare(self, module: fx.GraphModule, arguments: tuple[Any, ...]) -> fx.GraphModule:
        copied = copy_graph(module)
        placeholders = [node for node in copied.graph.nodes if node.op == "placeholder"]
        inputs = dict(zip(placeholders, arguments, strict=True))
        recognition = recognise(copied.graph, inputs)
        self.graphs.append(copied)
        self.recognitions.append(recognition)
        self.inputs.append(inputs)
        if self.lower:
            self.proofs = [verify(entry.region) for entry in recognition.found]
            for entry in recognition.found:
                lower_site(copied.graph, entry.site, entry.region, {})
            copied.graph.eliminate_dead_code(is_impure_node=writes)
            copied.graph.lint()
            copied.recompile()
        return copied

    @property
    def recognition(self) -> Recognition:
        """The recognition of the one graph there is."""
        (only,) = self.recognitions
        return only


def recognised(model: nn.Module, *inputs: Tensor) -> Recognition:
    """What is recognised in a module called with these inputs."""
    capture = Capture()
    with torch.no_grad():
        torch.compile(model, backend=capture, fullgraph=True, dynamic=False)(*inputs)
    return capture.recognition


def relowered(model: nn.Module, *inputs: Tensor) -> tuple[Any, Capture]:
    """The module's output with every site lowered as it was read, and the capture."""
    capture = Capture(lower=True)
    with torch.no_grad():
        result = torch.compile(model, backend=capture, fullgraph=True, dynamic=False)(*inputs)
    return result, capture


def names(graph: fx.Graph) -> list[str]:
    """The canonical names of a graph's operators."""
    return [canonical(node) for node in graph.nodes if canonical(node)]
