"""``python -m rewrite``."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass

import pytest

from rewrite import Pass, available_passes, parameter, register_pass
from rewrite.__main__ import main
from rewrite.ir import registry


def test_passes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["passes"]) == 0
    told = capsys.readouterr().out
    for cls in available_passes():
        assert cls.name in told
        assert cls.family in told


@pytest.mark.parametrize("cls", available_passes(), ids=lambda cls: cls.name)
def test_one_pass(cls: type[Pass], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    assert main(["pass", cls.name]) == 0
    told = capsys.readouterr().out
    for words in (cls.name, cls.family, cls.paper, cls.formula, *(field.name for field in cls.parameters())):
        assert words in told


def test_an_unknown_pass(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pass", "agnt"]) == 2
    told = capsys.readouterr()
    assert "no pass named 'agnt'; did you mean agent?" in told.err
    assert not told.out
    assert main(["pass", "zzz"]) == 2
    listed = capsys.readouterr().err
    assert all(cls.name in listed for cls in available_passes())


def test_backends(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["backends"]) == 0
    told = capsys.readouterr().out
    for words in ("eager", "inductor", "triton", "torch"):
        assert words in told


@pytest.mark.parametrize("arguments", [[], ["nothing"], ["pass"]])
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: rewrite" in capsys.readouterr().err


def test_a_users_pass_appears(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    available_passes()
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))

    @register_pass
    @dataclass(frozen=True)
    class Mine(Pass):
        """What mine does."""

        name = "my_own"
        family = "sparsify"
        paper = "nobody, nowhere"
        formula = "out = v"
        strength: float = parameter(0.5, "how much of it")

    assert main(["passes"]) == 0
    assert "my_own" in capsys.readouterr().out
    assert main(["pass", "my_own"]) == 0
    told = capsys.readouterr().out
    for words in ("nobody, nowhere", "out = v", "strength", "0.5", "how much of it", "What mine does."):
        assert words in told


def test_as_a_program() -> None:
    done = subprocess.run([sys.executable, "-m", "rewrite", "passes"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "agent" in done.stdout
    assert not done.stderr
