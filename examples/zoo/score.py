"""The figures of a card: accuracy on a task's held-out samples, with intervals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from rewrite.evaluating import Batch, Task
from rewrite.evaluating.interval import wilson


@torch.no_grad()
def figures(tasks: dict[str, Callable[[Path, int], Task]], folder: Path, samples: int) -> str:
    """A table in Markdown, a row for each task and each group of one."""
    lines = ["| | samples | accuracy | 95 % interval |", "|---|---|---|---|"]
    for name, make in tasks.items():
        task = make(folder, samples)
        right: dict[str, list[float]] = {name: []}
        for batch in task.batches:
            said = task.logits(task.model(**batch.inputs)).argmax(-1)
            each = (said == batch.labels).float().reshape(len(batch.labels), -1).mean(1).tolist()
            for group, value in zip(_groups(batch), each, strict=True):
                right[name].append(value)
                if group:
                    right.setdefault(f"{name}: {group}", []).append(value)
        for row in (name, *sorted(right.keys() - {name})):
            number = len(right[row])
            share = sum(right[row]) / number
            low, high = wilson(share, number)
            lines.append(f"| {row} | {number} | {share:.1%} | {low:.1%} to {high:.1%} |")
    return "\n".join(lines)


def _groups(batch: Batch) -> tuple[str, ...]:
    return batch.groups or ("",) * len(batch.labels)
