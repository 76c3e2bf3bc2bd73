"""One captured graph as a callable: its rewritten variants, and what passes between them and the KV cache."""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import fx

from rewrite.carried import Carried, is_activation
from rewrite.engine import Known, Record, Rewriter, RewrittenGraph
from rewrite.ir.errors import NotApplicableError
from rewrite.names import Witness
from rewrite.notes import Note
from rewrite.recognise.fixed_caches import cache_writes, from_start
from rewrite.recognise.operators import value_of
from rewrite.recognise.uneven import rows_differ, visual_masks
from rewrite.states import stand_in, with_note
from rewrite.tokens.chosen import Chosen, Held
from rewrite.tokens.marks import unmarked

InnerBackend = str | Callable[..., Any]

# Scoped to our own calls: they let what depends on data stay in one graph, the merge of visual features with the layers that follow.
WHOLE_GRAPHS: dict[str, Any] = {"capture_scalar_outputs": True, "capture_dynamic_output_shape_ops": True}

_NUMBERS = itertools.count()


@dataclass(frozen=True)
class KeptTokens:
    """The tokens that an attention site sees of a stream that some left.

    positions: int64 [B, K], their places among all; one at `length` is a token that was made of several others, or none:
    padding of a row that keeps fewer than others. length: how many there
    were. holders: int64 [B, length], where tokens were merged: which of the K each one went into; None elsewhere.
    """

    positions: torch.Tensor
    length: int
    holders: torch.Tensor | None = None

    @property
    def mask(self) -> torch.Tensor:
        """bool [B, length]: which tokens are left."""
        seen = self.positions.new_zeros(len(self.positions), self.length + 1, dtype=torch.bool)
        return seen.scatter(1, self.positions, True)[:, :-1]


class Call(Protocol):
    """What a running call of a rewritten model offers its graphs."""

    def noted(self, value: torch.Tensor) -> tuple[torch.Tensor, Note] | None:
        """The real cache entry and its note behind an input, or None where nothing is known of it."""

    def produce(self, value: torch.Tensor, note: Note) -> None:
        """Note a cache entry that the graph returned."""

    def carried(self, value: torch.Tensor) -> Carried | None:
        """What an earlier graph of the call knew of an activation."""

    def behind(self, value: torch.Tensor) -> str | None:
        """The break between an activation and the graphs before, in words; None where the user gave it."""

    def carry(self, value: torch.Tensor, known: Carried) -> None:
        """Note an activation that the graph returned."""

    def keep(self, sites: tuple[str, ...], kept: KeptTokens) -> None:
        """Tell whoever asked which tokens some sites see."""

    def route(self, site: str, features: torch.Tensor) -> None:
        """Tell whoever asked what a router in front of a site's layer is given."""

    def parameter(self, name: str) -> torch.Tensor:
        """A parameter that a pass added."""

    def graph(self, record: Record) -> AbstractContextManager[None]:
        """What a graph runs inside."""


class NoCall:
    """For graphs that run outside `rewrite()`: no caches are noted and no parameters added."""

    def noted(self, value: torch.Tensor) -> tuple[torch.Tensor, Note] | None:
        return None

    def produce(self, value: torch.Tensor, note: Note) -> None:
        raise RuntimeError("a cache was noted outside a call")

    def carried(self, value: torch.Tensor) -> Carried | None:
        return None

    def behind(self, value: torch.Tensor) -> str | None:
        return None

    def carry(self, value: torch.Tensor, known: Carried) -> None:
        raise RuntimeError("an activation was noted outside a call")

    def keep(self, sites: tuple[str, ...], kept: KeptTokens) -> None:
        pass  # nobody can have asked

    def route(self, site: str, features: torch.Tensor) -> None:
        pass

    def parameter(self, name: str) -> torch.Tensor:
        raise RuntimeError(f"no parameter {name} outside a call")

    def graph(self, record: Record) -> AbstractContextManager[None]:
        return nullcontext()


@dataclass
class Variant:
    """A rewritten graph, compiled."""

    graph: RewrittenGraph
    run: Callable[..., Any]


