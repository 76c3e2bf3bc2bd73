"""The training loop of every model here: bfloat16 autocast, Muon for matrices and AdamW for the rest, resumed from its checkpoint.

The batch of a step depends on the seed and the step's number alone, so that an interrupted run goes on as if it had not been.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

# Where runs keep their checkpoints; outside git.
RUNS = Path(os.environ.get("ZOO_RUNS", "zoo_runs"))
LOG_EVERY, SAVE_EVERY = 10, 50


@dataclass(frozen=True)
class Recipe:
    """How long and how fast. rate: the peak learning rate, after `warmup` steps; it falls to nothing along a cosine."""

    steps: int
    batch: int
    rate: float = 2e-3
    warmup: int = 40
    decay: float = 0.05
    seed: int = 0


def rate_at(recipe: Recipe, step: int) -> float:
    """The learning rate's share of its peak."""
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return 0.5 * (1 + torch.cos(torch.tensor(torch.pi * min(1.0, done))).item())


def optimisers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside of layers; AdamW for embeddings, heads, norms and biases, which it is not for."""
    heads = ("head", "classifier")
    linear = [name for name, one in model.named_modules() if isinstance(one, nn.Linear)]
    inside = {f"{name}.weight" for name in linear if not any(head in name for head in heads)}
    named = [(name, one) for name, one in model.named_parameters() if one.requires_grad]
    matrices, others = ([one for name, one in named if (name in inside) == chosen] for chosen in (True, False))
    muon = torch.optim.Muon(matrices, lr=recipe.rate, weight_decay=recipe.decay, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(others, lr=recipe.rate, weight_decay=0.0, betas=(0.9, 0.98))]


def train(
    model: nn.Module,
    recipe: Recipe,
    batch: Callable[[int], Any],
    loss: Callable[[nn.Module, Any], tuple[torch.Tensor, dict[str, float]]],
    name: str,
) -> None:
    """Train `model` in place; batch: the batch of a step; loss: of a batch, and what of it to log. The log is RUNS/name/loss.csv."""
    folder = RUNS / name
    folder.mkdir(parents=True, exist_ok=True)
    file, log = folder / "checkpoint.pt", folder / "loss.csv"
    steppers = optimisers(model, recipe)
    start, rows = 0, []
    if file.exists():
        found = torch.load(file, weights_only=True)
        model.load_state_dict(found["model"])
        for stepper, state in zip(steppers, found["optimisers"], strict=True):
            stepper.load_state_dict(state)
        start, rows = found["step"], found["rows"]
    model.train()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task(name, total=recipe.steps, completed=start)
        for step in range(start, recipe.steps):
            for stepper in steppers:
                for group in stepper.param_groups:
                    group["lr"] = recipe.rate * rate_at(recipe, step)
            with torch.autocast("cpu", torch.bfloat16):
                value, shown = loss(model, batch(step))
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for stepper in steppers:
                stepper.step()
                stepper.zero_grad()
            if step % LOG_EVERY == 0 or step == recipe.steps - 1:
                rows.append({"step": step, "loss": round(value.item(), 5), **{key: round(one, 5) for key, one in shown.items()}})
                _write(log, rows)
                progress.update(task, completed=step + 1, description=f"{name} loss {value.item():.3f}")
            if (step + 1) % SAVE_EVERY == 0 or step == recipe.steps - 1:
                state = {"step": step + 1, "model": model.state_dict(), "optimisers": [one.state_dict() for one in steppers], "rows": rows}
                torch.save(state, file.with_suffix(".new"))
                file.with_suffix(".new").replace(file)
    model.eval()


def _write(log: Path, rows: list[dict[str, float]]) -> None:
    with log.open("w", newline="") as out:
        writer = csv.DictWriter(out, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
