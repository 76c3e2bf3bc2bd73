"""What a rewritten model carries with it: its pass list, its report, its kernels, its added parameters and the notes on its caches."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import codegen
from rewrite.breaks import collected_breaks
from rewrite.compiled import WHOLE_GRAPHS, InnerBackend, KeptTokens
from rewrite.dry_run import call_original, copied, kind_of_call, untouched
from rewrite.engine import Record
from rewrite.ir.errors import ModelCallError, NoAttentionError, NotApplicableError, RewriteError
from rewrite.ir.operations import Parameter
from rewrite.ir.passes import APART, CHANGES_NOTHING, FIXED, Pass
from rewrite.notes import CacheNotes, slots
from rewrite.prediction import SLOWER, Gate, SlowerWarning, compared
from rewrite.report import Report
from rewrite.runner import ACTIVE, CAPTURE_ERRORS, Runner, RunningCall
from rewrite.states import is_stand_in

# The prefix of every state_dict key that a pass adds.
ADDED = "rewrite_added"


@dataclass(eq=False)
class Session:
    """One rewritten model. Everything compiled is left behind when it is copied or pickled, and made again at the next call."""

    root: nn.Module
    passes: tuple[Pass, ...]
    backend: InnerBackend
    may_add_parameters: bool = False
    report: Report = field(default_factory=lambda: Report(()))
    kernels: list[codegen.Kernel | codegen.StateKernel] = field(default_factory=list)
    prepared: bool = False
    settings: dict[str, Any] = field(default_factory=lambda: dict(WHOLE_GRAPHS))
    notes: CacheNotes = field(default_factory=CacheNotes)
    proofs: dict[str, str | None] = field(default_factory=dict)
    added: dict[str, Parameter] = field(default_factory=dict)
    depths: dict[str, int] = field(default_factory=dict)
    gate: Gate | None = None
    gridded: set[str] = field(default_factory=set)
    scoring: set[str] = field(default_factory=set)
    visual: set[str] = field(default_factory=set)
    embeddings: list[str] = field(default_factory=list)
    declined: list[tuple[str, str, str]] = field(default_factory=list)
    seen: set[Any] = field(default_factory=set)
    failure: RewriteError | None = None
    kept: list[dict[str, KeptTokens]] = field(default_factory=list)
    routed: list[dict[str, torch.Tensor]] = field(default_factory=list)
    _pending: dict[str, nn.Parameter] = field(default_factory=dict)
    _recording: bool = False

    # Parameters

    def parameter(self, name: str) -> torch.Tensor:
        """The added parameter of that name, made at its first use."""
        holder = getattr(self.root, ADDED, None)
        if holder is not None:
            with contextlib.suppress(AttributeError):
                held: torch.Tensor = holder.get_parameter(state_name(name))
                return held
        if name not in self._pending:
            if not self._recording:
                raise NotApplicableError(
                    f"{name}: this site was not reached by example_inputs, so its parameters were not added; "
                    "give example inputs that reach it"
                )
            like = next(self.root.parameters())
            self._pending[name] = nn.Parameter(_initial(self.added[name], like), requires_grad=self.added[name].trainable)
        return self._pending[name]

    def register_parameters(self) -> None:
        """Put what the passes added into the model, under one prefix."""
        if not self._pending:
            return
        holder = nn.Module()
        for name, parameter in self._pending.items():
            *path, last = state_name(name).split(".")
            module = holder
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, nn.Module())
                module = getattr(module, part)
            module.register_parameter(last, parameter)
        self.root.add_module(ADDED, holder)
        self._pending = {}

    # Analysis

    def prepare(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        """Analyse and rewrite for the given inputs: the model's own errors first, then ours, and nothing is changed by either.

        The model runs twice on copies of the inputs, once as it is and once rewritten; its buffers and the random state are put back.
        """
        # Wrong inputs raise the model's own error.
        self.warm_up(self.root, "", arguments, keywords)
        with untouched(self.root):
            self.report = Report(tuple(str(one) for one in self.passes))
            self.gridded, self.scoring, self.visual, self.declined = set(), set(), set(), []
            self._recording = True
            try:
                self._capture(arguments, keywords)
            finally:
                self._recording = False
        self._check_fit()
        self.prepared = True

    def warm_up(
        self, module: nn.Module, prefix: str, arguments: tuple[Any, ...], keywords: dict[str, Any], method: str | None = None
    ) -> None:
        """Run a module or a method as it is, on copies, the first time it is called in a new way.

        Models set things up at such a call (hooks that collect hidden states, say), under locks and in ways that break a capture; a
        broken capture would hide from the layers what was found in front of them.
        """
        kind = (
            prefix,
            method,
            self.root.training,
            len(arguments),
            frozenset((name, kind_of_call(value)) for name, value in keywords.items()),
        )
        # With caches that a rewritten call left short the model as it is cannot run; it has run before, or there would be none.
        if kind in self.seen or any(is_stand_in(slot.tensor) for slot in slots((arguments, keywords))):
            return
        with untouched(self.root):
            ACTIVE.call = RunningCall(self)
            try:
                call_original(module, copied(arguments), copied(keywords), method)
            finally:
                ACTIVE.call = None
        self.seen.add(kind)

    def _capture(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        """Run the model rewritten, once; with other capture settings where Dynamo cannot trace it with ours."""
        try:
            self._run_recorded(arguments, keywords)
        except CAPTURE_ERRORS as error:
            if not self.settings:
                raise
            self.settings = {}
            cause = error.inner_exception if isinstance(error, torch._dynamo.exc.BackendCompilerFailed) else error
            told = str(cause).strip().splitlines()[0]
            self._run_recorded(arguments, keywords, [f"captured without {' and '.join(WHOLE_GRAPHS)}, which failed: {told}"])

    def _run_recorded(self, arguments: tuple[Any, ...], keywords: dict[str, Any], notes: Sequence[str] = ()) -> None:
        """Run the model rewritten and recorded; once more where a stack of layers turned out to be deeper than its first graph."""
        while True:
            self.gridded, self.scoring, self.visual, self.embeddings, self.declined = set(), set(), set(), [], []
            self.report = Report(self.report.passes, notes=list(notes))
            depths = dict(self.depths)
            # What is compiled here is not kept: the ways in, installed afterwards, are part of what Dynamo guards.
            runner = Runner(self, self.root, "", inner="eager")
            with collected_breaks() as breaks:
                runner.run(copied(arguments), copied(keywords))
            self.report.breaks = breaks
            if depths == self.depths:
                return

    def record(self, record: Record) -> None:
        """Take in what happened to one graph."""
        if self._recording:
            self.report.add(record)
            self.declined += record.program.declined
            self.embeddings += record.embeddings
            self.scoring |= record.program.towers()
            self.gridded |= {entry.site.name for entry in record.recognition.found if entry.site.layout.grid is not None}
            self.visual |= {entry.site.name for entry in record.recognition.found if entry.site.layout.visual}
        else:
            self._check_kept(record)
        known = {kernel.path for kernel in self.kernels}
        self.kernels += [kernel for kernel in record.kernels if kernel.path not in known]

    def _check_kept(self, record: Record) -> None:
        """A graph that is captured later must not quietly lose what the analysis promised for its sites.

        A call without visual tokens has nothing to prune. It is an error where a site is no self-attention any more (its keys come out of a
        cache that is written in place), or where there are visual tokens of which it knows nothing (the capture was cut between them and
        the layers), and a warning where the shapes of the call decide. Where a pass has nothing to change in this call, nothing is lost.
        """
        promised = {site.qualified_name: site.passes for site in self.report.sites}
        found = [entry.site for entry in record.recognition.found]
        astray = [site.name for site in found if site.layout.grid is None and site.name in self.gridded]
        if any(promised.get(name) for name in astray):
            raise ModelCallError(
                f"{', '.join(astray)}: the grid of these tokens is not known in this call, which was captured behind the patch embedding; "
                "call the model itself instead of a module or a method inside it (TORCH_LOGS=graph_breaks shows where a capture was cut)"
            )
        for miss in record.misses:
            if promised.get(miss.module):
                raise ModelCallError(f"in this call {miss.module} cannot run with {', '.join(promised[miss.module])}: {miss.reason}")
        lost: dict[str, list[str]] = {}
        for name, by, reason in record.program.declined:
            if by in promised.get(name, ()) and CHANGES_NOTHING not in reason:
                lost.setdefault(f"{by}: {reason}", []).append(name)
        kinds = {site.qualified_name: site.kind for site in self.report.sites}
        moved = {site.name for site in found if kinds.get(site.name, site.kind) != site.kind}
        blind = self.visual.intersection(site.name for site in record.program.sites if not site.layout.visual)
        merged = record.merges or (ACTIVE.call is not None and ACTIVE.call.merged)
        for reason, names in lost.items():
            told = f"{', '.join(names)} runs without {reason}"
            if FIXED in reason:
                raise ModelCallError(f"{told}; use a cache that grows with the tokens, or rewrite without this pass")
            if moved.intersection(names):
                raise ModelCallError(
                    f"{told}; it was {kinds[names[0]]}-attention when the model was analysed. A KV cache that the model writes into in a "
                    "way that is not followed makes it so: use one that grows with the tokens, or rewrite without this pass"
                )
            if APART in reason and not blind.intersection(names):
                raise ModelCallError(
                    f"{told}; the model had both in one graph when it was analysed: call the model itself with its pictures, or use a pass "
                    "that looks at the language model alone"
                )
            if not blind.issuperset(names):
                warnings.warn(f"in this call {told}", stacklevel=2)
            elif merged:
                raise ModelCallError(
                    f"{told}, though this call has visual tokens: its capture was cut in front of these layers; "
                    "TORCH_LOGS=graph_breaks shows where"
                )

    def _check_fit(self) -> None:
        """Every pass must have found a site."""
        if not self.report.sites:
            seen = "; ".join(f"{miss.module or miss.node}: {miss.reason}" for miss in self.report.near_misses)
            raise NoAttentionError(
                f"no attention was recognised in {type(self.root).__name__}" + (f"; near misses: {seen}" if seen else "")
            )
        for one in self.passes:
            told = str(one)
            fits = any(
                told in site.passes or (f"{told}: " in site.reason and (CHANGES_NOTHING in site.reason or SLOWER in site.reason))
                for site in self.report.sites
            )
            if fits or one == type(one).identity():
                continue
            raise NotApplicableError(f"{told} fits none of the {len(self.report.sites)} attention sites: {self._reasons(told)}")

    def warn_slower(self) -> None:
        """One warning for all sites that are predicted to be slower than they were."""
        groups: dict[str, list[str]] = {}
        for site in self.report.sites:
            if site.predicted is not None and site.predicted.ratio > 1:
                more = compared(
                    (site.cost_before.multiply_adds, site.cost_before.bytes), (site.cost_after.multiply_adds, site.cost_after.bytes)
                )
                told = f"{', '.join(site.passes)}, N={site.tokens}: {more}; predicted {site.predicted.ratio:.2g}x the time"
                groups.setdefault(told, []).append(site.qualified_name)
        if groups:
            told = "; ".join(f"{what} ({', '.join(names)})" for what, names in groups.items())
            warnings.warn(
                f"predicted to be slower than what it replaces: {told}. only_if_faster=True leaves such sites alone",
                SlowerWarning,
                stacklevel=3,
            )

    def _reasons(self, told: str) -> str:
        """Why a pass fits no site: each reason once, with the sites it holds for."""
        names: dict[str, list[str]] = {}
        for name, by, reason in self.declined:
            if by == told:
                names.setdefault(reason, []).append(name)
        return "; ".join(f"{', '.join(sites)}: {reason}" for reason, sites in names.items())

    def __getstate__(self) -> dict[str, Any]:
        fresh: dict[str, Any] = {
            "proofs": {},
            "seen": set(),
            "failure": None,
            "kept": [],
            "routed": [],
            "_pending": {},
            "_recording": False,
        }
        return {**self.__dict__, **fresh}


def state_name(name: str) -> str:
    """An added parameter's name under the prefix; the second site of a module ("attn:2") has a name that a module may have.

    The model itself, where a site lies in no module of it, is the prefix.
    """
    return name.replace(":", "_").removeprefix(".")


def _initial(parameter: Parameter, like: torch.Tensor) -> torch.Tensor:
    tensor = like.new_zeros(parameter.shape)
    if parameter.init == "ones":
        tensor.fill_(1)
    elif parameter.init == "eye":
        tensor.diagonal(dim1=-2, dim2=-1).fill_(1)
    elif isinstance(parameter.init, tuple):
        kind, value = parameter.init
        nn.init.constant_(tensor, value) if kind == "constant" else nn.init.normal_(tensor, std=value)
    return tensor