@dataclass
class CompiledGraph:
    """What a backend returns for one captured graph.

    Variants differ in which inputs are noted cache entries, in what is carried with which input, and in the module the graph runs for.

    current: gives the running call. inner: the torch.compile backend that receives the rewritten graph.
    """

    graph_module: fx.GraphModule
    rewriter: Rewriter
    inner: InnerBackend
    current: Callable[[], Call]
    on_record: Callable[[Record], None]
    variants: dict[tuple[Any, ...], Variant] = field(default_factory=dict)
    witness: Witness | None = None

    def __post_init__(self) -> None:
        self.floating = [index for index, node in enumerate(self._placeholders()) if is_activation(node)]
        self.writes = cache_writes(self.graph_module.graph)
        self.masks = visual_masks(self.graph_module.graph)

    def _placeholders(self) -> list[fx.Node]:
        return [node for node in self.graph_module.graph.nodes if node.op == "placeholder"]

    def prepare(self, inputs: Sequence[Any]) -> Variant:
        """The variant for these inputs, made where there is none yet."""
        notes, carried, names = self._notes(inputs), self._carried(inputs), self.rewriter.names
        if names is not None and not self.variants:
            self.witness = names.witness(self._placeholders(), inputs)
        base = names.base(self.witness, inputs) if names is not None else None
        shared: dict[int, int] = {}
        of_caches = tuple(
            (
                index,
                note.groups is not None,
                note.sinks is not None,
                note.state is not None,
                note.marked,
                note.padded,
                None if note.positions is None else shared.setdefault(id(note.positions), index),
            )
            for index, (_, note) in notes.items()
        )
        of_activations = tuple((index, known.kind) for index, known in carried.items())
        call_inputs = dict(zip(self._placeholders(), inputs, strict=True))
        prompt = from_start(self.writes, call_inputs)
        # Numbers that differ need a size that the data decide, which other backends than eager have no place for.
        uneven = self.inner == "eager" and rows_differ(self.masks, call_inputs, [known.visual for known in carried.values()])
        key = (of_caches, of_activations, base, prompt, uneven)
        if key not in self.variants:
            told = {index: words for index in self.floating if (words := self.current().behind(inputs[index])) is not None}
            behind = {index: words for index, words in told.items() if index not in carried}
            known = Known({index: note for index, (_, note) in notes.items()}, carried, behind, base, prompt, uneven)
            rewritten = self.rewriter.rewrite(self.graph_module, inputs, known)
            rewritten.record.again = bool(self.variants)
            decided = [one.by for one in rewritten.record.program.exits if one.when is not None]
            if decided and self.inner != "eager":
                raise NotApplicableError(
                    f"{decided[0]}: the data decide as the graph runs how many tokens stay, which needs backend='eager'; or give a layer"
                )
            self.on_record(rewritten.record)
            self.variants[key] = Variant(rewritten, self._compiled(rewritten.module))
        return self.variants[key]

    def _carried(self, inputs: Sequence[Any]) -> dict[int, Carried]:
        call = self.current()
        found = ((index, call.carried(inputs[index])) for index in self.floating)
        return {index: known for index, known in found if known is not None}

    def _notes(self, inputs: Sequence[Any]) -> dict[int, tuple[torch.Tensor, Note]]:
        call = self.current()
        found = ((index, call.noted(value)) for index, value in enumerate(inputs) if isinstance(value, torch.Tensor) and value.ndim == 4)
        return {index: noted for index, noted in found if noted is not None}

    def _compiled(self, module: fx.GraphModule) -> Callable[..., Any]:
        if self.inner == "eager":
            return module.forward
        # Compiled at its first call and by itself: the rewritten graph's shapes are not those the capture traced. What the capture knows to
        # change is said to it, or it would compile once for the sizes of the first call and again for all others.
        dynamic = [(index, axis) for index, node in enumerate(self._placeholders()) for axis in _changing(node)]
        numbers = [index for index, node in enumerate(self._placeholders()) if isinstance(value_of(node), torch.SymInt)]
        sources = ",".join(f"L['values'][{index}]" for index in numbers)
        compiled = torch.compile(_function_of(module), backend=self.inner)

        def run(*values: Any) -> Any:
            for index, axis in dynamic:
                torch._dynamo.maybe_mark_dynamic(values[index], axis)
            with torch.compiler.config.patch(dynamic_sources=sources), torch._dynamo.config.patch(**WHOLE_GRAPHS):  # type: ignore[attr-defined]
                return compiled(*values)

        return run

    def __call__(self, *inputs: Any) -> Any:
        variant = self.prepare(inputs)
        notes = self._notes(inputs)
        call = self.current()
        values = [notes[index][0] if index in notes else value for index, value in enumerate(inputs)]
        for extra in variant.graph.extras:
            if extra.kind == "parameter":
                values.append(call.parameter(extra.name))
            elif extra.kind in ("visual", "features"):
                values.append(getattr(call.carried(inputs[extra.index]), extra.kind))
            elif extra.kind in ("stay", "made"):
                values.append(getattr(getattr(call.carried(inputs[extra.index]), "chosen", None), extra.kind))
            elif extra.kind == "present":
                values.append(unmarked(notes[extra.index][0]))
            else:
                values.append(getattr(notes[extra.index][1], extra.kind))
        with call.graph(variant.graph.record):
            results = variant.run(*values)
        produced, layers, chosen = variant.graph.produced, variant.graph.layers, variant.graph.chosen
        count = len(results) - len(produced)
        facts = dict_of(produced, results[count:])
        for sites, known in of_sites(produced, results[count:]).items():
            if "kept" in known:
                call.keep(sites, KeptTokens(known["kept"], int(known["length"]), known.get("holders")))
            if "routed" in known:
                call.route(sites[0], known["routed"])
        results = list(results)
        for index in facts.keys() | layers.keys() | chosen.keys():
            known = facts.get(index, {})
            if "state" in known:
                # The results keep the real keys of a prompt whose mask no state can follow.
                if bool(known["held"]):
                    heads, width = results[index].shape[1], results[index].shape[3]
                    entry = (heads, width, results[index].dtype)
                    note = Note(None, known["seen"].shape[1], state=known["state"], seen=known["seen"], entry=entry)
                    results[index] = stand_in(note)
                    call.produce(results[index], note)
            elif index in layers or index in chosen:
                of_pictures = None
                if index in chosen:
                    held = chosen[index]
                    of_pictures = _chosen(held, known, results[index])
                left = variant.graph.left.get(index, ())
                call.carry(results[index], Carried(known.get("visual"), known.get("features"), layers.get(index, ()), of_pictures, left))
            else:
                results[index] = self._noted(call, results[index], known)
        for index, site in variant.graph.lost.items():
            entry = results[index]
            note = Note(None, entry.shape[2], entry=(entry.shape[1], entry.shape[3], entry.dtype), kept=entry, lost=site)
            results[index] = stand_in(note)
            call.produce(results[index], note)
        outputs, given = variant.graph.marked
        for entry in (*(results[index] for index in outputs), *(inputs[index] for index in given)):
            note = Note(None, entry.shape[2], marked=True)
            call.produce(with_note(entry, note), note)
        return results[:count]

    @staticmethod
    def _noted(call: Call, entry: torch.Tensor, known: Mapping[str, Any]) -> torch.Tensor:
        """What the cache is to hold for an entry that the graph returned: itself, or what stands in for one that tokens left."""
        positions, length = known.get("positions"), int(known.get("length", entry.shape[-2]))
        note = Note(positions, length, known.get("groups"), known.get("sinks"), padded=known.get("padded", False))
        held = entry
        if positions is not None:
            note = replace(note, entry=(entry.shape[1], entry.shape[3], entry.dtype), kept=entry)
            held = stand_in(note)
        call.produce(held, note)
        return held


