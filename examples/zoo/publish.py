"""What a trained model ships as: float16 weights and config for `from_pretrained` of a folder, the log and its curves, and a card."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn

from .pixels import MEAN, STD
from .scenes import SIZE
from .training import RUNS, Recipe

WEIGHTS = Path(__file__).parent / "weights"
# What every card says of the data.
DATA = f"""Scenes made by `examples/zoo/scenes.py`, {SIZE} x {SIZE} pixels: two to six things (eight shapes, and scikit-learn's handwritten
digits) in eight colours and three textures, on photographs that scikit-image and scikit-learn ship, gradients and noise, under a clutter
of lines. Every training step has scenes of its own. Test scenes have digits and photographs that no training has seen."""
LIMITS = """Small, and trained on drawn scenes alone: it knows nothing of photographs of things. It is here to show what rewriting attention
does to a model's answers, and is of no other use. Data, script and weights are of this project, under its license."""


def publish(name: str, model: nn.Module, stages: dict[str, Recipe], told: dict[str, str], side: int, processor: str) -> Path:
    """Write the folder of a trained model; stages: the runs that made it, in order, by name. told: title, what (it is), command and figures
    (a table in Markdown) for its card."""
    folder = WEIGHTS / name
    folder.mkdir(parents=True, exist_ok=True)
    published: Any = model.to(torch.float16)
    published.set_attn_implementation("sdpa")
    published.save_pretrained(folder)
    told_of_pixels = {"do_resize": True, "size": {"height": side, "width": side}, "do_rescale": True, "do_normalize": True,
                 "image_mean": [MEAN] * 3, "image_std": [STD] * 3, "image_processor_type": processor}  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(told_of_pixels, indent=2) + "\n")
    logs = {stage: folder / ("loss.csv" if stage == name else f"{stage.removeprefix(name + '_')}_loss.csv") for stage in stages}
    for stage, log in logs.items():
        shutil.copy(RUNS / stage / "loss.csv", log)
    draw_curves(list(logs.values()), folder / "loss.png")
    steps = "; then ".join(
        f"{one.steps} steps of {one.batch} at {one.rate:g} (seed {one.seed}, {logs[stage].name})" for stage, one in stages.items()
    )
    parameters = sum(one.numel() for one in published.parameters()) / 1e6
    (folder / "README.md").write_text(f"""# {told["title"]}

{told["what"]} {parameters:.1f} million parameters, float16.

## Figures

{told["figures"]}

## Training data

{DATA}

## Training

`{told["command"]}`: {steps}. bfloat16 autocast, Muon for matrices and AdamW for the rest, one CPU core.

![loss](loss.png)

## Limits

{LIMITS}
""")
    return folder


def draw_curves(logs: list[Path], picture: Path) -> None:
    """The loss, and beside it every share that was logged, over steps; a row for each log."""
    figure = Figure(figsize=(7, 2.8 * len(logs)), layout="constrained")
    for (left, right), log in zip(figure.subplots(len(logs), 2, squeeze=False), logs, strict=True):
        with log.open() as file:
            rows = list(csv.DictReader(file))
        steps = [int(row["step"]) for row in rows]
        left.plot(steps, [float(row["loss"]) for row in rows], linewidth=0.8)
        left.set(title=log.stem.replace("_", ": "), xlabel="step", yscale="log")
        for key in (one for one in rows[0] if one not in ("step", "loss")):
            right.plot(steps, [float(row[key]) for row in rows], linewidth=0.8, label=key)
        right.set(title="of the training batch", xlabel="step", ylim=(0, 1))
        right.legend(fontsize=7)
    figure.savefig(picture, dpi=80)
