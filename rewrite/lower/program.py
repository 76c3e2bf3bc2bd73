"""A program into its graph: every changed site lowered, streams cut where tokens leave, and what the graph takes and gives beside.

What is given beside: parameters that passes add, and what is known of KV cache entries (see `rewrite.notes`).
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

from torch import fx

import codegen
from rewrite.ir.errors import ModelCallError, NotApplicableError
from rewrite.ir.operations import Attend, Body, Grouping, PlainOperation, ReceivedSinks, Sum
from rewrite.ir.program import Program
from rewrite.ir.selection import LOG_SIZE, PRESENT, Select, first_layer
from rewrite.ir.site import Site
from rewrite.lower import functions
from rewrite.lower.cache_outputs import entries_of, parts_of
from rewrite.lower.cursor import Cursor
from rewrite.lower.interface import Allowed, Extra, Produced
from rewrite.lower.lowering import lower_site, traced
from rewrite.lower.mask_reading import Given, read_masks
from rewrite.lower.present import PresentKeys
from rewrite.lower.recurrence import StateCaches
from rewrite.lower.relaid import elements_laid
from rewrite.lower.selections import Selections
from rewrite.lower.short_caches import ShortCaches, mark_padding
from rewrite.notes import Note
from rewrite.recognise.fixed_caches import cache_writes
from rewrite.recognise.sites import Found, Recognition
from rewrite.tokens.chosen import Choice, Held
from rewrite.tokens.placement import Selection
from rewrite.tokens.surgery import push_selections
from rewrite.tokens.visual import visual_mask_node


class ProgramLowering:
    """Lowers one program into one graph."""

    def __init__(
        self,
        allowed: Allowed,
        module: fx.GraphModule,
        placeholders: list[fx.Node],
        notes: Mapping[int, Note],
        recognition: Recognition,
        program: Program,
        extras: list[Extra],
    ) -> None:
        self.allowed, self.graph = allowed, module.graph
        self.placeholders, self.notes = placeholders, notes
        self.recognition, self.program = recognition, program
        self.extras = extras
        self.produced: list[Produced] = []
        self.kernels: list[codegen.Kernel | codegen.StateKernel] = []
        self.shapes: dict[fx.Node, dict[int, int]] = {}
        self.lowered: set[str] = set()
        self.bodies: set[fx.Node] = set()
        self.states = StateCaches(self)
        self.caches = ShortCaches(placeholders, notes, self.taken)
        self.present = PresentKeys(self.graph, self.caches.left, self.caches.present)
        self.selections = Selections(self.graph, recognition, program, self._visual, self._parameter, allowed.data_sizes, self.present)
        self.chosen: dict[int, Held] = {}
        self.added_outputs: list[fx.Node | int] = []
        self.lost: dict[int, str] = {}
        self.marked: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
        self._masks: dict[fx.Node, fx.Node] = {}
        self._parameters: dict[str, fx.Node] = {}
        self._read_sites: dict[str, tuple[Site, Given]] = {}
        self.output = next(node for node in self.graph.nodes if node.op == "output")

    def run(self) -> bool:
        own = set(self.graph.nodes)
        changed = self.lower_sites()
        self.bodies = set(self.graph.nodes) - own
        self._emit()
        self.states.run(self._changed())
        for one in self.program.choices:
            self._choose(one)
            changed = True
        if self.program.token_operations() or any(note.positions is not None for note in self.notes.values()):
            self._drop_tokens()
            changed = True
        if self.added_outputs:
            self.output.args = ((*self.output.args[0], *self.added_outputs),)
        return changed

    # Sites

    def lower_sites(self) -> bool:
        """Lower every site that the passes changed; whether there is one."""
        changed = self._changed()
        for entry, site in changed:
            self._lower(entry, site)
        return bool(changed)

    def _changed(self) -> list[tuple[Found, Site]]:
        found = ((self.recognition.by_name(site.name), site) for site in self.program.sites)
        return [(entry, self._read(entry, site)[0]) for entry, site in found if site.body != entry.site.body]

    def _read(self, entry: Found, site: Site) -> tuple[Site, Given]:
        """The site, its masks read as far as that helps, and what they read then. Masks of tokens that leave stay as they are."""
        if site.name not in self._read_sites:
            leaving = self.program.token_operations() or any(note.positions is not None for note in self.notes.values())
            self._read_sites[site.name] = (site, {}) if leaving else read_masks(site, entry.region)
        return self._read_sites[site.name]

    def put(self, entry: Found, site: Site, given: dict[str, fx.Node]) -> dict[str, fx.Node]:
        """Put the site's body in the place of its region; the body's nodes by IR name."""
        return lower_site(self.graph, site, entry.region, given)

    def _lower(self, entry: Found, site: Site) -> None:
        given: dict[str, fx.Node] = {}
        for parameter in site.body.parameters:
            given[parameter.name] = self._parameter(f"{site.name}.{parameter.name}", parameter)
        groups = [operation for operation in site.body.operations if isinstance(operation, Grouping)]
        if groups:
            self._require_every_key(site, groups[0])
            if not isinstance(groups[0], ReceivedSinks):
                if entry.stream is None:
                    raise NotApplicableError(f"{site.name}: the hidden states that enter its layer were not found")
                given["hidden"] = entry.stream
                given["visual"] = self._visual(entry)
            cached = self._cached_groups(entry, groups[0].noted)
            if cached is not None:
                given["cached_groups"] = cached
            elif site.cached and isinstance(groups[0], ReceivedSinks):
                raise NotApplicableError(
                    f"{site.name} reads a KV cache, and which of its keys are attention sinks is not known: start from the prompt"
                )
        elif "visual" in _reads(site.body):
            given["visual"] = self._visual(entry)
        for name, node in (("hidden", entry.stream), ("input", entry.projected)):
            if name in _reads(site.body) and node is not None:
                given[name] = node
        if LOG_SIZE in _reads(site.body):
            given[LOG_SIZE] = self.selections.sizes.stand_in(entry)
        if PRESENT in _reads(site.body):
            given[PRESENT] = self.present.of(entry)
        for name, (node, axes) in self._read_sites[site.name][1].items():
            with self.graph.inserting_before(entry.region.output):
                index = tuple(slice(None) if axis in axes else 0 for axis in "bhij")
                given[name] = traced(self.graph.call_function(operator.getitem, (node, index)))
        self.lowered.add(site.name)
        lowered = self.put(entry, site, given)
        self.selections.results[site.name] = lowered[site.body.result]
        if groups:
            outputs = entries_of(list(self.output.args[0]), entry.region.key.node)
            if outputs:
                self._require_notes(site.name)
                self.produced.append(Produced(groups[0].noted, outputs))
                self.added_outputs.append(lowered[groups[0].result])

    def _require_every_key(self, site: Site, grouping: Grouping) -> None:
        """Keys are sorted into groups by all tokens of a prompt, and what a KV cache notes of groups counts all of them."""
        by = [one.by for one in self.program.token_operations(site.stack) if first_layer(one) <= site.layer and site.layout.visual]
        if by and not isinstance(grouping, ReceivedSinks):
            own = ", ".join(one for one in self.program.passes_of(site) if one not in by)
            raise NotApplicableError(
                f"{site.name}: {own} sorts its keys into groups, for which all visual tokens must be there, and {by[0]} leaves some; "
                f"leave one of the two out, or let the tokens leave in front of a later layer than those that {own} changes"
            )

    def _parameter(self, name: str, parameter: Any) -> fx.Node:
        if not self.allowed.parameters:
            raise NotApplicableError(
                f"{name}: the pass adds parameters to the model, which needs rewrite(model, passes, example_inputs=...)"
            )
        self.allowed.added[name] = parameter
        if name not in self._parameters:
            self._parameters[name] = self._extra(Extra("parameter", name=name))
        return self._parameters[name]

    def _extra(self, extra: Extra) -> fx.Node:
        last = [node for node in self.graph.nodes if node.op == "placeholder"][-1]
        with self.graph.inserting_after(last):
            node = self.graph.placeholder(f"rewrite_{extra.kind}_{len(self.extras)}")
        self.extras.append(extra)
        return node

    def _visual(self, entry: Found) -> fx.Node:
        """[B, N] bool: which of the new tokens are visual."""
        assert entry.stream is not None
        if entry.merge is not None:
            if entry.merge.node not in self._masks:
                self._masks[entry.merge.node] = visual_mask_node(self.graph, entry.merge)
            return self._masks[entry.merge.node]
        with self.graph.inserting_after(entry.stream):
            return self.graph.call_function(functions.no_visual, (entry.stream,))

    def _cached_groups(self, entry: Found, noted: str) -> fx.Node | None:
        """What a site's cached keys were given, from the field `noted` of a note."""
        for cached in entry.cache:
            index = self.placeholders.index(cached)
            note = self.notes.get(index)
            if note is not None and getattr(note, noted) is not None:
                groups = self._extra(Extra(noted, index=index))
                length = self._extra(Extra("length", index=index))
                with self.graph.inserting_after(length):
                    return self.graph.call_function(functions.padded_groups, (groups, length))
        return None

    def taken(self, kind: str, index: int) -> fx.Node:
        """What the note of the input `index` says."""
        return self._extra(Extra(kind, index=index))

    def returns(self, values: Mapping[str, fx.Node | int], outputs: tuple[int, ...]) -> None:
        """Return beside the outputs what is known of them, by kind."""
        for kind, node in values.items():
            self.produced.append(Produced(kind, outputs))
            self.added_outputs.append(node)

    def _require_notes(self, site: str) -> None:
        if not self.allowed.notes:
            raise NotApplicableError(
                f"{site}: the passes keep something beside the KV cache, which torch.compile(backend='rewrite') has no place for; "
                "use rewrite(model, passes), or call the model with use_cache=False"
            )

    def _emit(self) -> None:
        """One kernel per distinct attention of the rewritten sites, statistics among them; those with a state have kernels for it too."""
        members: dict[tuple[str, bool], list[tuple[str, Any]]] = {}
        sites = {site.name: site for _, site in self._changed()}
        for name, site in sites.items():
            for attend, values in filter(None, map(codegen.kernel_attention, site.body.operations)):
                members.setdefault((attend.to_json(), values), []).append((name, attend))
        for (_, values), entries in members.items():
            names = tuple(dict.fromkeys(name for name, _ in entries))
            passes = tuple(dict.fromkeys(by for name in names for by in self.program.passes_of(sites[name])))
            self.kernels.append(codegen.emit(entries[0][1], names, passes, values))
            if values and codegen.has_triton_state(entries[0][1]) is None:
                self.kernels.append(codegen.emit_state(entries[0][1], names, passes))

    # Tokens

    def _drop_tokens(self) -> None:
        """Cut streams where tokens leave, and push that through all that follows."""
        short: set[fx.Node] = set()
        results = list(self.output.args[0])
        noted = {self.placeholders[index] for index, note in self.notes.items() if note.positions is not None}
        shortened = [*self.selections.stacks.shortened(), *(entry for entry in self.recognition.found if noted & set(entry.cache))]
        going_on = next((entry.site for entry in shortened if entry.site.fixed and entry.site.cached), None)
        if going_on is not None:
            by = self.program.token_operations(going_on.stack)[0].by
            raise ModelCallError(
                f"{going_on.name}: {by} takes visual tokens out of a call that goes on from a KV cache of fixed length (a static cache), "
                "or reads it in a way that is not followed: give the pictures in the first call, or use a cache that grows with the tokens"
            )
        for entry in shortened:
            for operand in (entry.region.key, entry.region.value):
                short |= {results[index] for index in entries_of(results, operand.node)}
                self.lost.update(dict.fromkeys(parts_of(results, operand.node), entry.site.name))
        self.selections.run()
        caches = self.caches.seeds()
        seeds = {**self.selections.seeds, **caches, **self.present.seeds(caches)}
        if not seeds:
            return
        writes = cache_writes(self.graph)
        if short or self.lost or any(entry.writes for entry in shortened):
            asked = self.program.token_operations()
            self._require_notes(asked[0].by if asked else "token_exit")
        written, cut = frozenset(write.node for write in writes), self.selections
        pushed = push_selections(self.graph, seeds, frozenset(short), cut.streams, written, cut.whole)
        fixed = {node for write in writes if write.node in pushed.marked for node in (write.cache, write.node)}
        outputs, inputs = (tuple(index for index, node in enumerate(nodes) if node in fixed) for nodes in (results, self.placeholders))
        self.marked = outputs, inputs
        self.shapes = {node: self._kept_sizes(axes) for node, axes in pushed.axes.items()}
        for known, indices in mark_padding(self.output, pushed.short):
            self.returns(known, indices)
        self._tell_kept()

    def _tell_kept(self) -> None:
        """Return which tokens each site sees, for whoever asks."""
        sites: dict[tuple[Any, Any, Any], tuple[str, ...]] = {}
        for name, seen in self.selections.seen.items():
            key = (seen.places or seen.positions, seen.length, seen.holders)
            sites[key] = (*sites.get(key, ()), name)
        for values, names in sites.items():
            for kind, value in zip(("kept", "length", "holders"), values, strict=True):
                if value is not None:
                    self.produced.append(Produced(kind, (), names))
                    self.added_outputs.append(value)
        for name, features in self.selections.routed.items():
            self.produced.append(Produced("routed", (), (name,)))
            self.added_outputs.append(features)

    def _choose(self, one: Select) -> None:
        """Return which patches of pictures stay in a later graph."""
        if not self.allowed.notes:
            raise NotApplicableError(
                f"{one.by} chooses in this graph which patches stay in a later one, which torch.compile(backend='rewrite') has no place to "
                "note; use rewrite(model, passes)"
            )
        read, stay, made = self.selections.choose(one)
        choice = Choice(one.by, read.site.name, stay.share, made is not None)
        self.chosen.update({index: Held(choice, picture) for index, picture in read.results})
        outputs = tuple(index for index, _ in read.results)
        if outputs:
            self.returns({"stay": stay.mask} if made is None else {"stay": stay.mask, "made": made}, outputs)
        for index, found in read.relaid:
            self.chosen[index] = Held(choice, relaid=True)
            self.returns({"stay": elements_laid(found, stay.mask, Cursor(self.graph, max(stay.mask, found.node)))}, (index,))

    def _kept_sizes(self, axes: Mapping[int, Selection]) -> dict[int, int]:
        kept = {**self.selections.kept, **self.caches.kept}
        return {axis: kept[selection.positions] for axis, selection in axes.items() if selection.positions in kept}


def _reads(body: Body) -> set[str]:
    """The tensors that a body reads beside the query, key and value of its attentions."""
    read: set[str] = set()
    for operation in body.operations:
        if isinstance(operation, PlainOperation):
            read.update(operation.reads().values())
        read.update(operation.tensors() if isinstance(operation, Attend) else operation.terms if isinstance(operation, Sum) else ())
    return read
