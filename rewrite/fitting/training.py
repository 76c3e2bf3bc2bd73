"""A run of `fit`: both stages, their optimisers, and the teaching session that observes the original's sites."""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import fx, nn

from rewrite.beside import Observing, SiteFunctions
from rewrite.dry_run import copied
from rewrite.fitting.batches import Arguments, Batches, Caller
from rewrite.fitting.checkpoint import Checkpoint, write_checkpoint
from rewrite.fitting.losses import output_loss, site_loss
from rewrite.ir.errors import FittingError
from rewrite.ir.fitting import Fitting
from rewrite.ir.passes import Pass
from rewrite.report import Fitted
from rewrite.runner import Runner
from rewrite.session import Session

Loss = Callable[[Any, Any, Any], torch.Tensor]

STAGES = ("site by site", "end to end")


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
class Training:
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
