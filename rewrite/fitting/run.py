"""`fit`: what passes added to a model is trained until the rewritten model does what the original did."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from rewrite.dry_run import evaluation_mode, untouched
from rewrite.entry import session_of
from rewrite.fitting.batches import Batches, Caller, repeatable
from rewrite.fitting.checkpoint import Checkpoint, read_checkpoint
from rewrite.fitting.saved import save
from rewrite.fitting.training import Loss, Training
from rewrite.ir.errors import FittingError
from rewrite.ir.selection import ROUTER
from rewrite.session import ADDED, Session, state_name

ModuleType = TypeVar("ModuleType", bound=nn.Module)


def fit(
    original: nn.Module,
    rewritten: ModuleType,
    loader: Iterable[Any],
    *,
    steps: int | tuple[int, int] = 200,
    seed: int = 0,
    loss: Loss | None = None,
    inputs: Callable[[Any], Any] | None = None,
    learning_rate: float | None = None,
    dtype: torch.dtype | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 50,
    progress: bool = True,
) -> ModuleType:
    """Train the parameters that passes added, and nothing else, until `rewritten` does what `original` does. Returns `rewritten`.

    First site by site: the original runs, and every rewritten site is trained on the operands that the original's site had, each by itself
    and all in one run; what it is compared by is the pass's own to say (`Pass.fitting`: the site's output, or the attention map). Then end
    to end: the rewritten model's output against the original's, or `loss`. Both models are in evaluation mode meanwhile, and afterwards in
    the modes they were in; of parameters and buffers only those under ``rewrite_added`` change.

    original: the model that `rewritten` was made of. rewritten: what `rewrite()` returned; it is trained in place. loader: batches, each a
    mapping of keyword arguments, a tuple of positional ones or a tensor, gone through as often as it takes; entries of a tuple that
    `forward` has no place for (labels) stay out of the call. It must give the same batches whenever it is gone through from the same random
    state of torch (its own generator counts; Python's and numpy's random states are not set); an iterator is read into memory.
    inputs: a function from a batch to what the model is called with, for other batches and for augmentation; what it draws from torch's
    random state is decided by `seed` too. steps: of each stage, or of (site by site, end to end); 0 leaves a stage out. seed: decides the
    order of batches, and all that draws random numbers. loss: ``loss(output, original_output, batch)``, a scalar tensor, for the second
    stage; by default the Kullback-Leibler divergence of the outputs' `logits`, or the relative mean squared error of outputs without such.
    learning_rate: for both stages, instead of what the passes say. dtype: of mixed precision (torch.bfloat16, or torch.float16 with a
    scaled loss); None computes as the model does. checkpoint: a folder to write to every `checkpoint_every` steps; a run that finds one
    there goes on from it, and on a CPU gives bitwise what it would have given without the interruption; when it is done the folder is what
    `load` reads. progress: bars on standard error.

    What came of it is in ``rewritten.rewrite_report.fitting``. Raises `FittingError` where there is nothing to train, the models do not
    belong together, the loader is empty, the checkpoint is of another run, or a loss is not finite; `TypeError` for other arguments.
    """
    session = _belonging(original, rewritten)
    added = _added(session)
    counts = (steps, steps) if isinstance(steps, int) else tuple(steps)
    if len(counts) != 2 or min(counts) < 0 or max(counts) == 0 or checkpoint_every < 1:
        raise FittingError(
            f"steps={steps!r}, checkpoint_every={checkpoint_every!r}: steps are a number above 0 or a pair of such, of which one may be 0"
        )
    if dtype is torch.float16 and any(parameter.dtype == torch.float16 for parameter in added.values()):
        raise FittingError("dtype=torch.float16 scales the loss, which needs parameters in float32: rewritten.float()")
    settings = {
        "passes": [str(one) for one in session.passes], "parameters": {name: list(parameter.shape) for name, parameter in added.items()},
        "steps": list(counts), "seed": seed, "learning_rate": learning_rate, "dtype": None if dtype is None else str(dtype),
    }  # fmt: skip
    folder = None if checkpoint is None else Path(checkpoint)
    state = (None if folder is None else read_checkpoint(folder, settings)) or Checkpoint(settings)
    batches = repeatable(loader)
    with contextlib.ExitStack() as stack:
        for model in (original, rewritten):
            stack.enter_context(evaluation_mode(model))
            stack.enter_context(untouched(model))
        stack.enter_context(_only(rewritten, added))
        training = Training(original, rewritten, session, added, Caller(original, inputs), loss, learning_rate, dtype, seed, state)
        bar = stack.enter_context(_bars(progress))
        with Batches(batches, seed) as first:
            training.look(first.next())
        # A copy of the loader's own generator is what a resumed run starts from, too.
        stream = stack.enter_context(Batches(batches, seed))
        stream.skip(sum(counts[: state.stage]) + state.step)
        training.restore()
        for stage, count in enumerate(counts):
            if stage >= state.stage:
                training.run(stage, count, stream, bar, folder, checkpoint_every)
    session.report.fitting = training.result()
    if folder is not None:
        save(rewritten, folder)
    return rewritten


def _belonging(original: nn.Module, rewritten: nn.Module) -> Session:
    """The rewritten model's session; `FittingError` where the two models are not one and the same but for the rewriting."""
    for name, model in (("original", original), ("rewritten", rewritten)):
        if not isinstance(model, nn.Module):
            raise TypeError(f"fit() takes an nn.Module as {name}, not {type(model).__name__}")
    session = session_of(rewritten)
    if session is None:
        raise FittingError("the second model was not rewritten; fit(original, rewritten, loader) takes what rewrite() returned")
    if any(session_of(module) is not None for module in original.modules()):
        raise FittingError(
            "the first model, or a part of it, is rewritten; fit(original, rewritten, loader) takes the model as it was before"
        )
    if not session.prepared:
        raise FittingError("the rewritten model was not called yet; give rewrite() example_inputs")
    shapes = [
        {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if not name.startswith(f"{ADDED}.")}
        for model in (original, rewritten)
    ]
    for name in shapes[0].keys() | shapes[1].keys():
        if shapes[0].get(name) != shapes[1].get(name):
            told = [str(shape.get(name, "missing")) for shape in shapes]
            raise FittingError(
                f"the models are of different architectures: {name} is {told[0]} in the original, {told[1]} in the rewritten"
            )
    return session


def _added(session: Session) -> dict[str, nn.Parameter]:
    """What the passes added, by full name, but routers, which no output has a gradient for."""
    there = dict(session.root.named_parameters())
    places = {name: f"{ADDED}.{state_name(name)}" for name in session.added if name.rpartition(".")[2] not in ROUTER}
    added = {name: there[place] for name, place in places.items() if place in there}
    if not added:
        passes = ", ".join(str(one) for one in session.passes)
        raise FittingError(
            f"there is nothing to train: none of the passes ({passes}) adds parameters to it, or routers alone, which fit_exit trains"
        )
    return added


@contextlib.contextmanager
def _only(model: nn.Module, added: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Gradients for what was added alone; afterwards every parameter takes gradients, and has those, that it did and had."""
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    try:
        for parameter, _, _ in before:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, required, gradient in before:
            parameter.requires_grad_(required)
            parameter.grad = gradient


@contextlib.contextmanager
def _bars(shown: bool) -> Iterator[Progress]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as progress:
        yield progress