def _chosen(held: Held, known: Mapping[str, Any], result: torch.Tensor) -> Chosen:
    """What is known of the patches in a result."""
    if held.lost is not None:
        return Chosen(held.choice, result.new_empty(0, dtype=torch.bool), lost=held.lost)
    chosen = Chosen(held.choice, known["stay"], known.get("made"), held.relaid).of(held.picture)
    if held.relaid:
        return chosen
    # All pictures may be one axis of the result.
    made = None if chosen.made is None else chosen.made.reshape(result.shape).to(result.dtype)
    return replace(chosen, stay=chosen.stay.reshape(result.shape[:-1]), made=made)


def _function_of(module: fx.GraphModule) -> Callable[..., Any]:
    """The graph as a function with a code object and a name of its own, which is what Dynamo counts recompilations and remembers sizes by.

    A frame around the graph's own is what Dynamo compiles in any case; the graph's own it leaves alone where it has run before.
    """

    def call(*values: Any) -> Any:
        return module(*values)

    name = f"graph_{next(_NUMBERS)}"
    return types.FunctionType(call.__code__.replace(co_name=name), call.__globals__, name, None, call.__closure__)


def _changing(node: fx.Node) -> list[int]:
    """The axes of an input that a capture knows to change from call to call."""
    value = value_of(node)
    return [axis for axis, size in enumerate(value.shape) if isinstance(size, torch.SymInt)] if isinstance(value, torch.Tensor) else []


def of_sites(produced: Sequence[Any], values: Sequence[Any]) -> dict[tuple[str, ...], dict[str, Any]]:
    """What was produced for sites, by their names: names -> {kind: value}."""
    facts: dict[tuple[str, ...], dict[str, Any]] = {}
    for what, value in zip(produced, values, strict=True):
        if what.sites:
            facts.setdefault(what.sites, {})[what.kind] = value
    return facts


def dict_of(produced: Sequence[Any], values: Sequence[Any]) -> dict[int, dict[str, Any]]:
    """What was produced, by output: output -> {kind: value}."""
    facts: dict[int, dict[str, Any]] = {}
    for what, value in zip(produced, values, strict=True):
        # One object for all entries it holds for: entries that share positions are told by it.
        known = value.detach() if isinstance(value, torch.Tensor) and what.kind != "made" else value
        for index in what.outputs:
            facts.setdefault(index, {})[what.kind] = known
    return facts
