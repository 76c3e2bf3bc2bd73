"""What a rewritten model carries with it: its pass list, its report, its kernels, its added parameters and the notes on its caches."""

from __future__ import annotations

import contextlib
import copy
import itertools
import threading
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _python_dispatch
from torch.utils.module_tracker import ModuleTracker

import codegen
from rewrite.compiled import Call, CompiledGraph, InnerBackend, NoCall
from rewrite.engine import Record, Rewriter
from rewrite.ir.errors import ModelCallError, NoAttentionError, NotApplicableError, RewriteError
from rewrite.ir.operations import Parameter
from rewrite.ir.passes import CHANGES_NOTHING, Pass
from rewrite.lower.program import Allowed
from rewrite.notes import CacheNotes, Note, Slot, slots, stand_in, storage_of
from rewrite.report import Report

# The prefix of every state_dict key that a pass adds.
ADDED = "rewrite_added"

# Scoped to our own calls. The first two let the merge of visual features stay in the same graph as the layers; a model that cannot be
# traced with them is traced without. Falling back to the original model at a recompilation limit would be a silent change, so it fails.
_SETTINGS: dict[str, Any] = {"capture_scalar_outputs": True, "capture_dynamic_output_shape_ops": True}
_LIMITS: dict[str, Any] = {
    # A hook that is put on a module later is called, as it would be in the original.
    "skip_nnmodule_hook_guards": False,
    # Image sizes, batch sizes, prefill and decode, training and evaluation, with and without gradients: more than Dynamo's default of 8.
    "recompile_limit": 64,
    "accumulated_recompile_limit": 1024,
    "fail_on_recompile_limit_hit": True,
}


_NUMBERS = itertools.count()
# One thread at a time sets up: analyses, or runs a module as it is before its first capture.
_SETTING_UP = threading.RLock()


class _Active(threading.local):
    """The call that runs in this thread."""

    call: RunningCall | None = None


ACTIVE = _Active()


@dataclass
class RunningCall:
    """One call of a rewritten model: the stand-ins it was given, and the cache entries it returns."""

    session: Session
    behind: dict[int, tuple[torch.Tensor, Note]] = field(default_factory=dict)
    produced: list[tuple[torch.Tensor, Note]] = field(default_factory=list)
    modes: list[Any] = field(default_factory=list)
    graphs: int = 0
    merged: bool = False

    def noted(self, value: torch.Tensor) -> tuple[torch.Tensor, Note] | None:
        return self.behind.get(storage_of(value)) if self.behind else None

    def produce(self, value: torch.Tensor, note: Note) -> None:
        self.produced.append((value, note))

    def parameter(self, name: str) -> torch.Tensor:
        return self.session.parameter(name)

    @contextlib.contextmanager
    def graph(self, merges: bool) -> Iterator[None]:
        """Around the execution of one graph: the dispatch modes (a FLOP counter, say) that were set aside see what it does."""
        self.graphs += 1
        self.merged |= merges
        with contextlib.ExitStack() as stack:
            for mode in self.modes:
                _python_dispatch._push_mode(mode)
                stack.callback(_python_dispatch._pop_mode, getattr(mode, "_mode_key", None))
            yield


@torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]
def _is_running() -> bool:
    """Whether a rewritten model's call runs in this thread; in a capture, whether the capture is ours."""
    return ACTIVE.call is not None


def running() -> Call:
    return ACTIVE.call if ACTIVE.call is not None else NoCall()


