"""`fit`: what passes added to a model is trained until the rewritten model does what the original did."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import fx, nn

from rewrite.beside import Observing, SiteFunctions
from rewrite.dry_run import copied, evaluation_mode, untouched
from rewrite.entry import session_of
from rewrite.fitting.batches import Arguments, Batches, Caller, repeatable
from rewrite.fitting.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from rewrite.fitting.losses import output_loss, site_loss
from rewrite.fitting.saved import save
from rewrite.ir.errors import FittingError
from rewrite.ir.fitting import Fitting
from rewrite.ir.passes import Pass
from rewrite.ir.selection import ROUTER
from rewrite.report import Fitted
from rewrite.runner import Runner
from rewrite.session import ADDED, Session, state_name

ModuleType = TypeVar("ModuleType", bound=nn.Module)
Loss = Callable[[Any, Any, Any], torch.Tensor]

STAGES = ("site by site", "end to end")


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
        training = _Training(original, rewritten, session, added, Caller(original, inputs), loss, learning_rate, dtype, seed, state)
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


@dataclass(eq=False, kw_only=True)
class _Teaching(Session):
    """A session on the original that changes nothing in it: its sites are observed, with the parameters of the rewritten model."""

    student: Session

    def parameter(self, name: str) -> torch.Tensor:
        return self.student.parameter(name)


def _teaching(original: nn.Module, student: Session) -> _Teaching:
    """What the rewritten model's analysis found holds for the original too."""
    return _Teaching(
        original, student.passes, "eager", may_add_parameters=True, report=student.report, prepared=True, settings=dict(student.settings),
        proofs=student.proofs, added=dict(student.added), depths=dict(student.depths), gridded=set(student.gridded), student=student,
    )  # fmt: skip


