"""The torch.compile backend: ``torch.compile(model, backend="rewrite", options={"passes": [...]})``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx

from rewrite.compiled import CompiledGraph, NoCall
from rewrite.engine import Record, Rewriter
from rewrite.ir.errors import NotApplicableError, PassError
from rewrite.ir.registry import as_passes
from rewrite.lower.interface import Allowed

_OPTIONS = frozenset({"passes", "backend"})


def rewrite_backend(
    graph_module: fx.GraphModule, inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None, **_: Any
) -> Callable[..., Any]:
    """Rewrite one captured graph and hand it to the inner backend.

    options: "passes", a pass list as `rewrite()` takes it; "backend", the inner torch.compile backend ("eager" by default). A pass that
    fits no site of a graph that has attention raises where no other pass fits either, and warns otherwise. Passes that add parameters or
    keep something beside the KV cache need `rewrite()`.
    """
    given = dict(options or {})
    unknown = sorted(set(given) - _OPTIONS)
    if unknown or "passes" not in given:
        raise PassError(f"backend 'rewrite' takes options passes=[...] and backend=...; got {', '.join(map(repr, given)) or 'none'}")
    passes = as_passes(given["passes"])
    compiled = CompiledGraph(
        graph_module,
        Rewriter(passes, allowed=Allowed(notes=False, data_sizes=given.get("backend", "eager") == "eager")),
        given.get("backend", "eager"),
        NoCall,
        _check,
    )
    compiled.prepare(inputs)
    return compiled


def _check(record: Record) -> None:
    """Say which passes fit nothing in a graph that has attention."""
    sites = record.program.sites
    declined: dict[str, list[str]] = {}
    for name, by, reason in record.program.declined:
        declined.setdefault(by, []).append(f"{name}: {reason}")
    touching = {by for _, by in record.program.touched}
    idle = {by: reasons for by, reasons in declined.items() if by not in touching and len(reasons) == len(sites)}
    if not idle:
        return
    told = "; ".join(f"{by} fits none of {len(sites)} attention sites of this graph ({reasons[0]})" for by, reasons in idle.items())
    if not touching:
        raise NotApplicableError(told)
    warnings.warn(told, stacklevel=2)
