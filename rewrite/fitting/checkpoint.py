"""Where an interrupted fitting goes on: its tensors as safetensors, the rest as JSON beside them.

A folder holds `fit.json` and the file that it names, `fit-STAGE-STEP.safetensors`. The JSON is replaced last and in one move, so whatever
interrupts the writing, the folder holds one whole checkpoint.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from rewrite.ir.errors import FittingError

FORMAT = 1


@dataclass
class Checkpoint:
    """The state between two steps.

    settings: what decides the run, plain data; a run goes on only from a checkpoint of the same. stage, step: how many stages are
    done, and how many steps of the one that follows. tensors: parameters, what the optimiser keeps of each, losses so far, by name.
    scalars: other numbers.
    """

    settings: dict[str, Any]
    stage: int = 0
    step: int = 0
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    scalars: dict[str, Any] = field(default_factory=dict)


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Replace the folder's checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"fit-{checkpoint.stage}-{checkpoint.step:06d}.safetensors"
    save_file({key: tensor.detach().contiguous() for key, tensor in checkpoint.tensors.items()}, folder / name)
    facts = {
        "format": FORMAT,
        "settings": checkpoint.settings,
        "stage": checkpoint.stage,
        "step": checkpoint.step,
        "scalars": checkpoint.scalars,
        "tensors": name,
    }
    replace_text(folder / "fit.json", json.dumps(facts, indent=1))
    for other in folder.glob("fit-*.safetensors"):
        if other.name != name:
            other.unlink()


def read_checkpoint(folder: Path, settings: dict[str, Any]) -> Checkpoint | None:
    """The folder's checkpoint, or None where it has none; `FittingError` where it is of another run, naming what differs."""
    path = folder / "fit.json"
    if not path.exists():
        return None
    try:
        facts = json.loads(path.read_text())
        if facts["format"] != FORMAT:
            raise FittingError(f"{path} is of format {facts['format']}, this version reads {FORMAT}; give another folder to start anew")
        _require_same(path, facts["settings"], settings)
        return Checkpoint(settings, facts["stage"], facts["step"], load_file(folder / facts["tensors"]), facts["scalars"])
    except (KeyError, ValueError, OSError) as error:
        raise FittingError(f"{path} holds no checkpoint that can be read ({error!r}); give another folder to start anew") from error


def _require_same(path: Path, held: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for name in wanted:
        if held.get(name) != json.loads(json.dumps(wanted[name])):
            raise FittingError(
                f"{path} is of a run with {name}={held.get(name)!r}, and this one has {wanted[name]!r}; "
                "give the same, or another folder to start anew"
            )


def replace_text(path: Path, text: str) -> None:
    """Write a file in one move."""
    fresh = path.with_name(f"{path.name}.new")
    fresh.write_text(text)
    os.replace(fresh, path)
