"""The compiler proper: a captured FX graph in, a rewritten FX graph out. It serves `rewrite()` and the torch.compile backend alike."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

import codegen
from rewrite.cost import GraphCost, graph_cost
from rewrite.ir.passes import Pass
from rewrite.ir.program import Program
from rewrite.lower.program import Allowed, Extra, Produced, ProgramLowering
from rewrite.notes import Note
from rewrite.recognise.operators import module_path
from rewrite.recognise.regions import NearMiss, find_regions
from rewrite.recognise.sites import Recognition, recognise
from rewrite.tokens.layout import PatchEmbedding, patch_grid
from rewrite.tokens.visual import visual_merges


@dataclass
class Record:
    """What happened to one graph, for the report.

    lowered: names of the sites whose body was replaced. gone: by stack, how many tokens of each row leave it.
    merges: visual tokens join a text in this graph.
    """

    program: Program
    recognition: Recognition
    misses: list[NearMiss]
    patches: list[PatchEmbedding]
    before: GraphCost
    after: GraphCost
    kernels: list[codegen.Kernel]
    lowered: frozenset[str] = frozenset()
    gone: Mapping[int, int] = field(default_factory=dict)
    merges: bool = False


@dataclass
class RewrittenGraph:
    """A rewritten graph and how it is called."""

    module: fx.GraphModule
    extras: list[Extra]
    produced: list[Produced]
    record: Record
    changed: bool


@dataclass
class Rewriter:
    """Rewrites graphs for one pass list.

    passes: in running order. qualify: module path in a graph -> qualified name in the model. proofs: results of verification by
    structure, shared between graphs. allowed: what the rewritten graphs may ask for.
    """

    passes: tuple[Pass, ...]
    qualify: Callable[[str], str] = lambda path: path
    proofs: dict[str, str | None] = field(default_factory=dict)
    allowed: Allowed = field(default_factory=Allowed)

    def plan(self, recognition: Recognition) -> Program:
        """The recognised program after every pass."""
        program = recognition.program
        for one in self.passes:
            program = one.apply(program)
        return program

    def rewrite(self, graph_module: fx.GraphModule, inputs: Sequence[Any], notes: Mapping[int, Note]) -> RewrittenGraph:
        """One graph rewritten. `inputs` are what it was traced with; `notes` those of cache entries among them, by position."""
        module = copy_graph(graph_module)
        graph = module.graph
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        noted = {placeholders[index] for index in notes}
        visual_caches = {placeholders[index] for index, note in notes.items() if note.positions is not None or note.groups is not None}
        recognition = recognise(
            graph,
            dict(zip(placeholders, inputs, strict=True)),
            self.qualify,
            lambda node: node in visual_caches,
            self.proofs,
        )
        program = self.plan(recognition)
        before = graph_cost(graph, {})
        patches = patch_grid(graph)
        work = ProgramLowering(self.allowed, module, placeholders, notes, recognition, program)
        changed = work.run() if program.touched or noted else False
        if changed:
            graph.eliminate_dead_code()
            graph.lint()
            module.recompile()
        record = Record(
            program=program,
            recognition=recognition,
            misses=recognition.misses + self._enclosed(module),
            patches=patches,
            before=before,
            after=graph_cost(graph, work.shapes) if changed else before,
            kernels=work.kernels,
            lowered=frozenset(work.lowered),
            gone=work.gone,
            merges=bool(visual_merges(graph_module.graph)),
        )
        return RewrittenGraph(module, work.extras, work.produced, record, changed)

    def _enclosed(self, module: fx.GraphModule) -> list[NearMiss]:
        """Attention in a body that an operator of the graph runs by itself, as gradient checkpointing does; it is left alone."""
        misses: list[NearMiss] = []
        for node in module.graph.nodes:
            if not isinstance(node.target, torch._ops.HigherOrderOperator):
                continue
            for name in (argument.target for argument in node.all_input_nodes if argument.op == "get_attr"):
                body = getattr(module, name, None)
                regions, missed = find_regions(body.graph) if isinstance(body, fx.GraphModule) else ([], [])
                reason = f"it runs inside {node.target.__name__}, whose body is not rewritten; switch gradient checkpointing off"
                paths = [self.qualify(module_path(region.core)) for region in regions] + [self.qualify(miss.module) for miss in missed]
                misses += [NearMiss(node.name, path, reason) for path in paths]
        return misses


def copy_graph(graph_module: fx.GraphModule) -> fx.GraphModule:
    """The same graph over the same parameters, so that several variants can be made of one capture."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(graph_module.graph, mapping)
    old_output = next(node for node in graph_module.graph.nodes if node.op == "output")
    output = graph.output(result)
    output.meta = copy.copy(old_output.meta)
    return fx.GraphModule(graph_module, graph)
