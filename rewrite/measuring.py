"""Measured times, before and after: of every site on the operands that the model has there, and of the whole model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from rewrite.beside import Observing, SiteFunctions
from rewrite.dry_run import copied, untouched
from rewrite.machine import least_time
from rewrite.report import Measured
from rewrite.runner import Runner
from rewrite.session import Session


def measure_sites(session: Session, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> dict[str, Measured]:
    """Seconds before and after, by name of the site: the least of a few runs of each form, in turns, without gradients."""
    found: dict[str, Measured] = {}
    if all(site.predicted is None for site in session.report.sites):
        return found  # no site was changed itself

    def measure(functions: SiteFunctions, values: dict[fx.Node, Any]) -> None:
        device = functions.output(values).device
        before, after = (least_time(lambda form=form: form(values), device) for form in (functions.original, functions.body))  # type: ignore[misc]
        found[functions.site.name] = Measured(before, after)

    runner = Runner(session, session.root, "", "eager", rewriter_of=functools.partial(Observing, observe=measure))
    with torch.no_grad(), untouched(session.root):
        runner.run(copied(arguments), copied(keywords))
    return found


# Of a whole model, beside one that is not counted.
RUNS = 3


def measure_call(model: nn.Module, run: Callable[..., object], arguments: tuple[Any, ...], keywords: dict[str, Any]) -> float:
    """Seconds of one call of a whole model by `run`: the least of a few, on copies of the inputs and without gradients."""
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    with torch.no_grad(), untouched(model):
        return least_time(lambda: run(*copied(arguments), **copied(keywords)), device, RUNS)
