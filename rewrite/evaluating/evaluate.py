"""Measures settings of passes on a task, one after the other; what a results file holds already is not measured again."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from torch.nn import functional

from rewrite.api import explain, rewrite
from rewrite.evaluating.interval import wilson
from rewrite.evaluating.settings import Setting
from rewrite.evaluating.task import Task
from rewrite.ir.errors import NotApplicableError, RewriteError
from rewrite.measuring import measure_call
from rewrite.prediction import SlowerWarning

Row = dict[str, Any]
EVERY = "all"
ORIGINAL = "original"
_ORIGINAL = Setting(ORIGINAL, "", None, ())


@dataclass(frozen=True)
class Header:
    """What rows belong together: the digest of the model's files, the task, and how many samples were asked for."""

    model: str
    task: str
    samples: int

    @classmethod
    def of(cls, folder: Path, task: str, samples: int) -> Header:
        digest = hashlib.sha256()
        for file in sorted(folder.rglob("*")):
            if file.suffix in (".safetensors", ".bin", ".json") and file.name != "results.json":
                digest.update(file.name.encode() + file.read_bytes())
        return cls(digest.hexdigest()[:16], task, samples)


@dataclass(frozen=True)
class Answers:
    """Of every sample: the share of its labels that are right, its loss, what was answered, and its groups."""

    right: torch.Tensor
    loss: torch.Tensor
    said: list[torch.Tensor]
    groups: tuple[str, ...]


def evaluate(task: Task, settings: Sequence[Setting], header: Header, file: Path, console: Console | None = None) -> list[Row]:
    """Rows for every setting, and first for the model as it is ("original"); each is written to `file` (JSON) as soon as it is measured.

    A row has accuracy with its 95 % interval (low, high), agreement with the original's answers with the same, loss (mean cross-entropy, in
    nats), multiply_adds of a sample and seconds of the first batch, both beside those of the original; for all samples and for each group.
    A setting that fits nothing has `declined`, the reason, in place of figures. Raises `RewriteError` where `file` holds rows of another
    model, task or number of samples.
    """
    rows = _known(file, header)
    done = {(row["method"], json.dumps(row["value"])) for row in rows}
    todo = [one for one in settings if (one.method, json.dumps(one.value)) not in done]
    if not todo:
        return rows
    place = {(one.method, json.dumps(one.value)): number for number, one in enumerate([_ORIGINAL, *settings])}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress, torch.no_grad():
        each, model = len(task.batches), task.model.eval()
        bar = progress.add_task("original", total=each * (1 + len(todo)))
        before, unchanged = _answers(task, model, lambda: progress.advance(bar)), _unchanged(task, model)
        if not rows:
            rows = _rows(_ORIGINAL, before, before, unchanged)
        for setting in todo:
            progress.update(bar, description=setting.text or f"{setting.method} at {setting.value}")
            if not setting.passes:
                progress.advance(bar, each)
                rows += _rows(setting, before, before, unchanged)
            else:
                try:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore", SlowerWarning)  # multiply-adds and seconds are told
                        rewritten = rewrite(model, list(setting.passes), example_inputs=task.batches[0].inputs)
                except NotApplicableError as error:
                    progress.advance(bar, each)
                    rows.append({**_named(setting), "group": EVERY, "declined": str(error)})
                else:
                    figures = _costs(task, model, rewritten)
                    rows += _rows(setting, _answers(task, rewritten, lambda: progress.advance(bar)), before, figures)
            rows.sort(key=lambda row: place.get((row["method"], json.dumps(row["value"])), len(place)))
            _write(file, header, rows)
    return rows


def _answers(task: Task, model: nn.Module, advance: Callable[[], object]) -> Answers:
    """What a model answers to the whole task."""
    right, loss, said, groups = [], [], [], list[str]()
    for batch in task.batches:
        logits = task.logits(model(**batch.inputs)).float()
        if logits.shape[:-1] != batch.labels.shape:
            raise RewriteError(f"the task's logits are {list(logits.shape)}; for labels {list(batch.labels.shape)} the classes come behind")
        labels = batch.labels.to(logits.device)
        answer = logits.argmax(-1)
        each = functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none").reshape(labels.shape)
        right.append((answer == labels).float().flatten(1).mean(1) if labels.ndim > 1 else (answer == labels).float())
        loss.append(each.flatten(1).mean(1) if labels.ndim > 1 else each)
        said.append(answer)
        groups += batch.groups or [""] * len(labels)
        advance()
    return Answers(torch.cat(right), torch.cat(loss), said, tuple(groups))


def _costs(task: Task, model: nn.Module, rewritten: Any) -> Row:
    """Multiply-adds of a sample and seconds of the first batch, of the original and of what was made of it."""
    number, report = len(task.batches[0].labels), rewritten.rewrite_report
    return {
        "multiply_adds": report.total_after.multiply_adds // number,
        "original_multiply_adds": report.total_before.multiply_adds // number,
        "seconds": _seconds(task, rewritten),
        "original_seconds": _seconds(task, model),
    }


def _unchanged(task: Task, model: nn.Module) -> Row:
    """The same where nothing is rewritten."""
    cost = explain(model, task.batches[0].inputs).total_before.multiply_adds // len(task.batches[0].labels)
    seconds = _seconds(task, model)
    return {"multiply_adds": cost, "original_multiply_adds": cost, "seconds": seconds, "original_seconds": seconds}


def _seconds(task: Task, model: nn.Module) -> float:
    return round(measure_call(model, model, (), dict(task.batches[0].inputs)), 5)


def _rows(setting: Setting, after: Answers, before: Answers, figures: Row) -> list[Row]:
    """One row for all samples and one for each group."""
    agree = torch.cat([_agreement(one, other) for one, other in zip(after.said, before.said, strict=True)])
    named = sorted(set(after.groups) - {""})
    rows = []
    for group in (EVERY, *named):
        chosen = torch.tensor([group in (EVERY, one) for one in after.groups])
        number = int(chosen.sum())
        right, agreed = (float(each[chosen].double().mean()) for each in (after.right, agree))
        (low, high), (least, most) = wilson(right, number), wilson(agreed, number)
        rows.append({
            **_named(setting), "group": group, "samples": number,
            "accuracy": round(right, 5), "low": round(low, 5), "high": round(high, 5),
            "agreement": round(agreed, 5), "agreement_low": round(least, 5), "agreement_high": round(most, 5),
            "loss": round(float(after.loss[chosen].double().mean()), 5), **figures,
        })  # fmt: skip
    return rows


def _agreement(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    same = (one == other).float()
    return same.flatten(1).mean(1) if same.ndim > 1 else same


def _named(setting: Setting) -> Row:
    return {"method": setting.method, "parameter": setting.parameter, "value": setting.value, "passes": setting.text}


def _known(file: Path, header: Header) -> list[Row]:
    """The rows of a results file; none where there is no file."""
    if not file.exists():
        return []
    found = json.loads(file.read_text())
    if found["header"] != asdict(header):
        raise RewriteError(f"{file} holds results of {found['header']}, not of {asdict(header)}: give another folder, or remove it")
    # What fitted nothing may fit by now.
    return [row for row in found["rows"] if "declined" not in row]


def _write(file: Path, header: Header, rows: Sequence[Row]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    new = file.with_suffix(".new")
    new.write_text(f'{{"header": {json.dumps(asdict(header))}, "rows": [\n{lines}\n]}}\n')
    new.replace(file)
