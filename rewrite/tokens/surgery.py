"""Pushing a selection of tokens through everything downstream of where it was made.

The flow of each operator says which axes run over the same tokens. A selection on one of them then holds for all: operands that still
have every token are gathered, sizes written out are replaced, and the result has the selection on the axes it flows to. Where an axis
is sliced, indexed or merged with another, and at the outputs, the tensor is restored first: to what the dropped tokens left with
(`rewrite.tokens.frozen`), or to zeros where that is not known or has no value there, with the kept tokens in place.

The result equals the original model in which the dropped tokens are masked out of every attention downstream, at the kept positions.
What would make it differ (a mean over tokens, a convolution, an operator without a rule) is an error that names the place. Merged tokens
are restored as copies of what they went into, and what computes over these counts each as often as it should.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import fx

from rewrite.ir.selection import LOG_SIZE
from rewrite.tokens import rules
from rewrite.tokens.edits import (
    answer_size_query,
    insert_gather_call,
    insert_restore_call,
    set_argument,
)
from rewrite.tokens.flow import Flow, Group, Label, Operand, axis_flow
from rewrite.tokens.operands import Operands
from rewrite.tokens.placement import Placement, Selection, first_tensor, shape_of
from rewrite.tokens.refusals import reads, refuse, refuse_other_results
from rewrite.tokens.routed import Routed, routed_regions


@dataclass(frozen=True)
class Pushed:
    """Where selections went: `axes` of every node whose tensor is shorter than traced, and the graph outputs that stayed `short`.

    marked: the writes into caches of fixed length that put marks in the places of tokens that left.
    """

    axes: Mapping[fx.Node, Mapping[int, Selection]]
    short: Mapping[fx.Node, Selection]
    marked: frozenset[fx.Node]


def push_selections(
    graph: fx.Graph,
    seeds: Mapping[fx.Node, Mapping[int, Selection]],
    short_outputs: frozenset[fx.Node],
    streams: frozenset[fx.Node] = frozenset(),
    cache_writes: frozenset[fx.Node] = frozenset(),
    whole: Mapping[fx.Node, str] = MappingProxyType({}),
) -> Pushed:
    """Carry the selections of `seeds` through `graph`, in place.

    A seed is a node whose tensor physically has, on the given axes, the selected tokens alone: a gather that was inserted and whose
    users were redirected to it, or a placeholder for a cache that is shorter than traced. Axis 0 of a seed is its batch. A gather from a
    tensor that is short already is a seed with the positions that its tokens had in the full one. Every node keeps the example value it
    was traced with, so the shapes in the graph go on meaning full lengths; so do all numbers in it.

    Outputs are restored to their full length, except those in `short_outputs`. What is made token by token of one of `streams` (the
    residual stream behind selections that say their `source`) is restored with the dropped tokens as they left, all else with zeros. What
    `cache_writes` write is restored with marks: nothing in the graph may read it behind them. whole: seeds that were cut from what must
    have every token, with the pass that cut them.

    Zeros stand also where a loss reads restored logits: the labels at dropped positions must be ignored (-100), and with labels
    shifted by one so must the label that the last dropped token of a run predicts.

    Returns:
        the selected axes of every node, and the output nodes that stayed short, each with the selection on its token axis.

    Raises:
        NotApplicableError: an operator computes over a selected or restored axis, has no rule, or meets two different selections; the
            message names node, operator, module and remedy. The graph is then half rewritten: push into a copy.
    """
    return _Surgery(graph, seeds, short_outputs, streams, cache_writes, whole).run()


def insert_gather(graph: fx.Graph, value: fx.Node, axis: int, selection: Selection, after: fx.Node | None = None) -> fx.Node:
    """The selected tokens of `value` [B, ..., N, ...] along `axis`, inserted after `after` (by default as early as may be)."""
    after = after or max(value, selection.positions)
    with graph.inserting_before(after.next):
        return insert_gather_call(value, value, axis % len(shape_of(value)), selection.positions, _seed_layout(value))


def restore(graph: fx.Graph, value: fx.Node, axis: int, selection: Selection, after: fx.Node | None = None) -> fx.Node:
    """Zeros of the full length with the tokens of the short `value` [B, ..., K, ...] in place, inserted after `after`."""
    after = after or max(value, selection.positions)
    with graph.inserting_before(after.next):
        return insert_restore_call(value, value, axis % len(shape_of(value)), selection, _seed_layout(value))


def _seed_layout(node: fx.Node) -> Placement:
    """Axis 0 is the batch; a batch of one needs no axis."""
    return Placement(batch=None if shape_of(node)[0] == 1 else 0)


class _Surgery:
    def __init__(
        self,
        graph: fx.Graph,
        seeds: Mapping[fx.Node, Mapping[int, Selection]],
        short_outputs: frozenset[fx.Node],
        streams: frozenset[fx.Node],
        cache_writes: frozenset[fx.Node],
        whole: Mapping[fx.Node, str],
    ) -> None:
        self.graph = graph
        self.seeds = seeds
        self.short_outputs = short_outputs
        self.streams = streams
        self.cache_writes = cache_writes
        self.whole = whole
        self.marked: set[fx.Node] = set()
        self.live = _read(graph)
        self.operands = Operands(streams)
        self.placements = self.operands.placements
        self.routed = {node: region for region in routed_regions(graph) for node in region.nodes}

    def run(self) -> Pushed:
        short: dict[fx.Node, Selection] = {}
        for node in list(self.graph.nodes):
            if node in self.seeds:
                self.placements[node] = self.seed(node)
                self.operands.frozen.cut(node, self.seeds[node])
            elif node.op == "output":
                short = self.output(node)
            elif node in self.routed:
                if node is self.routed[node].exit:
                    self.route(self.routed[node])
            elif any(source in self.placements for source in node.all_input_nodes):
                with self.graph.inserting_before(node):
                    self.visit(node)
            if (rules.in_place(node) or rules.name_of(node) == "setitem") and node not in self.cache_writes:
                self.operands.forget(node)
        self.stay_behind()
        return Pushed({node: place.axes for node, place in self.placements.items() if place.axes}, short, frozenset(self.marked))

    def seed(self, node: fx.Node) -> Placement:
        if first_tensor(node) is None:
            refuse(node, "a selection was made on it, and it was traced without a tensor", "seed nodes with an example value")
        shape = shape_of(node)
        axes = {axis % len(shape): selection for axis, selection in self.seeds[node].items()}
        before = {axis for source in node.all_input_nodes if source in self.placements for axis in self.placements[source].axes}
        if before and node in self.whole:
            told = f"{self.whole[node]} chooses among its tokens, and of these some had left in an earlier stack of layers"
            refuse(node, told, "use it with layers that only one of the two has, or a pass that keeps every token")
        if rules.name_of(node) in rules.SPREADS:
            return Placement(axes, batch=_seed_layout(node).batch)
        if before and (rules.name_of(node) not in rules.CUTS or shape_of(node.all_input_nodes[0]) != shape or not before <= axes.keys()):
            refuse(node, "a selection was made where tokens had been dropped before", "gather from what is left, composing the positions")
        if any(axis == 0 or shape[axis] == 1 for axis in axes):
            refuse(node, "a selection was made on the batch or on an axis of size one", "select along a token axis")
        return Placement(axes, batch=_seed_layout(node).batch)

    def visit(self, node: fx.Node) -> None:
        """One operator with a selected or restored operand: edit it, and place its result."""
        name = rules.name_of(node)
        if name in rules.CHOICES or (name in {"split", "split_with_sizes"} and self.operands.split_off(node)):
            return
        if name in rules.SIZES or (name == "getattr" and node.args[1] == "shape"):
            if self.placements.get(node.all_input_nodes[0], Placement()).axes and node.users:
                dim = rules.argument(node, 1, "dim") if name in {"size", "sym_size"} else None
                answer_size_query(node, name, dim, self.placements)
            return
        if node in self.cache_writes:
            self.operands.mark(node, 3)
            self.marked.add(node)
            return
        if name in rules.LOSSES:
            for operand in node.all_input_nodes:
                self.operands.restore(node, operand)
            if first_tensor(node) is not None and len(shape_of(node)):
                self.placements[node] = Placement(restored=frozenset(range(len(shape_of(node)))))
            return
        flow = axis_flow(node)
        if flow is None:
            advice = "make the selection after it, or add a rule for it to rewrite/tokens"
            refuse(node, "it reads selected tokens, and how its axes flow is not known", advice)
        if self.cuts(node, flow) or self.counts(node, flow):
            for source in node.all_input_nodes:
                self.operands.restore(node, source)
            flow = axis_flow(node)
            assert flow is not None
        self.push(node, name, flow)

    def route(self, region: Routed) -> None:
        """A region of experts runs on the tokens that are left, where it is given these."""
        places = [self.placements.get(entry, Placement()) for entry in region.entries]
        chosen = [place.axes.get(0) for place in places]
        if not any(place.axes or place.restored for place in places):
            return
        first = chosen[0]
        if first is None or any(one is None or one.positions is not first.positions for one in chosen):
            refuse(region.nodes[0], "experts are given tokens that were dropped, or put back, beside others", "select after it")
        region.shorten(first.kept)
        self.placements[region.exit] = Placement({0: first}, batch=places[0].batch, rows=places[0].rows)

    def cuts(self, node: fx.Node, flow: Flow) -> bool:
        """Whether the operator merges, splits or cuts a selected axis, or the batch in a way that positions cannot follow."""
        marks = flow.joined[0] if flow.joined else ()
        every_restored = {label for operand in flow.operands for label in self.operands.placed(operand)[2]}
        for operand in flow.operands:
            place, selected, _, batch = self.operands.placed(operand)
            for group in flow.groups:
                if self.operands.refold(node, flow, operand, group) is not None or self.operands.sliced(operand, group)[0]:
                    continue
                joins = set(group.ins) == set(marks) and not every_restored.intersection(marks)
                if selected.keys() & set(group.ins) and not joins:
                    return True
                if batch is not None and batch in group.ins and _regrouped(node, flow, operand, place, group) is None:
                    return True
        return False

    def counts(self, node: fx.Node, flow: Flow) -> bool:
        """Whether the operator computes over merged tokens without their sizes: it is given every token's copy, so that each counts once.

        Attention that is not to count merged tokens by their size (`Selection.sized`) takes them as they are.
        """
        weighed = flow.normalised | flow.contracted
        counted = any(label in flow.reduced or (sized and label in weighed) for label, sized in self.merged(flow))
        return counted and LOG_SIZE not in reads(node)

    def merged(self, flow: Flow) -> list[tuple[Label, bool]]:
        """The axes of the operands on which tokens were merged, and whether these count by their size."""
        own = [(label, selection) for operand in flow.operands for label, selection in self.operands.placed(operand)[1].items()]
        return [(label, selection.sized) for label, selection in own if selection.holders is not None]

    def push(self, node: fx.Node, name: str, flow: Flow) -> None:
        selected: dict[Label, Selection] = {}
        restored: set[Label] = set()
        batch: Label | None = None
        rows = 1
        for operand in flow.operands:
            place, own, zeros, own_batch = self.operands.placed(operand)
            for label, selection in own.items():
                if selected.setdefault(label, selection).positions is not selection.positions:
                    refuse(node, "two different selections of tokens meet on one axis", "use one selection for both")
            if own_batch is not None:
                if batch is not None and (batch, rows) != (own_batch, place.rows):
                    refuse(node, "it combines batches that are laid out differently", "select after it")
                batch, rows = own_batch, place.rows
            restored |= zeros
        refuse_other_results(node, flow, selected, restored, batch, node in self.live)

        if name == "view" and selected:  # a gathered tensor may have other strides than the traced one
            node.target = "reshape"
        self.operands.frozen.note(node, flow, selected)
        for operand in flow.operands:
            self.operands.gather(node, operand, selected, batch, rows)
        if name == "squeeze" and selected and rules.argument(node, 1, "dim") is None:
            node.args = (node.args[0], tuple(i for i, size in enumerate(shape_of(flow.operands[0].node)) if size == 1))

        out = dict(selected)
        zeros = set(restored)
        if flow.joined and set(flow.joined[0]) & selected.keys():
            out[flow.joined[1]] = self.operands.join(flow, selected)
        for group in flow.groups:
            if restored.intersection(group.ins):
                zeros.update(group.outs)
            sliced = next((part for operand in flow.operands for cut, part in [self.operands.sliced(operand, group)] if cut), None)
            if sliced is not None:
                out[group.outs[0]] = sliced
                continue
            refolded = [self.operands.refold(node, flow, operand, group) for operand in flow.operands]
            if refolded and refolded[0] is not None:
                label, out[label], batch = refolded[0]
            elif batch is not None and batch in group.ins:
                holder = next(o for o in flow.operands if self.operands.placed(o)[3] == batch)
                batch, rows = _regrouped(node, flow, holder, self.placements[holder.node], group) or (batch, rows)
        for path, label in flow.sizes.items():
            if label in out:
                set_argument(node, path, out[label].kept)
        axes = {i: out[label] for i, label in enumerate(flow.output) if label in out}
        marks = frozenset(i for i, label in enumerate(flow.output) if label in zeros)
        if axes or marks:
            at = flow.output.index(batch) if batch in flow.output else None
            self.placements[node] = Placement(axes, marks, at, rows)

    def output(self, node: fx.Node) -> dict[fx.Node, Selection]:
        short: dict[fx.Node, Selection] = {}
        with self.graph.inserting_before(node):
            for value in node.all_input_nodes:
                place = self.placements.get(value)
                if place is None or not place.axes or value not in self.short_outputs:
                    self.operands.restore(node, value)
                elif len(place.axes) > 1:
                    refuse(value, "an output that may stay short has dropped tokens on two axes", "have it restored")
                else:
                    (short[value],) = place.axes.values()
        return short

    def stay_behind(self) -> None:
        """Refuse where a later layer is given tokens that left, by what lies between (a convolution over the grid)."""
        reached = set(self.operands.readers)
        for node in self.graph.nodes:
            if node in reached or any(source in reached for source in node.all_input_nodes):
                reached.add(node)
                if node in self.streams:
                    refuse(
                        min(self.operands.readers),
                        "it reads the grid, of which some tokens were dropped, between layers of attention",
                        "select after it",
                    )


def _read(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that an output is made of; what was replaced before is still in the graph."""
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or node in found:
            found.update(node.all_input_nodes)
    return found


def _regrouped(node: fx.Node, flow: Flow, operand: Operand, place: Placement, group: Group) -> tuple[Label, int] | None:
    """Where the batch of a placement is after its axis was merged with others behind it, or split: the label, and the entries per row.

    None where the batch does not run slowest any more, or does not come out whole.
    """
    labels = operand.labels[len(operand.labels) - len(shape_of(operand.node)) :]
    if group.cut or not group.outs or place.batch is None or group.ins[0] != labels[place.batch]:
        return None
    first = shape_of(node)[flow.output.index(group.outs[0])]
    rows = first * place.rows / shape_of(operand.node)[place.batch]
    return (group.outs[0], int(rows)) if getattr(rows, "is_Integer", False) and rows > 0 else None


__all__ = ["Pushed", "Selection", "insert_gather", "push_selections", "restore"]
