"""Whether a site is faster as the passes left it: multiply-adds and bytes over the ceilings that were measured on its device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import fx

import codegen
from rewrite.cost import GraphCost, node_itemsize, operation_costs, original_cost
from rewrite.graph_time import seconds_of
from rewrite.ir.operations import Attend, RegionRoutes
from rewrite.ir.program import Program
from rewrite.ir.site import Site
from rewrite.machine import LARGEST_KEPT, Machine, machine_of
from rewrite.recognise.operators import canonical, value_of
from rewrite.recognise.sites import Found, Recognition

# In the reason of a site that `only_if_faster` left alone.
SLOWER = "is predicted to take"


class SlowerWarning(UserWarning):
    """Passes were applied where their form is predicted to be slower than what it replaces."""


@dataclass(frozen=True)
class Prediction:
    """Seconds of one site, or of a whole model, before and after, as predicted."""

    before: float
    after: float

    @property
    def ratio(self) -> float:
        """Above 1 is slower."""
        return self.after / self.before

    def __add__(self, other: Prediction) -> Prediction:
        return Prediction(self.before + other.before, self.after + other.after)


def predict(before: Site, after: Site, itemsize: int, materialised: bool, machine: Machine) -> Prediction:
    """A site as the model has it and as the passes left it. materialised: the model writes the map out, by operators of its own."""
    chosen = {each.result: math.prod(each.regions) for each in after.body.operations if isinstance(each, RegionRoutes)}
    second = 0.0
    for part in operation_costs(after, itemsize):
        if isinstance(part.operation, Attend):
            work = codegen.work(part.operation, part.sizes)
            # How many blocks there are to choose for is for the operation to say that chooses.
            calls = work.calls if part.operation.choice is None else chosen.get(part.operation.choice.tensor, 1)
            second += machine.seconds(work.skeleton, work.multiply_adds, part.bytes, calls)
        else:
            second += machine.seconds("plain", part.multiply_adds, part.bytes)
    return Prediction(original_seconds(before, itemsize, materialised, machine), second)


def original_seconds(site: Site, itemsize: int, materialised: bool, machine: Machine) -> float:
    """A site as the model computes it."""
    cost = original_cost(site, itemsize, materialised)
    # A fused call leaves out what positions alone hide, as ours does; a map is computed whole.
    fused = codegen.work(site.attend, site.dims)
    visible = fused.multiply_adds if fused.skeleton == "fused" else codegen.computed_multiply_adds(site.attend, site.dims)
    own = cost.multiply_adds if materialised else visible
    # Scores, scaled scores and weights are there at once.
    written = 3 * itemsize * math.prod(site.dims[name] for name in ("B", "H", "Nq", "Nk"))
    return machine.seconds(("eager" if written <= LARGEST_KEPT else "large") if materialised else "sdpa", own, cost.bytes)


def predicted(entry: Found, after: Site) -> Prediction:
    """The prediction for a recognised site, on the device and in the type that it was traced with."""
    return predict(entry.site, after, *_traced(entry))


def as_it_was(entry: Found, left: Site) -> Prediction:
    """The prediction for a site that goes on as the model has it, with the tokens that are left."""
    return Prediction(*(original_seconds(site, *_traced(entry)) for site in (entry.site, left)))


def around_sites(operators: tuple[list[GraphCost], list[GraphCost]], device: torch.device, dtype: torch.dtype) -> Prediction:
    """The prediction for operators of a graph, before and after."""
    return Prediction(*(seconds_of(costs, machine_of(device, dtype)) for costs in operators))


def _traced(entry: Found) -> tuple[int, bool, Machine]:
    """(bytes of an element, whether the map is written out, the machine) of a site as it was traced."""
    output = value_of(entry.region.output)
    assert isinstance(output, torch.Tensor)
    return node_itemsize(entry.region.output), is_materialised(entry.region.core), machine_of(output.device, output.dtype)


def is_materialised(core: fx.Node) -> bool:
    return canonical(core) == "softmax"


def compared(before: tuple[int, int], after: tuple[int, int]) -> str:
    """What is more and what is less, in words: (multiply-adds, bytes) before and after."""
    parts = zip(("multiply-adds", "bytes"), before, after, strict=True)
    return ", ".join(f"{_times(new / old)} {what}" if old else f"{new} {what}" for what, old, new in parts)


def _times(ratio: float) -> str:
    return f"{ratio:.1f}x more" if ratio > 1.05 else f"{1 / ratio:.1f}x fewer" if 0 < ratio < 0.95 else "as many"


@dataclass
class Gate:
    """`only_if_faster`: sites that are predicted to be slower stay as they were. What is decided for a site first holds in later graphs."""

    decided: dict[str, str | None] = field(default_factory=dict)

    def through(self, program: Program, recognition: Recognition) -> Program:
        """The program without what is slower. Tokens that leave stay gone: they are no site's own."""
        for site in program.sites:
            entry = recognition.by_name(site.name)
            if site.body == entry.site.body:
                continue
            if site.name not in self.decided:
                found = predicted(entry, site)
                self.decided[site.name] = f"it {SLOWER} {found.ratio:.2g}x the time of what it replaces" if found.ratio > 1 else None
            reason = self.decided[site.name]
            if reason is not None:
                program = _without(program, replace(site, body=entry.site.body), reason)
        return program


def _without(program: Program, original: Site, reason: str) -> Program:
    leaving = {operation.by for operation in program.token_operations()}
    gone = [by for by in program.passes_of(original) if by not in leaving]
    touched = tuple(each for each in program.touched if each[0] != original.name or each[1] in leaving)
    sites: Sequence[Site] = [original if site.name == original.name else site for site in program.sites]
    program = replace(program, sites=tuple(sites), touched=touched)
    for by in gone:
        program = program.with_declined(original, by, reason)
    return program
