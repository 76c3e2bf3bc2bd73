"""`python -m rewrite evaluate`: settings, intervals, figures against ones computed here, groups, resuming, what it writes and refuses."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from rewrite import PassError, RewriteError, rewrite
from rewrite.__main__ import main
from rewrite.evaluating import Batch, Header, Task, evaluate, load_task, settings
from rewrite.evaluating.interval import wilson
from rewrite.evaluating.results import draw
from tests.api import small

SAMPLES = 12
HERE = "tests.api.test_evaluate"


def classifying(folder: Path, samples: int) -> Task:
    """Random pictures, with labels that the model itself gives to two of three."""
    model = small.vit()
    model.load_state_dict(torch.load(folder / "model.bin"))
    batches = []
    for seed in range(samples // 4):
        pictures = small.images(4, seed=seed)
        labels = small.run(model, pixel_values=pictures).argmax(-1)
        labels[::3] = 1 - labels[::3]
        batches.append(Batch({"pixel_values": pictures}, labels, ("even", "odd") * 2))
    return Task(model, batches, lambda output: output.logits)


def per_patch(folder: Path, samples: int) -> Task:
    """Dense labels: the greatest of the channels of each token."""
    from transformers import ViTModel

    model = small.vit().vit
    assert isinstance(model, ViTModel)
    pictures = small.images(samples)
    with torch.no_grad():
        labels = model(pixel_values=pictures).last_hidden_state.argmax(-1)
    return Task(model, [Batch({"pixel_values": pictures}, labels)], lambda output: output.last_hidden_state)


def nothing(folder: Path, samples: int) -> str:
    return "no task"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.save(small.vit().state_dict(), folder / "model.bin")
    return folder


def command(folder: Path, out: Path, *arguments: str, task: str = "classifying") -> int:
    return main(["evaluate", "--model", str(folder), "--task", f"{HERE}:{task}", "--samples", str(SAMPLES), "--out", str(out), *arguments])


def test_figures_are_those_of_the_rewritten_model(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(folder, tmp_path, "--passes", "merge", "cls_prune", "--sweep", "r=0:8:2", "keep=0.5,1.0") == 0
    assert "declined" in capsys.readouterr().out
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    task = classifying(folder, SAMPLES)
    labels, before = torch.cat([one.labels for one in task.batches]), logits(task, task.model)
    for text, method, value in (("", "original", None), ("", "merge", 0), ("merge(r=8)", "merge", 8)):
        model = rewrite(task.model, [text], example_inputs=task.batches[0].inputs) if text else task.model
        after = logits(task, model)
        for group, chosen in (("all", slice(None)), ("even", slice(0, None, 2)), ("odd", slice(1, None, 2))):
            (row,) = (row for row in rows if (row["method"], row["value"], row["group"]) == (method, value, group))
            right = (after.argmax(-1) == labels)[chosen].float().mean().item()
            assert row["samples"] == len(labels[chosen])
            assert row["accuracy"] == pytest.approx(right, abs=1e-5)
            assert row["low"] <= right <= row["high"]
            assert row["agreement"] == pytest.approx((after.argmax(-1) == before.argmax(-1))[chosen].float().mean().item(), abs=1e-5)
            assert row["loss"] == pytest.approx(functional.cross_entropy(after[chosen], labels[chosen]).item(), rel=1e-3)
            assert min(row["seconds"], row["original_seconds"]) > 0
            if text:
                assert row["multiply_adds"] == model.rewrite_report.total_after.multiply_adds // 4
            assert row["original_multiply_adds"] == next(one["multiply_adds"] for one in rows)
    (declined,) = (row for row in rows if "declined" in row)
    assert (declined["method"], declined["value"]) == ("cls_prune", 0.5)
    with (tmp_path / "results.csv").open() as file:
        assert [row["accuracy"] for row in csv.DictReader(file)] == [str(row.get("accuracy", "")) for row in rows]
    for picture in ("accuracy.png", "accuracy_by_group.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def logits(task: Task, model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([small.run(model, **batch.inputs) for batch in task.batches])


def test_what_was_measured_is_not_measured_again(folder: Path, tmp_path: Path) -> None:
    task, header, file = classifying(folder, 4), Header.of(folder, "task", 4), tmp_path / "results.json"
    first = evaluate(task, settings(["merge"], ["r=0:8:2"]), header, file)
    marked = [{**row, "loss": -1.0} for row in first]
    file.write_text(json.dumps({"header": vars(header), "rows": marked}))
    again = evaluate(task, settings(["merge", "temperature(value=3.0)"], ["r=0:8:2"]), header, file)
    assert again[: len(marked)] == marked
    assert [row["method"] for row in again[len(marked) :]] == ["temperature(value=3.0)"] * 3
    assert json.loads(file.read_text())["rows"] == again
    with pytest.raises(RewriteError, match="holds results of"):
        evaluate(task, settings(["merge"], []), Header.of(folder, "task", 8), file)


def test_dense_labels(tmp_path: Path) -> None:
    rows = evaluate(per_patch(tmp_path, 2), settings(["merge"], ["r=16"]), Header("", "", 2), tmp_path / "results.json")
    assert rows[0]["accuracy"] == 1.0
    assert 0 < rows[1]["accuracy"] == rows[1]["agreement"] < 1
    assert rows[1]["samples"] == 2


def test_settings() -> None:
    found = settings(
        ["evit(layers=(1,))", "matryoshka", "composite", "merge + temperature"], ["keep=1.0:0.1", 'matryoshka.tokens="all",4', "r=0:4:5"]
    )
    assert [one.value for one in found if one.method.startswith("evit")] == [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    texts = [one.text for one in found if not one.method.startswith("evit")]
    assert texts == [
        "", "matryoshka(tokens=4)", "composite",
        "temperature", *(f"merge(r={r}) + temperature" for r in (1, 2, 3, 4)),
    ]  # fmt: skip
    assert found[0].passes == ()
    assert str(found[1].passes[0]) == "evit(keep=0.9, layers=(1,))"
    # One token is not the share 1.0.
    assert settings(["cls_prune"], ["keep=1.0,2"])[0].passes == ()


@pytest.mark.parametrize(
    ("methods", "sweeps", "reason"),
    [
        (["merge"], ["keep=1.0:0.1"], "none of the methods merge takes its values from a sweep of keep"),
        (["merge"], ["evit.keep=1.0:0.1"], "a sweep of evit.keep"),
        (["merge"], ["r"], "not of the form"),
        (["merge"], ["r=0:1:1"], "two values at least"),
        (["merge"], ["r=a:b"], "cannot be read"),
        (["merge"], ["r=0.5,1"], "r"),
        (["marge"], [], "did you mean merge"),
    ],
)
def test_what_cannot_be_read(methods: list[str], sweeps: list[str], reason: str) -> None:
    with pytest.raises(PassError, match=reason):
        settings(methods, sweeps)


def test_a_task_that_is_none(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for task, reason in (("nothing", "makes str"), ("missing", "cannot be imported")):
        assert command(folder, tmp_path, "--passes", "merge", task=task) == 2
        assert reason in capsys.readouterr().err
    assert command(tmp_path / "missing", tmp_path, "--passes", "merge") == 2
    assert "there is no folder" in capsys.readouterr().err
    with pytest.raises(RewriteError, match="module:function"):
        load_task("no_function", folder, 1)


def test_the_interval_of_a_share() -> None:
    # Of Wilson's formula, as tables have it: 9 of 10.
    assert wilson(0.9, 10) == pytest.approx((0.5958, 0.9821), abs=1e-4)
    assert wilson(0.0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    low, high = wilson(1.0, 20)
    assert (round(low, 4), high) == (0.8389, 1.0)


def test_drawing_without_rows_of_a_group(tmp_path: Path) -> None:
    draw([], tmp_path / "empty.png", ["one"])
    assert (tmp_path / "empty.png").exists()
