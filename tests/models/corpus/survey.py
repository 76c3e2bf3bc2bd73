"""A model of the corpus captured and recognised as `rewrite()` does it, and the facts about its sites that the tables state too."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from rewrite.compiled import WHOLE_GRAPHS as SETTINGS
from rewrite.engine import copy_graph
from rewrite.ir.site import Site
from rewrite.recognise.regions import NearMiss
from rewrite.recognise.sites import Found, Recognition, recognise
from rewrite.runner import _LIMITS as LIMITS
from rewrite.runner import CAPTURE_ERRORS
from tests.models.corpus.entry import Entry, Sites

Hook = Callable[[fx.GraphModule, Sequence[Any]], Any]


@dataclass
class Reading:
    """One captured graph: as Dynamo gave it, the copy that was read (composite calls taken apart), and what was found in that.

    runs: how often the model's call ran it; behind a graph break one graph may serve every layer. also: what the survey's hook returned.
    """

    captured: fx.GraphModule
    module: fx.GraphModule
    recognition: Recognition
    also: Any = None
    runs: int = 0


@dataclass
class Survey:
    """Every graph of one call of a model, and the seconds that recognition, proofs included, took.

    retried: why the capture was made again without our settings, if it was.
    """

    readings: list[Reading] = field(default_factory=list)
    seconds: float = 0.0
    retried: str = ""

    @property
    def found(self) -> list[Found]:
        """Every attention of the call that was recognised; one that runs several times is there as often."""
        return [found for reading in self.readings for found in reading.recognition.found * reading.runs]

    @property
    def misses(self) -> list[NearMiss]:
        return [miss for reading in self.readings for miss in reading.recognition.misses * reading.runs]

    @property
    def sites(self) -> list[Site]:
        return [found.site for found in self.found]

    @property
    def whole(self) -> Recognition:
        """What was found in all graphs, as if they were one."""
        return Recognition(self.found, self.misses)

    @property
    def symbols(self) -> bool:
        """Whether a graph was given a size that it does not fix."""
        values = (
            node.meta.get("example_value") for each in self.readings for node in each.captured.graph.nodes if node.op == "placeholder"
        )
        return any(isinstance(value, torch.SymInt) for value in values)

    @property
    def unproved(self) -> int:
        """Regions that were read and that their proof did not confirm."""
        return sum(miss.reason.startswith("its IR was not confirmed") for miss in self.misses)


def captured(
    model: nn.Module,
    inputs: Mapping[str, Any],
    backend: Callable[..., Any],
    fresh: Callable[[], None] = lambda: None,
) -> str:
    """Run the model once under Dynamo with the settings `rewrite()` uses, or without them where that fails; the reason is returned then.

    fresh: called in front of the second attempt.
    """
    told = ""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model(**inputs)
        torch._dynamo.reset()
        for settings in (SETTINGS, {}):
            try:
                with torch._dynamo.config.patch({**settings, **LIMITS}):
                    torch.compile(model, backend=backend)(**inputs)
                break
            except CAPTURE_ERRORS as error:
                if not settings:
                    raise
                told = str(error).strip().splitlines()[0]
            torch._dynamo.reset()
            fresh()
    return told


def survey(entry: Entry, implementation: str, batch: int, symbolic: bool = False, also: Hook | None = None) -> Survey:
    """Capture and recognise one entry.

    symbolic: the batch size, and the length of sequences of tokens, are symbols wherever the model lets them. also: called with every
    captured graph and the inputs it was traced with.
    """
    result = Survey()
    proofs: dict[str, str | None] = {}

    def backend(module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        began = time.perf_counter()
        read = copy_graph(module)
        placeholders = [node for node in read.graph.nodes if node.op == "placeholder"]
        recognition = recognise(read.graph, dict(zip(placeholders, inputs, strict=True)), proofs=proofs)
        result.seconds += time.perf_counter() - began
        reading = Reading(module, read, recognition, None if also is None else also(module, inputs))
        result.readings.append(reading)

        def run(*arguments: Any) -> Any:
            reading.runs += 1
            return module.forward(*arguments)

        return run

    was = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        model = entry.build(implementation)
        inputs = dict(entry.inputs(batch))
        if symbolic:
            _let_sizes_change(inputs)
        result.retried = captured(model, inputs, backend, result.readings.clear)
    finally:
        logging.disable(was)
    return result


def _let_sizes_change(inputs: Mapping[str, Any]) -> None:
    for value in inputs.values():
        if isinstance(value, torch.Tensor):
            torch._dynamo.maybe_mark_dynamic(value, [0, 1] if value.ndim == 2 and not value.is_floating_point() else 0)


# Forms in which queries or keys are made of some of the stream's tokens, or of several together.
POOLED = frozenset({"reduced keys", "pooled queries", "class attention"})


def read_from_data(found: Found) -> bool:
    """Whether how many queries or keys there are is read from data: the graph then holds a stand-in for it."""
    return any(
        isinstance(size, torch.SymInt) and bool(free_unbacked_symbols(size))
        for operand in (found.region.query, found.region.key)
        for size in operand.node.meta["example_value"].shape
    )


def size_differences(entry: Entry, sites: Sequence[Found], batch: int) -> list[str]:
    """Sites that are none of the table's, in words; the table may have more of them than were found.

    Some things a graph may say otherwise than the table, and both are right:
    - Heads may lie on the batch's axis, with windows or without: the site then has fewer heads and a batch that is as much larger.
    - To the table an attention is self-attention if queries and keys are of one stream; to the recogniser, if they are the same tokens.
      Where the table says that they are pooled, reduced or picked on the way, or where they differ in number, the site may say cross;
      so it may where a graph break hides what they are made of.
    - A number of tokens that is read from data is any number.
    - One query sees every key, under a causal mask too.
    """
    left = [[group, group.count] for group in entry.sites]
    differences = []
    for found in sites:
        site, any_size = found.site, read_from_data(found)
        match = next(
            (place for exact in (True, False) for place in left if place[1] and _agree(entry, place[0], site, batch, exact, any_size)), None
        )
        if match is not None:
            match[1] -= 1
        else:
            differences.append(f"{site.name}: {_told(site)} is not in the table, which has {[_said(group) for group, n in left if n]} left")
    return differences


def _agree(entry: Entry, group: Sites, site: Site, batch: int, exact: bool, any_size: bool) -> bool:
    dims = site.dims
    if not any_size and (group.queries, group.keys) != (dims["Nq"], dims["Nk"]):
        return False
    heads = group.heads == dims["H"]
    kind, causal = group.kind == kind_of(site), group.causal == site.causal
    if exact:
        return heads and kind and causal
    apart = bool(POOLED & set(entry.forms) or entry.breaks) or group.queries != group.keys
    return (
        (heads or dims["B"] * dims["H"] % (batch * group.heads) == 0)
        and (kind or (group.kind == "self" and kind_of(site) == "cross" and apart))
        and (causal or group.queries == 1)
    )


def kind_of(site: Site) -> str:
    """A site's kind in the tables' words."""
    if site.kind == "channel":
        return "channels"
    return site.kind if site.attend.normaliser == "softmax" else "linear"


def _told(site: Site) -> str:
    heads = f"{site.dims['H']} heads of a batch of {site.dims['B']}"
    return f"{site.dims['Nq']} x {site.dims['Nk']}, {heads}, {kind_of(site)}{', causal' if site.causal else ''}"


def _said(group: Sites) -> str:
    return f"{group.queries} x {group.keys}, {group.heads} heads, {group.kind}{', causal' if group.causal else ''}"