@dataclass
class _Training:
    """A run of `fit`: both stages, their optimisers, and what is kept of them."""

    original: nn.Module
    rewritten: nn.Module
    session: Session
    added: dict[str, nn.Parameter]
    caller: Caller
    loss: Loss | None
    learning_rate: float | None
    dtype: torch.dtype | None
    seed: int
    state: Checkpoint
    owners: dict[str, Pass] = field(default_factory=dict)
    observe: Callable[[SiteFunctions, dict[fx.Node, Any]], None] = field(init=False)

    def __post_init__(self) -> None:
        self.device = self.caller.device.type
        self.scaler = torch.amp.GradScaler(self.device, enabled=self.dtype is torch.float16)
        self.runner = Runner(
            _teaching(self.original, self.session), self.original, "", "eager",
            rewriter_of=functools.partial(Observing, observe=self._observed),
        )  # fmt: skip
        self.losses: dict[str, torch.Tensor] = {}
        self.trained: set[str] = set()

    def look(self, entry: Any) -> None:
        """See which pass added which parameter, on a first batch."""

        def note(functions: SiteFunctions, values: dict[fx.Node, Any]) -> None:
            self.owners.update({f"{functions.site.name}.{name}": owner for name, owner in functions.owners.items()})

        self.observe = note
        self._teach(self.caller.arguments(self.caller.placed(entry)))
        if not self.owners:
            raise FittingError("the loader's first batch reaches none of the sites that the passes added parameters to")

    def _observed(self, functions: SiteFunctions, values: dict[fx.Node, Any]) -> None:
        self.observe(functions, values)

    # Stages

    def run(self, stage: int, count: int, batches: Batches, bar: Progress, folder: Path | None, every: int) -> None:
        """One stage, from where its checkpoint stands to its end."""
        parameters = self._parameters(stage) if count else {}
        if not parameters:
            batches.skip(count - self.state.step)
            self._advance(stage + 1, 0, {}, folder)
            return
        optimizer, rates = self._optimizer(stage, parameters)
        task = bar.add_task(STAGES[stage], total=count, completed=self.state.step, loss="")
        for step in range(self.state.step, count):
            # What the model itself draws, it draws the same in a run that was interrupted.
            torch.manual_seed((self.seed * 0x9E3779B1 + (stage * 2**31) + step) % 2**63)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = 0.5 * rate * (1 + math.cos(math.pi * step / count))
            optimizer.zero_grad(set_to_none=True)
            entry = self.caller.placed(batches.next())
            self.losses = {}
            (self._by_site if stage == 0 else self._end_to_end)(entry)
            total = self._checked(stage, step)
            self.trained |= {name for name, parameter in parameters.items() if parameter.grad is not None}
            if any(parameter.grad is not None for parameter in parameters.values()):
                self.scaler.step(optimizer)
                self.scaler.update()
            bar.update(task, advance=1, loss=f"{total:.4g}")
            done = step + 1 == count
            if done or (step + 1) % every == 0:
                kept = {
                    f"adam.{name}.{key}": value
                    for name, parameter in parameters.items()
                    for key, value in optimizer.state[parameter].items()
                }
                self._advance(*((stage + 1, 0, {}) if done else (stage, step + 1, kept)), folder)
        for parameter in parameters.values():
            parameter.requires_grad_(False)
            parameter.grad = None

    def _by_site(self, entry: Any) -> None:
        def train(functions: SiteFunctions, values: dict[fx.Node, Any]) -> None:
            if not functions.owners:
                return
            learned = {functions.given[name] for name in functions.owners}
            fixed = {
                node: value.detach() if isinstance(value, torch.Tensor) and node not in learned else value for node, value in values.items()
            }
            with torch.enable_grad():
                loss = site_loss(functions, fixed)
            self._backward(functions.site.name or "the model", loss)

        self.observe = train
        with self._precision():
            self._teach(self.caller.arguments(entry))

    def _end_to_end(self, entry: Any) -> None:
        arguments, keywords = self.caller.arguments(entry)
        with self._precision():
            with torch.no_grad():
                wanted = self.original(*copied(arguments), **copied(keywords))
            output = self.rewritten(*arguments, **keywords)
            loss = output_loss(output, wanted) if self.loss is None else self.loss(output, wanted, entry)
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            raise TypeError("loss returns a tensor of one element")
        self._backward("the model's output", loss.reshape(()))

    def _backward(self, name: str, loss: torch.Tensor) -> None:
        self.losses[name] = loss.detach()
        if loss.requires_grad:
            with torch.enable_grad(), torch.autocast(self.device, enabled=False):
                self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def _teach(self, given: Arguments) -> None:
        """Run the original, its sites observed."""
        arguments, keywords = copied(given)
        session = self.runner.session
        session.warm_up(self.original, "", arguments, keywords)
        with torch.no_grad():
            self.runner.run(arguments, keywords)

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self.dtype is None else torch.autocast(self.device, self.dtype)

    def _checked(self, stage: int, step: int) -> float:
        """The step's mean loss; `FittingError` where one is not finite."""
        if not self.losses:
            return 0.0
        values = torch.stack([loss.float() for loss in self.losses.values()]).tolist()
        astray = [(name, value) for name, value in zip(self.losses, values, strict=True) if not math.isfinite(value)]
        if astray:
            raise FittingError(
                f"{astray[0][0]}: the loss is {astray[0][1]} at step {step} of fitting {STAGES[stage]}; the parameters are those of the "
                "step before. Look at the batch, lower learning_rate, or leave dtype out"
            )
        scalars = self.state.scalars
        scalars.setdefault(f"losses_{stage}", []).append(math.fsum(values) / len(values))
        for name, value in zip(self.losses, values, strict=True) if stage == 0 else ():
            scalars.setdefault("sites", {}).setdefault(name, [value, value])[1] = value
        return float(scalars[f"losses_{stage}"][-1])

    # Parameters

    def _parameters(self, stage: int) -> dict[str, nn.Parameter]:
        """What a stage trains: all that reached sites read, end to end only what the model's own loss gives a gradient."""
        chosen = {name: self.added[name] for name in self.owners if stage == 0 or self.session.added[name].trainable}
        for parameter in chosen.values():
            parameter.requires_grad_(True)
        return chosen

    def _optimizer(self, stage: int, parameters: Mapping[str, nn.Parameter]) -> tuple[torch.optim.Adam, list[float]]:
        """Adam as it was left, with the rate that each of its groups starts from."""
        groups: dict[float, list[nn.Parameter]] = {}
        for name, parameter in parameters.items():
            fitting: Fitting = self.owners[name].fitting
            own = fitting.learning_rate if stage == 0 else fitting.end_to_end_rate
            groups.setdefault(own if self.learning_rate is None else self.learning_rate, []).append(parameter)
        optimizer = torch.optim.Adam([{"params": group, "lr": rate} for rate, group in groups.items()])
        for name, parameter in parameters.items():
            kept = {key.rsplit(".", 1)[1]: value for key, value in self.state.tensors.items() if key.rsplit(".", 1)[0] == f"adam.{name}"}
            if kept:
                optimizer.state[parameter] = {key: value if key == "step" else value.to(parameter.device) for key, value in kept.items()}
        return optimizer, list(groups)

    def restore(self) -> None:
        """Parameters and the loss's scale as the checkpoint has them."""
        with torch.no_grad():
            for name, parameter in self.added.items():
                if f"parameter.{name}" in self.state.tensors:
                    parameter.copy_(self.state.tensors[f"parameter.{name}"])
        if "scaler" in self.state.scalars:
            self.scaler.load_state_dict(self.state.scalars["scaler"])
        self.trained |= set(self.state.scalars.get("trained", ()))

    def _advance(self, stage: int, step: int, kept: dict[str, torch.Tensor], folder: Path | None) -> None:
        state = self.state
        state.stage, state.step = stage, step
        state.scalars |= {"scaler": self.scaler.state_dict(), "trained": sorted(self.trained)}
        state.tensors = kept
        if folder is not None:
            state.tensors = {**{f"parameter.{name}": parameter for name, parameter in self.added.items()}, **kept}
            write_checkpoint(folder, state)

    def result(self) -> Fitted:
        idle = sorted(self.added.keys() - self.trained)
        if idle:
            warnings.warn(f"fitting never trained {', '.join(idle)}: no loss of any batch gave them a gradient", stacklevel=3)
        scalars = self.state.scalars
        sites = {name: (first, last) for name, (first, last) in scalars.get("sites", {}).items()}
        return Fitted(sites, tuple(scalars.get("losses_0", ())), tuple(scalars.get("losses_1", ())))