@dataclass(eq=False)
class Session:
    """One rewritten model. Everything compiled is left behind when it is copied or pickled, and made again at the next call."""

    root: nn.Module
    passes: tuple[Pass, ...]
    backend: InnerBackend
    may_add_parameters: bool = False
    report: Report = field(default_factory=lambda: Report(()))
    kernels: list[codegen.Kernel] = field(default_factory=list)
    prepared: bool = False
    settings: dict[str, Any] = field(default_factory=lambda: dict(_SETTINGS))
    entries: list[str] = field(default_factory=list)
    notes: CacheNotes = field(default_factory=CacheNotes)
    proofs: dict[str, str | None] = field(default_factory=dict)
    added: dict[str, Parameter] = field(default_factory=dict)
    gridded: set[str] = field(default_factory=set)
    declined: list[tuple[str, str, str]] = field(default_factory=list)
    seen: set[Any] = field(default_factory=set)
    failure: RewriteError | None = None
    runner: Runner | None = None
    _pending: dict[str, nn.Parameter] = field(default_factory=dict)
    _recording: bool = False

    # Parameters

    def parameter(self, name: str) -> torch.Tensor:
        """The added parameter of that name, made at its first use."""
        holder = getattr(self.root, ADDED, None)
        if holder is not None:
            with contextlib.suppress(AttributeError):
                held: torch.Tensor = holder.get_parameter(_state_name(name))
                return held
        if name not in self._pending:
            if not self._recording:
                raise NotApplicableError(
                    f"{name}: this site was not reached by example_inputs, so its parameters were not added; "
                    "give example inputs that reach it"
                )
            like = next(self.root.parameters())
            self._pending[name] = nn.Parameter(_initial(self.added[name], like))
        return self._pending[name]

    def register_parameters(self) -> None:
        """Put what the passes added into the model, under one prefix."""
        if not self._pending:
            return
        holder = nn.Module()
        for name, parameter in self._pending.items():
            *path, last = _state_name(name).split(".")
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
        with _untouched(self.root):
            self.report = Report(tuple(str(one) for one in self.passes))
            self.gridded, self.declined = set(), []
            self._recording = True
            try:
                self._capture(arguments, keywords)
            finally:
                self._recording = False
        self._check_fit()
        self.entries = _entry_modules([site.qualified_name for site in self.report.sites], self.root)
        self.prepared = True

    def warm_up(self, module: nn.Module, prefix: str, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        """Run a module as it is, on copies, the first time it is called in a new way.

        Models set things up at such a call (hooks that collect hidden states, say), under locks and in ways that break a capture; a
        broken capture would hide from the layers what was found in front of them.
        """
        kind = (prefix, self.root.training, len(arguments), frozenset((name, _kind(value)) for name, value in keywords.items()))
        # With caches that a rewritten call left short the model as it is cannot run; it has run before, or there would be none.
        if kind in self.seen or any(self._is_short(slot) for slot in slots((arguments, keywords))):
            return
        with _untouched(self.root):
            ACTIVE.call = RunningCall(self)
            try:
                _original(module, _copied(arguments), _copied(keywords))
            finally:
                ACTIVE.call = None
        self.seen.add(kind)

    def _is_short(self, slot: Slot) -> bool:
        note = self.notes.read(slot)
        return note is not None and note.positions is not None

    def _capture(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        """Run the model rewritten, once; with other capture settings where Dynamo cannot trace it with ours."""
        try:
            self.runner = Runner(self, self.root, "")
            self.runner.run(_copied(arguments), _copied(keywords))
        except torch._dynamo.exc.TorchDynamoException as error:
            if not self.settings:
                raise
            told = str(error).strip().splitlines()[0]
            self.settings = {}
            self.gridded, self.declined = set(), []
            self.report = Report(self.report.passes, notes=[f"captured without capture_scalar_outputs, which failed: {told}"])
            self.runner = Runner(self, self.root, "")
            self.runner.run(_copied(arguments), _copied(keywords))

    def record(self, record: Record) -> None:
        """Take in what happened to one graph."""
        if self._recording:
            self.report.add(record)
            self.declined += record.program.declined
            self.gridded |= {site.name for site in record.program.sites if site.layout.grid is not None}
        else:
            self._check_kept(record)
        known = {kernel.path for kernel in self.kernels}
        self.kernels += [kernel for kernel in record.kernels if kernel.path not in known]

    def _check_kept(self, record: Record) -> None:
        """A graph that is captured later must not quietly lose what the analysis promised for its sites.

        A call without visual tokens has nothing to prune; anything else that is declined now is an error where visual tokens were seen in
        an earlier graph of the call (the capture was cut between them and the layers), and a warning where the shapes of the call decide.
        """
        promised = {site.qualified_name: site.passes for site in self.report.sites}
        astray = [site.name for site in record.program.sites if site.layout.grid is None and site.name in self.gridded]
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
            if by in promised.get(name, ()):
                lost.setdefault(f"{by}: {reason}", []).append(name)
        blind = {site.name for site in record.program.sites if not site.layout.visual}
        merged = ACTIVE.call is not None and ACTIVE.call.merged
        for reason, names in lost.items():
            told = f"{', '.join(names)} runs without {reason}"
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
            fits = any(told in site.passes or (f"{told}: " in site.reason and CHANGES_NOTHING in site.reason) for site in self.report.sites)
            if fits or one == type(one).identity():
                continue
            raise NotApplicableError(f"{told} fits none of the {len(self.report.sites)} attention sites: {self._reasons(told)}")

    def _reasons(self, told: str) -> str:
        """Why a pass fits no site: each reason once, with the sites it holds for."""
        names: dict[str, list[str]] = {}
        for name, by, reason in self.declined:
            if by == told:
                names.setdefault(reason, []).append(name)
        return "; ".join(f"{', '.join(sites)}: {reason}" for reason, sites in names.items())

    # Installation

    def install(self) -> None:
        """Make every way into the model that reaches a site go through the compiler."""
        modules = dict(self.root.named_modules())
        for path in self.entries or [""]:
            Entry(self, modules[path], path).install()
        self.root.__dict__["rewrite_report"] = self.report

    def __getstate__(self) -> dict[str, Any]:
        fresh: dict[str, Any] = {"proofs": {}, "seen": set(), "failure": None, "runner": None, "_pending": {}, "_recording": False}
        return {**self.__dict__, **fresh}


class Runner:
    """Runs one module of a session rewritten."""

    def __init__(self, session: Session, module: nn.Module, prefix: str) -> None:
        self.session = session
        rewriter = Rewriter(
            passes=session.passes,
            qualify=lambda path: ".".join(part for part in (prefix, path) if part),
            proofs=session.proofs,
            allowed=Allowed(parameters=session.may_add_parameters, added=session.added),
        )

        def backend(graph_module: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            compiled = CompiledGraph(graph_module, rewriter, session.backend, running, session.record)
            try:
                compiled.prepare(inputs)
            except RewriteError as error:
                session.failure = error
                raise
            return compiled

        self.compiled = torch.compile(_own_function(module), backend=backend)

    def run(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """The module's result, computed by its rewritten graphs."""
        session = self.session
        call = RunningCall(session)
        replaced = list(_put_stand_ins(session.notes, call, (arguments, keywords)))
        ACTIVE.call = call
        try:
            with torch._dynamo.config.patch({**session.settings, **_LIMITS}), _observers_aside() as modes:
                call.modes = modes
                result = self.compiled(*arguments, **keywords)
        except torch._dynamo.exc.BackendCompilerFailed:
            failure, session.failure = session.failure, None
            if failure is None:
                raise
            raise failure from None
        finally:
            ACTIVE.call = None
            for slot, put in replaced:
                _take_back(slot, put)
        if not call.graphs:
            raise ModelCallError(
                "nothing of this call went through the compiler: torch.compile is switched off here (TORCH_COMPILE_DISABLE, "
                "TORCHDYNAMO_DISABLE or torch.compiler.set_stance), so the model ran as it was; switch it on, or call the original model"
            )
        if call.produced:
            session.notes.write((arguments, keywords, result), call.produced)
        return result


class Entry:
    """A way into a rewritten model: what `module(...)` calls. Copies and pickles of the module keep it."""

    def __init__(self, session: Session, module: nn.Module, prefix: str) -> None:
        self.session, self.module, self.prefix = session, module, prefix
        self.runner: Runner | None = None

    def install(self) -> None:
        # nn.Module leaves `_compiled_call_impl` behind when it is copied; `_rewrite_entry` travels and puts it back.
        self.module.__dict__["_rewrite_entry"] = self
        self.module.__dict__["_compiled_call_impl"] = self
        # Dynamo, which inlines `forward` when somebody else compiles a caller of the module, takes `module(...)` for what it is by this.
        self.module.__dict__["__call__"] = self.__call__
        self.module.__dict__["compile"] = self.refuse

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        if _is_running():
            return _original(self.module, arguments, keywords)
        return self.enter(*arguments, **keywords)

    @torch._dynamo.disable(reason="a rewritten model compiles itself; give rewrite() the backend instead")  # type: ignore[untyped-decorator, no-untyped-call]
    def enter(self, *arguments: Any, **keywords: Any) -> Any:
        try:
            return self._ready(arguments, keywords).run(arguments, keywords)
        except Exception as error:
            # Dynamo leaves code alone for good that it once failed to trace; the next call is traced anew.
            self.runner = self.session.runner = None
            own = self._own_error(arguments, keywords) if isinstance(error, torch._dynamo.exc.TorchDynamoException) else None
            if own is None:
                raise
            raise own from None

    def _ready(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Runner:
        session = self.session
        with _SETTING_UP:
            if not session.prepared:
                session.prepare(arguments, keywords)
                session.register_parameters()
                session.install()
            session.warm_up(self.module, self.prefix, arguments, keywords)
            if self.runner is None:
                # What the analysis compiled is what runs.
                captured = session.runner if self.prefix == "" else None
                self.runner = captured or Runner(session, self.module, self.prefix)
            return self.runner

    def _own_error(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Exception | None:
        """What the model as it is raises for inputs that Dynamo failed on, or None."""
        try:
            with _SETTING_UP:
                self.session.seen.clear()
                self.session.warm_up(self.module, self.prefix, arguments, keywords)
        except Exception as error:
            return error
        return None

    def refuse(self, *arguments: Any, **keywords: Any) -> None:
        """Stands in for `nn.Module.compile`, which would put the original in the place of the rewritten model."""
        raise RewriteError("a rewritten model compiles itself: give rewrite() the backend, rewrite(model, passes, backend='inductor')")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "runner": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.install()


@contextlib.contextmanager
def _observers_aside() -> Iterator[list[Any]]:
    """Dispatch modes and torch's own module tracker, taken off while Dynamo traces; the modes go back on when a graph runs.

    Dynamo leaves every frame alone while a dispatch mode is on, and breaks its graphs at each module while a tracker hooks them: under a
    FLOP counter the model would silently run as it was.
    """
    trackers: list[tuple[dict[int, Any], dict[int, Any]]] = []
    for hooks in (nn.modules.module._global_forward_pre_hooks, nn.modules.module._global_forward_hooks):
        trackers.append((hooks, dict(hooks)))
        for key, hook in list(hooks.items()):
            if isinstance(getattr(hook, "__self__", None), ModuleTracker):
                del hooks[key]
    try:
        with _python_dispatch._disable_current_modes() as modes:
            yield list(modes)
    finally:
        for hooks, saved in trackers:
            hooks.clear()
            hooks.update(saved)


def session_of(model: nn.Module) -> Session | None:
    """The session of a rewritten model, or None."""
    entry = model.__dict__.get("_rewrite_entry")
    return entry.session if isinstance(entry, Entry) else None


def _own_function(module: nn.Module) -> Callable[..., Any]:
    """A function that calls the module, with a code object of its own: Dynamo's caches and limits are per code object."""

    def call(*arguments: Any, **keywords: Any) -> Any:
        return _original(module, arguments, keywords)

    # A name of its own too: Dynamo remembers by file, line and name which sizes it saw change, and one model's are not another's.
    name = f"rewritten_{next(_NUMBERS)}"
    return types.FunctionType(call.__code__.replace(co_name=name), call.__globals__, name, None, call.__closure__)


def _put_stand_ins(notes: CacheNotes, call: RunningCall, arguments: Any) -> Iterator[tuple[Slot, torch.Tensor]]:
    """Replace noted cache entries in the arguments; yields what was put where."""
    if not notes.by_owner and not notes.by_tensor:
        return
    for slot in list(slots(arguments)):
        note = notes.read(slot)
        if note is None or slot.put is None:
            continue
        # An entry from which no token left is itself its stand-in, so that the model's code reads it as before.
        put = slot.tensor if note.positions is None else stand_in(slot.tensor, note.length)
        call.behind[storage_of(put)] = (slot.tensor, note)
        if put is not slot.tensor:
            slot.put(put)
            yield slot, put


def _take_back(slot: Slot, put: torch.Tensor) -> None:
    """Put the real entry back where the model's code left the stand-in."""
    held = slot.owner[slot.key] if isinstance(slot.owner, dict | list) else vars(slot.owner).get(slot.key)
    if held is put and slot.put is not None:
        slot.put(slot.tensor)


def _copied(value: Any) -> Any:
    """The inputs once more, so that a run on them (a KV cache grows) is not seen by the caller."""
    memo: dict[int, Any] = {}
    for slot in slots(value):
        fresh = slot.tensor.detach().clone()
        memo[id(slot.tensor)] = fresh.requires_grad_(slot.tensor.requires_grad)
    return copy.deepcopy(value, memo)


@contextlib.contextmanager
def _untouched(module: nn.Module) -> Iterator[None]:
    """Buffers (running statistics) and the random state are afterwards what they were."""
    saved = {name: buffer.detach().clone() for name, buffer in module.named_buffers()}
    with torch.random.fork_rng():
        try:
            yield
        finally:
            with torch.no_grad():
                for name, buffer in module.named_buffers():
                    if name in saved and buffer.shape == saved[name].shape:
                        buffer.copy_(saved[name])


def _kind(value: Any) -> Any:
    """What distinguishes one way of calling from another: switches by value, anything else by its type."""
    return value if isinstance(value, bool | str | None) else type(value)


def _state_name(name: str) -> str:
    """An added parameter's name under the prefix; the second site of a module ("attn:2") has a name that a module may have."""
    return name.replace(":", "_")


def _original(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    """Call the module as it is, its hooks included, past what `rewrite` installed."""
    return module._call_impl(*arguments, **keywords)  # type: ignore[no-untyped-call]


def _initial(parameter: Parameter, like: torch.Tensor) -> torch.Tensor:
    tensor = like.new_zeros(parameter.shape)
    if parameter.init == "ones":
        tensor.fill_(1)
    elif isinstance(parameter.init, tuple):
        nn.init.normal_(tensor, std=parameter.init[1])
    return tensor


def _entry_modules(sites: Sequence[str], root: nn.Module) -> list[str]:
    """The modules that hold two sites or more: whoever is entered alone with one site only is a layer, not a model."""
    modules = dict(root.named_modules())
    holders: dict[str, int] = {"": len(sites)}
    for site in sites:
        parts = site.split(".")
        for count in range(1, len(parts)):
            path = ".".join(parts[:count])
            holders[path] = holders.get(path, 0) + 1
    return [
        path
        for path, count in holders.items()
        if path == "" or (count > 1 and path in modules and not isinstance(modules[path], nn.ModuleList))
    ]
