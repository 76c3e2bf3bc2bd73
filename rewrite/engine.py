"""The compiler proper: a captured FX graph in, a rewritten FX graph out. It serves `rewrite()` and the torch.compile backend alike."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

import codegen
from rewrite.breaks import Break, break_of
from rewrite.carried import (
    Carried,
    Leaving,
    continue_stacks,
    hand_on,
    hand_over,
    leaving,
    missing,
    receive,
    require_all_or_none,
    require_hidden,
)
from rewrite.cost import GraphCost, graph_cost
from rewrite.graph_time import device_of, operator_costs
from rewrite.ir.passes import Pass
from rewrite.ir.program import Program
from rewrite.ir.selection import first_layer
from rewrite.lower.interface import Allowed, Extra, Produced
from rewrite.lower.program import ProgramLowering
from rewrite.lower.prompts import read_new_keys
from rewrite.names import Names
from rewrite.notes import Note
from rewrite.prediction import Gate
from rewrite.recognise.fixed_caches import cache_writes
from rewrite.recognise.flex import is_flex_attention
from rewrite.recognise.operators import hinted_shape, module_path
from rewrite.recognise.regions import NearMiss, find_regions, interior
from rewrite.recognise.sites import Recognition, recognise
from rewrite.recognise.writes import writes
from rewrite.tokens.chosen import Held
from rewrite.tokens.layout import PatchEmbedding, patch_grid
from rewrite.tokens.visual import visual_merges


@dataclass
class Record:
    """What happened to one graph, for the report.

    operators: what every operator but the sites' own computes and moves, before and after. place: device and type of the computing.
    lowered: names of the sites whose body was replaced. gone: by site, how many tokens of each row have left in front of it.
    merges: visual tokens join a text in this graph. ended: the break that ended it. cut: by name of a site, what it cannot know because of
    an earlier break. keys_kept: by name of a site with a state, why a KV cache keeps its keys all the same. again: the graph was captured
    for another module before. embeddings: the modules that lay out tokens.
    """

    program: Program
    recognition: Recognition
    misses: list[NearMiss]
    patches: list[PatchEmbedding]
    embeddings: list[str]
    before: GraphCost
    after: GraphCost
    kernels: list[codegen.Kernel | codegen.StateKernel]
    operators: tuple[list[GraphCost], list[GraphCost]] = ([], [])
    place: tuple[torch.device, torch.dtype] | None = None
    lowered: frozenset[str] = frozenset()
    gone: Mapping[str, int] = field(default_factory=dict)
    merges: bool = False
    ended: Break | None = None
    cut: Mapping[str, str] = field(default_factory=dict)
    keys_kept: Mapping[str, str] = field(default_factory=dict)
    again: bool = False


@dataclass
class Known:
    """What a call knows of a graph's inputs, by position.

    notes: of cache entries. carried: of activations that an earlier graph made. behind: inputs that lie behind a break and nothing is known
    of, with the break in words. base: the module that the graph runs for, where that is known. prompt: what it writes into KV caches of
    fixed length begins at their first place. uneven: rows of the batch hold different numbers of visual tokens.
    """

    notes: Mapping[int, Note] = field(default_factory=dict)
    carried: Mapping[int, Carried] = field(default_factory=dict)
    behind: Mapping[int, str] = field(default_factory=dict)
    base: str | None = None
    prompt: bool = False
    uneven: bool = False


@dataclass
class RewrittenGraph:
    """A rewritten graph and how it is called.

    layers: by output, the sites of its stack that lie behind it. left: by output, the passes by which tokens left these. chosen: by
    output, how it holds patches of pictures that a pass chose among. marked: outputs, and inputs, that are KV caches of fixed length with
    marks in the places of tokens that left. lost: by output, the site of which it is a part of a KV cache that some tokens left, and no
    later call can go on from.
    """

    module: fx.GraphModule
    extras: list[Extra]
    produced: list[Produced]
    record: Record
    changed: bool
    layers: Mapping[int, tuple[str, ...]]
    left: Mapping[int, tuple[str, ...]]
    chosen: Mapping[int, Held]
    marked: tuple[tuple[int, ...], tuple[int, ...]]
    lost: Mapping[int, str]


@dataclass
class Rewriter:
    """Rewrites graphs for one pass list.

    passes: in running order. names: what module paths in a graph mean in the model, where there is one. proofs: results of verification by
    structure, shared between graphs. allowed: what the rewritten graphs may ask for. depths: how many layers the stack of a site has, by
    name, where it goes on over several graphs. gate: keeps sites as they were that are predicted to be slower.
    """

    passes: tuple[Pass, ...]
    names: Names | None = None
    proofs: dict[str, str | None] = field(default_factory=dict)
    allowed: Allowed = field(default_factory=Allowed)
    depths: dict[str, int] = field(default_factory=dict)
    gate: Gate | None = None

    def plan(self, recognition: Recognition, uneven: bool = False) -> Program:
        """The recognised program after every pass; uneven: rows hold different numbers of visual tokens."""
        program = recognition.program
        for one in self.passes:
            program = one.apply(program)
        program = program if self.gate is None else self.gate.through(program, recognition)
        return program.sized().counted(uneven).padded(_several(recognition))

    def lowering(self, *arguments: Any) -> ProgramLowering:
        """What brings the program into the graph."""
        return ProgramLowering(*arguments)

    def rewrite(self, graph_module: fx.GraphModule, inputs: Sequence[Any], known: Known) -> RewrittenGraph:
        """One graph rewritten. `inputs` are what it was traced with."""
        notes = known.notes
        qualify = self.names.qualify(known.base) if self.names is not None else str
        module = copy_graph(graph_module)
        graph = module.graph
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        noted = {placeholders[index] for index in notes}
        visual_caches = {placeholders[index] for index, note in notes.items() if note.positions is not None or note.groups is not None}
        carried = {placeholders[index]: one for index, one in known.carried.items()}
        extras = receive(graph, placeholders, known.carried)
        if known.prompt and (visual_merges(graph) or any(note.marked for note in notes.values())):
            read_new_keys(graph, cache_writes(graph))
        values = dict(zip(placeholders, inputs, strict=True))
        recognition = recognise(graph, values, qualify, lambda node: node in visual_caches, self.proofs)
        continue_stacks(recognition, carried, self.depths)
        behind = {placeholders[index]: told for index, told in known.behind.items()}
        cut = {entry.site.name: told for entry in recognition.found if (told := missing(entry, behind))}
        left = leaving(graph, recognition, carried) if self.allowed.notes else []
        marked = {placeholders[index] for index, note in notes.items() if note.marked or note.padded}
        program = self.plan(recognition, known.uneven).hiding({entry.site.name for entry in recognition.found if marked & set(entry.cache)})
        require_all_or_none(program, recognition, carried)
        require_hidden(recognition, carried)
        before = graph_cost(graph, {})
        attention = {node for entry in recognition.found for node in interior(entry.region)}
        operators = operator_costs(graph, {}, attention)
        patches = patch_grid(graph)
        work = self.lowering(self.allowed, module, placeholders, notes, recognition, program, extras)
        changed = work.run() if program.touched or program.choices or noted else False
        moved, held = hand_on(graph, recognition) if self.allowed.notes else ([], {})
        produced = work.produced + moved + hand_over(graph, left)
        if changed or extras or produced:
            graph.eliminate_dead_code(is_impure_node=writes)
            graph.lint()
            module.recompile()
        record = Record(
            program=program,
            recognition=recognition,
            misses=recognition.misses + self._enclosed(module, qualify),
            patches=patches,
            embeddings=[qualify(module_path(patch.conv)) for patch in patches],
            before=before,
            after=graph_cost(graph, work.shapes) if changed else before,
            kernels=work.kernels,
            operators=(operators, operator_costs(graph, work.shapes, attention | work.bodies) if changed else operators),
            place=device_of(graph),
            lowered=frozenset(work.lowered),
            gone=work.selections.gone,
            merges=bool(visual_merges(graph_module.graph)),
            ended=break_of(getattr(graph_module, "compile_subgraph_reason", None)),
            cut=cut,
            keys_kept=work.states.declined,
        )
        layers = {one.output: one.layers for one in left}
        gone = {one.output: (*one.left, *_by(program, one)) for one in left}
        return RewrittenGraph(module, work.extras, produced, record, changed, layers, gone, {**work.chosen, **held}, work.marked, work.lost)

    def _enclosed(self, module: fx.GraphModule, qualify: Callable[[str], str]) -> list[NearMiss]:
        """Attention in a body that an operator of the graph runs by itself, as gradient checkpointing does; it is left alone."""
        misses: list[NearMiss] = []
        for node in module.graph.nodes:
            if not isinstance(node.target, torch._ops.HigherOrderOperator) or is_flex_attention(node):
                continue
            for name in (argument.target for argument in node.all_input_nodes if argument.op == "get_attr"):
                body = getattr(module, name, None)
                regions, missed = find_regions(body.graph) if isinstance(body, fx.GraphModule) else ([], [])
                reason = f"it runs inside {node.target.__name__}, whose body is not rewritten; switch gradient checkpointing off"
                paths = [qualify(module_path(region.core)) for region in regions] + [qualify(miss.module) for miss in missed]
                misses += [NearMiss(node.name, path, reason) for path in paths]
        return misses


def _by(program: Program, one: Leaving) -> tuple[str, ...]:
    """The passes by which tokens left the layers behind an output."""
    operations = () if one.stack is None else program.token_operations(one.stack)
    return tuple(dict.fromkeys(each.by for each in operations if first_layer(each) < one.until))


def _several(recognition: Recognition) -> frozenset[int]:
    """The stacks that hold visual tokens of more than one row."""
    streams = [(entry.site.stack, entry.stream) for entry in recognition.found if entry.merge is not None]
    return frozenset(stack for stack, stream in streams if stream is not None and hinted_shape(stream)[0] > 1)


def copy_graph(graph_module: fx.GraphModule) -> fx.GraphModule:
    """The same graph over the same parameters, so that several variants can be made of one capture."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(graph_module.graph, mapping)
    old_output = next(node for node in graph_module.graph.nodes if node.op == "output")
    output = graph.output(result)
    output.meta = copy.copy(old_output.meta)
    return fx.GraphModule(graph_module, graph)
