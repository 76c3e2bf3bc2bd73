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
SAMPLES = 100
# Other versions of torch and other processors may turn so many answers.
TURNED = 2
# Of each model's task the answers that are right, without a pass ("") and with one.
RIGHT = {
    ("classification", "classifier"): {
        "": 98,
        "merge(r=32)": 95,
        "evit(keep=0.6, layers=(1, 3))": 83,
    },
}


@pytest.mark.parametrize("of", RIGHT, ids=lambda of: of[0])
def test_answers_are_as_right_as_they_were(of: tuple[str, str]) -> None:
    make, folder = of
    task: Task = getattr(tasks, make)(WEIGHTS / folder, SAMPLES)
    found = {}
    for text in RIGHT[of]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SlowerWarning)
            model = rewrite(task.model, [text], example_inputs=task.batches[0].inputs) if text else task.model
        found[text] = right(task, model)
    assert found == pytest.approx(RIGHT[of], abs=TURNED)


@torch.no_grad()
def right(task: Task, model: nn.Module) -> int:
    return sum(int((task.logits(model(**batch.inputs)).argmax(-1) == batch.labels).sum()) for batch in task.batches)


def test_the_page_is_that_of_the_results() -> None:
    assert PAGE.read_text() == page()


def test_what_ships_is_small() -> None:
    files = list(WEIGHTS.rglob("*.safetensors"))
    assert files
    assert sum(file.stat().st_size for file in files) < 30e6
    for file in files:
        assert {"config.json", "README.md", "loss.csv", "loss.png"} <= {one.name for one in file.parent.iterdir()}
