"""What is asked of a model: batches with labels, and how its output answers them. Made by a function that the caller names."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rewrite.ir.errors import RewriteError


@dataclass(frozen=True)
class Batch:
    """inputs: keyword arguments of the model. labels: int64 [B], or [B, ...] where several answers make one sample (dense labels).

    groups: for each of the B samples the name of the group that it is reported in, beside the whole; empty where there are no groups.
    """

    inputs: Mapping[str, Any]
    labels: torch.Tensor
    groups: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """A model and what it is asked. logits: of its output for a batch, [*labels.shape, classes]."""

    model: nn.Module
    batches: Sequence[Batch]
    logits: Callable[[Any], torch.Tensor]


def load_task(named: str, folder: Path, samples: int) -> Task:
    """The task that the function ``module:function`` makes of a model's folder and a number of samples.

    The module is imported as `python -m` would, from the working directory too. Raises `RewriteError` where there is no such function, or
    it makes something else.
    """
    module, _, function = named.partition(":")
    if not module or not function:
        raise RewriteError(f"the task {named!r} is not of the form module:function")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise RewriteError(f"the task {named!r} cannot be imported: {error}") from error
    task = make(folder, samples)
    if not isinstance(task, Task) or not task.batches:
        raise RewriteError(f"{named} makes {type(task).__name__}, not a rewrite.evaluating.Task with batches")
    return task
