"""`rewrite`, `explain`, `kernels` and `autotune`."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn

import codegen
from rewrite.compiled import InnerBackend
from rewrite.dry_run import call_original
from rewrite.entry import install, session_of
from rewrite.ir.errors import PassError, RewriteError
from rewrite.ir.passes import Pass
from rewrite.ir.registry import as_passes
from rewrite.measuring import measure_call, measure_sites
from rewrite.prediction import Gate
from rewrite.report import Measured, Report
from rewrite.session import Session

ModuleType = TypeVar("ModuleType", bound=nn.Module)
Passes = Sequence[str | Pass] | str | Pass
ExampleInputs = tuple[Any, ...] | Mapping[str, Any] | None


def rewrite(
    model: ModuleType,
    passes: Passes,
    example_inputs: ExampleInputs = None,
    inplace: bool = False,
    backend: InnerBackend = "eager",
    only_if_faster: bool = False,
    measure: bool = False,
) -> ModuleType:
    """The model with its attention rewritten: same class, same state_dict keys for what was there, `generate()` still works.

    model: any nn.Module that Dynamo can trace. passes: names, text with parameters (``"agent(tokens=49)"``) or objects, in any order.
    example_inputs: a tuple of positional or a mapping of keyword arguments of `forward`; with None the rewriting happens at the first
    call. inplace: change this model instead of a deep copy of it. backend: any torch.compile backend; it receives the rewritten graphs.
    only_if_faster: leave sites alone where the passes' form is predicted to be slower, from multiply-adds and bytes against ceilings
    that are measured on the device; without it they are rewritten as asked, and one `SlowerWarning` names them. What is decided at the
    first call's sizes holds for all. measure: time every rewritten site on its real operands, and the whole model, before and after, for
    the report beside the prediction; it needs example_inputs.

    Raises `PassError` for a pass list that cannot be taken as written, `NoAttentionError`, `NotApplicableError` for a pass that fits no
    site, and the model's own error for inputs it does not take; the model is then what it was.
    """
    chosen = as_passes(passes)
    if not isinstance(model, nn.Module):
        raise TypeError(f"rewrite() takes an nn.Module, not {type(model).__name__}")
    _require_original(model)
    if isinstance(backend, str) and backend not in torch._dynamo.list_backends(exclude_tags=()):
        raise RewriteError(f"there is no torch.compile backend {backend!r}; there are: {', '.join(torch._dynamo.list_backends())}, eager")
    if not chosen:
        raise PassError("the pass list is empty; explain(model, example_inputs) shows what there is to rewrite")
    arguments, keywords = _split(example_inputs)
    adding = [str(one) for one in chosen if one.adds_parameters()]
    if example_inputs is None and adding:
        raise PassError(f"{', '.join(adding)} adds parameters to the model and needs example_inputs to know their shapes")
    if measure and example_inputs is None:
        raise PassError("measure=True times sites on their operands, and needs example_inputs")
    target = model if inplace else copy.deepcopy(model)
    gate = Gate() if only_if_faster else None
    session = Session(target, chosen, backend, may_add_parameters=example_inputs is not None, gate=gate)
    session.report = Report(tuple(str(one) for one in chosen), notes=["rewriting happens at the first call"])
    if example_inputs is not None:
        session.prepare(arguments, keywords)
        session.register_parameters()
        if measure:
            measured = measure_sites(session, arguments, keywords)
            session.report.sites = [replace(site, measured=measured.get(site.qualified_name)) for site in session.report.sites]
            before = measure_call(target, lambda *given, **named: call_original(target, given, named), arguments, keywords)
        session.warn_slower()
    install(session)
    if measure:
        session.report.measured = Measured(before, measure_call(target, target, arguments, keywords))
    return target


def explain(model: nn.Module, example_inputs: tuple[Any, ...] | Mapping[str, Any], passes: Passes = ()) -> Report:
    """What `rewrite` would do with the model, as a `Report`; with no passes, what there is. The model is not changed.

    Raises what `rewrite` would raise.
    """
    chosen = as_passes(passes)
    if session_of(model) is not None:
        raise RewriteError("this model is rewritten already; its report is model.rewrite_report")
    _require_original(model)
    arguments, keywords = _split(example_inputs)
    session = Session(model, chosen, "eager", may_add_parameters=True)
    session.prepare(arguments, keywords)
    return session.report


def autotune(enabled: bool = True) -> codegen.Autotuning:
    """Choose the tiles of kernels by timing them on the device: ``autotune()`` from now on, ``with autotune():`` for a block.

    enabled: False goes back to the table of tiles, the default. The environment variable REWRITE_AUTOTUNE=1 does the same for a whole
    process, where nothing was called. The first launch of a kernel at new sizes (each rounded up to a power of two), dtype or device then
    takes seconds; what is found is kept beside the emitted kernels, and later processes that autotune take it from there. Results may
    differ from the table's in the last bits, because sums run in another order. During the capture of a CUDA graph nothing is timed: what
    was not chosen before runs with the table's tile.
    """
    return codegen.Autotuning(enabled)


def kernels(model: nn.Module) -> tuple[codegen.Kernel | codegen.StateKernel, ...]:
    """The kernels that were emitted for a rewritten model so far, in order of their sites.

    Linear attention has two entries: a `codegen.Kernel` for short sequences, which goes pair by pair, and a `codegen.StateKernel`, several
    kernels in a file, whose `compile` gives one result for each.
    """
    session = session_of(model)
    if session is None:
        raise RewriteError("this model was not rewritten; kernels() takes what rewrite() returned")
    return tuple(session.kernels)


def _require_original(model: nn.Module) -> None:
    if session_of(model) is not None:
        raise RewriteError("this model is rewritten already; rewrite the original with all the passes in one list")
    inside = next((name for name, module in model.named_modules() if session_of(module) is not None), None)
    if inside is not None:
        raise RewriteError(f"{inside} in this model is rewritten already; rewrite the whole model once, with all the passes in one list")


def _split(example_inputs: ExampleInputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if example_inputs is None:
        return (), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, tuple):
        return example_inputs, {}
    raise TypeError(f"example_inputs is a tuple or a mapping of keyword arguments, not {type(example_inputs).__name__}")
