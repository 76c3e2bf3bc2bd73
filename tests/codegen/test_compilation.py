"""Kernels compiled ahead of time, without a GPU."""

from __future__ import annotations

import attention_forms as forms
import pytest
import torch
import triton

from codegen import emit
from rewrite.ir import Attend, RewriteError

KERNELS: dict[str, Attend] = {
    "plain": forms.plain(),
    "neighbourhood": forms.neighbourhood_2d(32, 32, 7, 1, 1),
    "grouped": forms.grouped(),
}


# Bytes per thread that Triton 3.6 spills at tiles where 3.7 spills none, as measured with 3.6.0.
SPILLED_BY_3_6 = {("sm_80", 64, "grouped"): 8, ("sm_100", 128, "plain"): 24}


@pytest.mark.parametrize("form", KERNELS)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_nothing_spills(form: str, head_dim: int, target: str) -> None:
    compiled = emit(KERNELS[form]).compile(target, torch.bfloat16, head_dim)
    assert 0 < compiled.registers <= 255
    allowed = SPILLED_BY_3_6.get((target, head_dim, form), 0) if triton.__version__.startswith("3.6.") else 0
    assert compiled.spills <= allowed
    # What sm_86 and sm_89 give a program; sm_80, sm_90 and sm_100 give more.
    assert 0 < compiled.shared_memory <= 99 * 1024
    assert f".target {target}" in compiled.ptx
    assert compiled.cubin[:4] == b"\x7fELF"


def test_wide_heads_do_not_spill() -> None:
    assert emit(forms.plain()).compile("sm_80", torch.bfloat16, 256).spills == 0


def test_heads_too_wide_are_refused() -> None:
    with pytest.raises(RewriteError, match="up to 256"):
        emit(forms.plain()).compile(head_dim=320)


@pytest.mark.parametrize(
    "form",
    [
        *(forms.biased("bhij"), forms.masked("bij"), forms.softcap(), forms.sinks("h"), forms.gated("bhij")),
        *(forms.decomposed_position(), forms.relative_table(), forms.guarded_table(), forms.linear(), forms.sigmoid()),
    ],
)
def test_tensors_and_caps_compile(form: Attend) -> None:
    compiled = emit(form).compile("sm_90", torch.float16, 80, value_dim=96)
    assert compiled.registers > 0


def test_unknown_targets_and_dtypes_are_refused() -> None:
    kernel = emit(forms.plain())
    with pytest.raises(RewriteError, match=r"sm_75.*sm_80, sm_90, sm_100"):
        kernel.compile("sm_75")
    with pytest.raises(RewriteError, match="float64"):
        kernel.compile(dtype=torch.float64)
