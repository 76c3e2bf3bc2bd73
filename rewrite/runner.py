"""Runs one module rewritten: a call, its stand-ins for short caches, and the compiled function behind it."""

from __future__ import annotations

import contextlib
import itertools
import sys
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils import _python_dispatch

from rewrite.breaks import Break
from rewrite.carried import Carried, Handover
from rewrite.compiled import Call, CompiledGraph, InnerBackend, KeptTokens, NoCall
from rewrite.dry_run import call_original
from rewrite.engine import Record, Rewriter
from rewrite.ir.errors import ModelCallError, RewriteError
from rewrite.lower.interface import Allowed
from rewrite.names import Names
from rewrite.notes import CacheNotes, Note, Slot, slots, storage_of
from rewrite.observers import observers_aside
from rewrite.relay import Relay
from rewrite.states import Followed, is_stand_in, note_of, whole_entry
from rewrite.watch import MergeWatch

if TYPE_CHECKING:
    from rewrite.session import Session

# Scoped to our own calls. Falling back to the original model at a recompilation limit would be a silent change, so it fails.
_LIMITS: dict[str, Any] = {
    # A hook that is put on a module later is called, as it would be in the original.
    "skip_nnmodule_hook_guards": False,
    # Image sizes, batch sizes, prefill and decode, training and evaluation, with and without gradients: more than Dynamo's default of 8.
    "recompile_limit": 64,
    "accumulated_recompile_limit": 1024,
    "fail_on_recompile_limit_hit": True,
}

# What Dynamo raises where it cannot trace; one of them it does not wrap in its own kind.
CAPTURE_ERRORS = (torch._dynamo.exc.TorchDynamoException, GuardOnDataDependentSymNode)

_NUMBERS = itertools.count()

# What the ways in add to the calls of a model that is modules all the way down.
TIMES_DEEPER = 4


class _Active(threading.local):
    """The call that runs in this thread."""

    call: RunningCall | None = None


ACTIVE = _Active()


@dataclass
class RunningCall:
    """One call of a rewritten model: the stand-ins it was given, and the cache entries it returns."""

    session: Session
    stand_ins: dict[int, tuple[torch.Tensor, Note]] = field(default_factory=dict)
    produced: list[tuple[torch.Tensor, Note]] = field(default_factory=list)
    modes: list[Any] = field(default_factory=list)
    graphs: int = 0
    merged: bool = False
    handover: Handover = field(default_factory=Handover)
    relay: Relay = field(default_factory=Relay)
    given: dict[int, torch.Tensor] = field(default_factory=dict)
    last_break: Break | None = None

    def noted(self, value: torch.Tensor) -> tuple[torch.Tensor, Note] | None:
        return self.stand_ins.get(storage_of(value)) if self.stand_ins else None

    def produce(self, value: torch.Tensor, note: Note) -> None:
        self.produced.append((value, note))
        if note.replaced:
            self.stand_ins[storage_of(value)] = (value if note.kept is None else note.kept, note)

    def carried(self, value: torch.Tensor) -> Carried | None:
        known = self.handover.read(value)
        chosen = self.relay.shadows.read(value) if known is None else None
        return known if chosen is None else Carried(chosen=chosen)

    def behind(self, value: torch.Tensor) -> str | None:
        return None if id(value) in self.given or self.last_break is None else str(self.last_break)

    def carry(self, value: torch.Tensor, known: Carried) -> None:
        self.handover.write(value, known)
        if known.chosen is not None:
            self.relay.follow(value, known.chosen)

    def follow_given(self) -> None:
        """Follow the patches of the arguments that an earlier call chose among."""
        for tensor in self.given.values():
            known = self.handover.read(tensor)
            if known is not None and known.chosen is not None:
                self.relay.follow(tensor, known.chosen)

    def note_relaid(self, result: Any) -> None:
        """Note on the tensors of a result which patches of them stay, for the call in which they enter a text."""
        for slot in slots((result,)) if self.relay.shadows.by_memory else ():
            chosen = self.relay.shadows.read(slot.tensor) if self.handover.read(slot.tensor) is None else None
            if chosen is not None:
                self.handover.write(slot.tensor, Carried(chosen=chosen))

    def keep(self, sites: tuple[str, ...], kept: KeptTokens) -> None:
        for asked in self.session.kept:
            asked.update(dict.fromkeys(sites, kept))

    def route(self, site: str, features: torch.Tensor) -> None:
        for asked in self.session.routed:
            asked[site] = features

    def parameter(self, name: str) -> torch.Tensor:
        return self.session.parameter(name)

    @contextlib.contextmanager
    def graph(self, record: Record) -> Iterator[None]:
        """Around the execution of one graph: the dispatch modes (a FLOP counter, say) that were set aside see what it does."""
        self.graphs += 1
        self.merged |= record.merges
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.relay.aside())
            for mode in self.modes:
                _python_dispatch._push_mode(mode)
                stack.callback(_python_dispatch._pop_mode, getattr(mode, "_mode_key", None))
            yield
        self.last_break = record.ended or self.last_break


@torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]
def is_running() -> bool:
    """Whether a rewritten model's call runs in this thread; in a capture, whether the capture is ours."""
    return ACTIVE.call is not None


def running() -> Call:
    return ACTIVE.call if ACTIVE.call is not None else NoCall()


class Runner:
    """Runs one module of a session, or one of its methods, rewritten."""

    def __init__(
        self,
        session: Session,
        module: nn.Module,
        prefix: str,
        inner: InnerBackend,
        method: str | None = None,
        rewriter_of: Callable[..., Rewriter] = Rewriter,
    ) -> None:
        self.session = session
        rewriter = rewriter_of(
            passes=session.passes,
            names=Names(session.root, prefix),
            proofs=session.proofs,
            allowed=Allowed(parameters=session.may_add_parameters, added=session.added, data_sizes=inner == "eager"),
            depths=session.depths,
            gate=session.gate,
        )

        def backend(graph_module: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            compiled = CompiledGraph(graph_module, rewriter, inner, running, session.record)
            try:
                compiled.prepare(inputs)
            except RewriteError as error:
                session.failure = error
                raise
            return compiled

        self.compiled = torch.compile(_own_function(module, method), backend=backend)

    def run(self, arguments: tuple[Any, ...], keywords: dict[str, Any], watch: MergeWatch | None = None) -> Any:
        """The module's result, computed by its rewritten graphs. `watch` saw what was done to the arguments outside of graphs."""
        session = self.session
        call = RunningCall(session, given={id(slot.tensor): slot.tensor for slot in slots((arguments, keywords))})
        if watch is not None:
            call.handover, call.merged, watch.ran = watch.handover, watch.ran, True
        replaced = list(_put_stand_ins(session.notes, call, (arguments, keywords)))
        ACTIVE.call = call
        try:
            with torch._dynamo.config.patch({**session.settings, **_LIMITS}), _room_for_frames(), observers_aside() as modes:
                call.modes = modes
                call.follow_given()
                result = self.compiled(*arguments, **keywords)
        except torch._dynamo.exc.BackendCompilerFailed:
            failure, session.failure = session.failure, None
            if failure is None:
                raise
            raise failure from None
        finally:
            ACTIVE.call = None
            call.relay.stop()
            for slot, put in replaced:
                _take_back(slot, put)
        if not call.graphs:
            raise ModelCallError(
                "nothing of this call went through the compiler: torch.compile is switched off here (TORCH_COMPILE_DISABLE, "
                "TORCHDYNAMO_DISABLE or torch.compiler.set_stance), so the model ran as it was; switch it on, or call the original model"
            )
        call.note_relaid(result)
        if call.produced:
            session.notes.write((arguments, keywords, result), call.produced)
        return result


@contextlib.contextmanager
def _room_for_frames() -> Iterator[None]:
    """Dynamo traces a call within a call by some ten frames of its own, and a level of modules with a way in is seven calls and not two."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(TIMES_DEEPER * limit)
    try:
        yield
    finally:
        sys.setrecursionlimit(limit)


def _own_function(module: nn.Module, method: str | None) -> Callable[..., Any]:
    """A function that calls the module, or a method, with a code object of its own: Dynamo's caches and limits are per code object."""

    def call(*arguments: Any, **keywords: Any) -> Any:
        return call_original(module, arguments, keywords, method)

    # A name of its own too: Dynamo remembers by file, line and name which sizes it saw change, and one model's are not another's.
    name = f"rewritten_{next(_NUMBERS)}"
    return types.FunctionType(call.__code__.replace(co_name=name), call.__globals__, name, None, call.__closure__)


def _put_stand_ins(notes: CacheNotes, call: RunningCall, arguments: Any) -> Iterator[tuple[Slot, torch.Tensor]]:
    """Replace noted cache entries in the arguments; yields what was put where."""
    followed = Followed()
    for slot in list(slots(arguments)):
        if is_stand_in(slot.tensor):
            if slot.put is None:
                raise ModelCallError("a KV cache that was left short, or whose keys a state stands for, came in a tuple; pass the object")
            known = followed(slot.tensor, notes.of(slot))
            put = whole_entry(known)
            call.stand_ins[storage_of(put)] = (put if known.kept is None else known.kept, known)
            slot.put(put)
            yield slot, put
            continue
        note = notes.read(slot) or note_of(slot.tensor)
        if note is not None and (note.marked or slot.put is not None):
            # An entry from which no token left is itself its stand-in, so that the model's code reads it as before.
            call.stand_ins[storage_of(slot.tensor)] = (slot.tensor, note)


def _take_back(slot: Slot, put: torch.Tensor) -> None:
    """Put the real entry back where the model's code left the stand-in."""
    held = slot.owner[slot.key] if isinstance(slot.owner, dict | list) else vars(slot.owner).get(slot.key)
    if held is put and slot.put is not None:
        slot.put(slot.tensor)
