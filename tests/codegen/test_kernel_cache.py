"""Emitted files: readable, launchable, theirs alone to run who wrote them."""

from __future__ import annotations

import inspect
import os
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import attention_forms as forms
import pytest
import sympy

from codegen import cache, emit, has_triton_form
from rewrite.ir import QK, Attend, RewriteError, W, tensor


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    chosen = tmp_path / "kernels"
    monkeypatch.setenv("REWRITE_CACHE_DIR", str(chosen))
    return chosen


def test_a_kernel_is_a_file_that_reads(folder: Path) -> None:
    kernel = emit(forms.grouped(), ("layers.0.attention", "layers.1.attention"), ("sinks(p=0.6)",))
    assert kernel.name == "attend_causal_grouped"
    assert kernel.site == "layers.0.attention, layers.1.attention"
    assert kernel.passes == ("sinks(p=0.6)",)
    assert kernel.path.parent == folder
    assert kernel.path.read_text() == kernel.source
    assert kernel.path.stem == f"attend_causal_grouped_{cache.content_hash(kernel.source)}"
    module = kernel.load()
    assert "layers.1.attention" in module.__doc__
    assert "mass_visual_sink" in module.__doc__
    assert "def launch" in inspect.getsource(module.launch)
    assert "tl.dot" in inspect.getsource(getattr(module, kernel.name).fn)
    assert max(len(line) for line in kernel.source.splitlines()[:20]) <= 140


@pytest.mark.parametrize(
    ("form", "name"),
    [
        (forms.plain(), "attend"),
        (forms.biased("hij"), "attend_biased"),
        (forms.masked("bij"), "attend_masked"),
        (forms.causal(), "attend_causal"),
        (forms.neighbourhood_1d(32, 7), "attend_masked"),
        (forms.grouped(False), "attend_grouped"),
        (forms.sinks("h"), "attend_causal_sinks"),
        (forms.linear(), "attend_linear_causal"),
        (forms.sigmoid(), "attend_unnormalised_masked_biased"),
        (forms.gated("h"), "attend_causal_gated"),
    ],
)
def test_kernels_are_named_for_what_they_compute(form: Attend, name: str) -> None:
    assert emit(form).name == name


def test_the_folder_is_the_users_alone(folder: Path) -> None:
    emit(forms.plain())
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.chmod(0o770)
    with pytest.raises(RewriteError, match=r"0770.*chmod 700"):
        emit(forms.plain())


def test_a_changed_file_is_not_run() -> None:
    kernel = emit(forms.biased("ij"), ("tampered",))
    kernel.path.write_text(kernel.source + "\nprint('hello')\n")
    with pytest.raises(RewriteError, match=f"{kernel.path}.*delete"):
        kernel.load()
    kernel.path.unlink()
    with pytest.raises(RewriteError, match="emit it again"):
        kernel.load()


def test_the_default_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REWRITE_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.cache_directory() == tmp_path / "attention-rewrite"


def test_names_from_a_model_do_not_meet_the_kernels_own() -> None:
    names = ("query", "model.layers.0", "class", "row_max")
    score = sympy.Add(QK, *(tensor(name, "hij") for name in names))
    kernel = emit(Attend("result", "q", "k", "v", score), ('a"""b', "c\\d"))
    compile(kernel.source, "kernel", "exec")
    assert "model_layers_0" in kernel.source


def test_no_file_is_left_half_written(folder: Path) -> None:
    emit(forms.plain())
    assert [path.suffix for path in folder.iterdir()] == [".py"]


def test_a_kernel_file_imports_on_its_own() -> None:
    kernel = emit(forms.causal())
    code = f"import runpy; assert 'launch' in runpy.run_path({str(kernel.path)!r})"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        (forms.talking_heads(), "mixes heads"),
        (forms.renormalised(), "normalised again"),
        (forms.offset_under_a_mask(), "not w times a factor"),
        (replace(forms.plain(), weight=W**2), "not w times a factor"),
        (replace(forms.plain(), score=sympy.cbrt(QK)), "only powers"),
    ],
)
def test_what_does_not_stream_is_refused_with_the_reason(form: Attend, reason: str) -> None:
    with pytest.raises(RewriteError, match=reason):
        emit(form)
    assert reason in (has_triton_form(form) or "")
    assert has_triton_form(forms.sinks("h")) is None


def test_what_an_unusual_kernel_computes_is_said_in_its_file() -> None:
    said = emit(replace(forms.sinks("h"), weight=W * tensor("gate", "h"))).source
    assert "t[h], the logit of a key without a value" in said
    assert "w*gate[h], w being the normalised weight" in said
    assert "counts(softmax_j(score over visible keys and the sink)[i,j]) * value" in said
    assert "total + 0.25 in its place, total being the sum" in emit(forms.linear()).source
    assert max(map(len, emit(forms.decomposed_position()).source.splitlines())) <= 140
