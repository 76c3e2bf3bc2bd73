"""One captured graph as a callable: its rewritten variants, and what passes between them and the KV cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import fx

from rewrite.engine import Record, Rewriter, RewrittenGraph
from rewrite.notes import Note

InnerBackend = str | Callable[..., Any]


class Call(Protocol):
    """What a running call of a rewritten model offers its graphs."""

    def noted(self, value: torch.Tensor) -> tuple[torch.Tensor, Note] | None:
        """The real cache entry and its note behind an input, or None where nothing is known of it."""

    def produce(self, value: torch.Tensor, note: Note) -> None:
        """Note a cache entry that the graph returned."""

    def parameter(self, name: str) -> torch.Tensor:
        """A parameter that a pass added."""

    def graph(self, merges: bool) -> AbstractContextManager[None]:
        """What a graph runs inside; `merges` where visual tokens join the text in it."""


class NoCall:
    """For graphs that run outside `rewrite()`: no caches are noted and no parameters added."""

    def noted(self, value: torch.Tensor) -> tuple[torch.Tensor, Note] | None:
        return None

    def produce(self, value: torch.Tensor, note: Note) -> None:
        raise RuntimeError("a cache was noted outside a call")

    def parameter(self, name: str) -> torch.Tensor:
        raise RuntimeError(f"no parameter {name} outside a call")

    def graph(self, merges: bool) -> AbstractContextManager[None]:
        return nullcontext()


@dataclass
class Variant:
    """A rewritten graph, compiled."""

    graph: RewrittenGraph
    run: Callable[..., Any]


@dataclass
class CompiledGraph:
    """What a backend returns for one captured graph. Variants differ in which inputs are noted cache entries.

    current: gives the running call. inner: the torch.compile backend that receives the rewritten graph.
    """

    graph_module: fx.GraphModule
    rewriter: Rewriter
    inner: InnerBackend
    current: Callable[[], Call]
    on_record: Callable[[Record], None]
    variants: dict[tuple[Any, ...], Variant] = field(default_factory=dict)

    def prepare(self, inputs: Sequence[Any]) -> Variant:
        """The variant for these inputs, made where there is none yet."""
        notes = self._notes(inputs)
        shared: dict[int, int] = {}
        key = tuple(
            (index, note.groups is not None, None if note.positions is None else shared.setdefault(id(note.positions), index))
            for index, (_, note) in notes.items()
        )
        if key not in self.variants:
            rewritten = self.rewriter.rewrite(self.graph_module, inputs, {index: note for index, (_, note) in notes.items()})
            self.on_record(rewritten.record)
            self.variants[key] = Variant(rewritten, self._compiled(rewritten.module))
        return self.variants[key]

    def _notes(self, inputs: Sequence[Any]) -> dict[int, tuple[torch.Tensor, Note]]:
        call = self.current()
        found = ((index, call.noted(value)) for index, value in enumerate(inputs) if isinstance(value, torch.Tensor) and value.ndim == 4)
        return {index: noted for index, noted in found if noted is not None}

    def _compiled(self, module: fx.GraphModule) -> Callable[..., Any]:
        if self.inner == "eager":
            return module.forward
        # Compiled at its first call and by itself: the rewritten graph's shapes are not those the capture traced.
        return torch.compile(module, backend=self.inner)

    def __call__(self, *inputs: Any) -> Any:
        variant = self.prepare(inputs)
        notes = self._notes(inputs)
        call = self.current()
        values = [notes[index][0] if index in notes else value for index, value in enumerate(inputs)]
        for extra in variant.graph.extras:
            if extra.kind == "parameter":
                values.append(call.parameter(extra.name))
            else:
                values.append(getattr(notes[extra.index][1], extra.kind))
        with call.graph(variant.graph.record.merges):
            results = variant.run(*values)
        produced = variant.graph.produced
        if not produced:
            return results
        count = len(results) - len(produced)
        self._note(call, results[:count], dict_of(produced, results[count:]))
        return results[:count]

    @staticmethod
    def _note(call: Call, results: Sequence[Any], facts: Mapping[int, Mapping[str, Any]]) -> None:
        for index, known in facts.items():
            entry = results[index]
            length = known.get("length", entry.shape[-2])
            call.produce(entry, Note(known.get("positions"), int(length), known.get("groups")))


def dict_of(produced: Sequence[Any], values: Sequence[Any]) -> dict[int, dict[str, Any]]:
    """What was produced, by output: output -> {kind: value}."""
    facts: dict[int, dict[str, Any]] = {}
    for what, value in zip(produced, values, strict=True):
        # One object for all entries it holds for: entries that share positions are told by it.
        known = value.detach() if isinstance(value, torch.Tensor) else value
        for index in what.outputs:
            facts.setdefault(index, {})[what.kind] = known
    return facts
