"""The examples run: the pass of one's own as a script, the demo and the fitting at small sizes."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import rewrite

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_custom_pass_is_short() -> None:
    assert len((EXAMPLES / "custom_pass.py").read_text().splitlines()) < 45


def test_custom_pass_runs_as_a_script() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "examples.custom_pass"], cwd=EXAMPLES.parent, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "2 rewritten" in done.stdout
    changed = done.stdout.partition("largest change of the output: ")[2].split()[0]
    assert float(changed) > 0
    kernel = done.stdout.partition("\nkernel ")[2].split(": ")[1].split()[0]
    assert Path(kernel).suffix == ".py"
    assert Path(kernel).exists()


def test_demo_runs_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo = importlib.import_module("examples.demo")
    demo_models = importlib.import_module("examples.demo_models")

    demo.main(["--small", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    right = [int(count) for count in re.findall(r"(\d+) of 12", printed)]
    assert len(right) == 2  # before, and after one pass
    assert right[0] >= 10  # the unmodified model answers
    assert "random weights" in printed
    for name in ("agent", "neighborhood", "token_exit", "sink_redistribution"):
        assert name in printed
    visual, text = demo_models.SMALL.llava_grid**2, demo_models.TEXT_BEFORE + demo_models.TEXT_AFTER
    cached = text + demo_models.SMALL.new_tokens - 1
    assert f"tokens in the KV cache of each layer: {cached + visual} {cached + visual} {cached} {cached}" in printed
    for picture in ("answers", "token_exit", "neighborhood_and_agents", "multiply_adds"):
        assert (tmp_path / f"{picture}.png").stat().st_size > 10_000


def test_linear_attention_is_fitted_without_labels(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Even where the original was trained for two epochs, a few steps bring something back, whichever pass it was."""
    monkeypatch.setenv("COLUMNS", "200")
    example = importlib.import_module("examples.linearize_and_fit")
    monkeypatch.setattr(example, "BATCH", 16)
    labels = example.digits()[0].tensors[1]
    seen: list[torch.Tensor] = []

    def fit(original: nn.Module, student: nn.Module, loader: Iterable[Any], **options: Any) -> nn.Module:
        batches = list(loader)
        seen.extend(batches)
        return rewrite.fit(original, student, loader, **options)

    monkeypatch.setattr(example, "fit", fit)
    example.main(["--epochs", "2", "--steps", "12", "12"])
    printed = capsys.readouterr().out
    assert sum(map(len, seen)) == len(labels) * len(example.PASSES)
    assert all(batch.is_floating_point() for batch in seen)
    before = float(re.search(r"softmax attention: ([\d.]+)%", printed)[1])
    rows = re.findall(r"(hedgehog|agent)\(.*?([\d.]+)% .*?([\d.]+)% .*?([\d.]+)% .*?\d+ s", printed)
    assert [row[0] for row in rows] == ["hedgehog", "agent"]
    for _, rewritten, fitted, share in rows:
        assert float(rewritten) < float(fitted) - 5
        assert float(share) == pytest.approx(100 * float(fitted) / before, abs=0.2)


def test_prune_vlm_runs_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example = importlib.import_module("examples.prune_vlm")
    pictures = importlib.import_module("examples.demo_pictures")
    shown = {one.split("(")[0] for one in example.METHODS}
    assert {"cls_prune", "cls_ensemble", "hired", "diverse", "fastv", "pyramid", "token_exit", "merge"} <= shown
    example.main(["--small", "--output", str(tmp_path / "kept.png"), "--methods", "cls_prune(keep=0.25)"])
    printed = " ".join(capsys.readouterr().out.split())
    for told in ("Random weights", "cls_prune(keep=0.25)", "9 of 36"):
        assert told in printed
    assert (tmp_path / "kept.png").stat().st_size > 10_000
    # Of two halves that are merged each has one colour.
    photo = np.random.default_rng(0).random((8, 8, 3))
    merged = pictures._merged(photo, np.repeat([[0, 1]], 8, 0).repeat(4, 1))
    assert np.allclose(merged[:, :4], photo[:, :4].mean((0, 1)))
    assert np.allclose(merged[:, 4:], photo[:, 4:].mean((0, 1)))
