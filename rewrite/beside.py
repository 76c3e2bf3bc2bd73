"""A model run as it is, with every site that the passes change seen beside: its operands, its output, and both forms as functions.

The rewritten bodies are taken out of the graph: whoever observes a site gets the tensors that the original made, and may run either form on
them, with gradients or a clock. Nothing of what the model computes changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from rewrite.engine import Rewriter
from rewrite.ir.passes import Pass
from rewrite.ir.program import Program
from rewrite.ir.site import Site
from rewrite.lower.lowering import lower_body
from rewrite.lower.program import ProgramLowering
from rewrite.recognise.region import Region
from rewrite.recognise.regions import interior
from rewrite.recognise.sites import Found, Recognition

Values = Mapping[fx.Node, Any]


@dataclass(frozen=True)
class Function:
    """Some nodes of a graph as a function of the values in front of them."""

    inputs: tuple[fx.Node, ...]
    module: fx.GraphModule

    def __call__(self, values: Values) -> torch.Tensor:
        result: torch.Tensor = self.module(*(values[node] for node in self.inputs))
        return result


@dataclass(frozen=True)
class SiteFunctions:
    """One site, before and after the passes.

    site: as recognised. changed: as the passes left it. original, body: the region's own nodes and the lowered body, functions that give
    the region's output. region: how operands lie. given: nodes of what a body reads beside ("hidden", "visual") and of added parameters, by
    IR name. owners: the pass that added each parameter, by IR name.
    """

    site: Site
    changed: Site
    original: Function
    body: Function
    region: Region
    given: Mapping[str, fx.Node]
    owners: Mapping[str, Pass]

    def inputs(self) -> tuple[fx.Node, ...]:
        """Every node whose value an observer is given, the region's output last."""
        operands = tuple(operand.node for operand in self.region.operands().values())
        before = dict.fromkeys((*self.original.inputs, *self.body.inputs, *operands, *self.given.values()))
        return (*before, self.region.output)

    def operands(self, values: Values) -> dict[str, torch.Tensor]:
        """The site's operands as the IR has them, by name."""
        return {name: operand.layout.apply(values[operand.node]) for name, operand in self.region.operands().items()}

    def output(self, values: Values) -> torch.Tensor:
        """What the original computed."""
        result: torch.Tensor = values[self.region.output]
        return result


Observe = Callable[[SiteFunctions, dict[fx.Node, Any]], None]


class Observer(nn.Module):
    """Stands in a graph behind a site's region, and hands the site's values on as the graph runs past it."""

    _is_impure = True  # what `fx.Node.is_impure` asks of a module: it is called for what it does

    def __init__(self, functions: SiteFunctions, observe: Observe) -> None:
        super().__init__()
        self.functions, self.observe, self.nodes = functions, observe, functions.inputs()

    def forward(self, *values: Any) -> None:
        self.observe(self.functions, dict(zip(self.nodes, values, strict=True)))


@dataclass
class Observing(Rewriter):
    """Puts an observer behind every site that the passes change, in place of changing it."""

    observe: Observe = field(kw_only=True)
    owners: dict[tuple[str, str], Pass] = field(default_factory=dict)

    def plan(self, recognition: Recognition, uneven: bool = False) -> Program:
        program = recognition.program
        for one in self.passes:
            program = one.apply(program)
            for site in program.sites:
                for parameter in site.body.parameters:
                    self.owners.setdefault((site.name, parameter.name), one)
        return program

    def lowering(self, *arguments: Any) -> ProgramLowering:
        return _BesideLowering(*arguments, rewriter=self)


class _BesideLowering(ProgramLowering):
    """Lowers every changed site beside its region. Tokens stay, and no kernel is emitted."""

    def __init__(self, *arguments: Any, rewriter: Observing) -> None:
        super().__init__(*arguments)
        self.rewriter = rewriter
        self.module: fx.GraphModule = arguments[1]

    def run(self) -> bool:
        self.lower_sites()
        self.states.run([])
        self.produced.clear()
        self.added_outputs.clear()
        return bool(self.lowered)

    def put(self, entry: Found, site: Site, given: dict[str, fx.Node]) -> dict[str, fx.Node]:
        graph, region = self.graph, entry.region
        there = set(graph.nodes)
        result, values = lower_body(graph, site, region, given)
        body = [node for node in graph.nodes if node not in there]
        owners = {each.name: self.rewriter.owners[site.name, each.name] for each in site.body.parameters}
        functions = SiteFunctions(
            entry.site, site, _function(self.module, sorted(_behind_operands(region)), region.output),
            _function(self.module, body, result), region, dict(given), owners,
        )  # fmt: skip
        # Without the functions that are copies of them, the body's nodes have no reader.
        for node in reversed(body):
            graph.erase_node(node)
        name = f"rewrite_observer_{len(self.lowered)}"
        self.module.add_submodule(name, Observer(functions, self.rewriter.observe))
        with graph.inserting_after(region.output):
            graph.call_module(name, functions.inputs())
        return {**values, **given}


def _behind_operands(region: Region) -> Iterator[fx.Node]:
    """The region's nodes that depend on its operands; what does not (a mask that all layers share) is made once and given."""
    inside = sorted(interior(region))
    reached = {operand.node for operand in region.operands().values()}
    for node in inside:
        if node is region.output or any(source in reached for source in node.all_input_nodes):
            reached.add(node)
            yield node


def _function(module: fx.GraphModule, nodes: Sequence[fx.Node], result: fx.Node) -> Function:
    graph, mapping = fx.Graph(), dict[fx.Node, fx.Node]()
    own = set(nodes)
    sources = dict.fromkeys(source for node in nodes for source in node.all_input_nodes if source not in own)
    inputs = tuple(source for source in sources if source.op != "get_attr")
    for source in inputs:
        mapping[source] = graph.placeholder(source.name)
    for node in (*(source for source in sources if source.op == "get_attr"), *nodes):
        mapping[node] = graph.node_copy(node, mapping.__getitem__)
    graph.output(mapping[result])
    return Function(inputs, fx.GraphModule(module, graph))
