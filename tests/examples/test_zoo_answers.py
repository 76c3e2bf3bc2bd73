"""The guard: shipped models answer a fixed slice of their tasks as well as they did, with passes and without.

A pass that is broken shows up as wrong answers here, also where its tensors look plausible. The figures are those of the shipped weights on
these samples.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from examples.zoo import tasks
from examples.zoo.write_fidelity import PAGE, page
from rewrite import SlowerWarning, rewrite
from rewrite.evaluating import Task

WEIGHTS = Path(tasks.__file__).parent / "weights"
# Of each task: how many samples, and how many of a hundred answers other versions of torch and other processors may turn.
SAMPLES = {"classification": (100, 2), "segmentation": (20, 0.5), "events": (50, 4), "answering": (100, 3), "existence": (100, 3)}
# Of each model's task the answers that are right, of a hundred, without a pass ("") and with one.
RIGHT = {
    ("classification", "classifier"): {
        "": 98,
        "merge(r=32)": 95,
        "evit(keep=0.6, layers=(1, 3))": 83,
    },
    ("segmentation", "segmentation"): {"": 94.91, "merge(r=16)": 94.91, "neighborhood(window=7)": 94.46},
    ("events", "video"): {"": 100, "merge(r=16)": 96, "evit(keep=0.6, layers=(0, 2))": 88},
    ("answering", "llava"): {"": 88, "cls_prune(keep=0.25)": 71, "fastv(layer=2, drop=0.75)": 74},
    ("existence", "llava"): {"": 96, "head_reinforce(factor=2.0)": 95},
}


@pytest.mark.parametrize("of", RIGHT, ids=lambda of: of[0])
def test_answers_are_as_right_as_they_were(of: tuple[str, str]) -> None:
    make, folder = of
    samples, turned = SAMPLES[make]
    task: Task = getattr(tasks, make)(WEIGHTS / folder, samples)
    found = {}
    for text in RIGHT[of]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SlowerWarning)
            model = rewrite(task.model, [text], example_inputs=task.batches[0].inputs) if text else task.model
        found[text] = right(task, model)
    assert found == pytest.approx(RIGHT[of], abs=turned)


@torch.no_grad()
def right(task: Task, model: nn.Module) -> float:
    """Of a hundred answers; of a picture's pixels each is one."""
    answers = [task.logits(model(**batch.inputs)).argmax(-1) == batch.labels for batch in task.batches]
    return 100 * float(torch.cat([one.float().flatten() for one in answers]).mean())


def test_the_page_is_that_of_the_results() -> None:
    assert PAGE.read_text() == page()


def test_what_ships_is_small() -> None:
    files = list(WEIGHTS.rglob("*.safetensors"))
    assert files
    assert sum(file.stat().st_size for file in files) < 30e6
    for file in files:
        assert {"config.json", "README.md", "loss.csv", "loss.png"} <= {one.name for one in file.parent.iterdir()}
