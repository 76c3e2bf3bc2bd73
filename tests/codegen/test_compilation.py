"""Kernels compiled ahead of time, without a GPU."""

from __future__ import annotations

import attention_forms as forms
import pytest
import torch
import triton

from codegen import emit, emit_backward
from codegen.tiles import tile_for
from rewrite.ir import Attend, RewriteError

KERNELS: dict[str, Attend] = {
    "plain": forms.plain(),
    "neighbourhood": forms.neighbourhood_2d(32, 32, 7, 1, 1),
    "grouped": forms.grouped(),
}


# Of a program. sm_86 and sm_89 have the tiles of sm_80, and less than it has.
SHARED_MEMORY = {"sm_80": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}

# Bytes per thread that Triton 3.6 spills at tiles where 3.7 spills none, as measured with 3.6.0.
SPILLED_BY_3_6 = {
    ("sm_80", 64, "grouped"): 8,
    ("sm_100", 64, "grouped"): 16,
    ("sm_100", 128, "plain"): 24,
    ("sm_100", 128, "gathered"): 24,
}


def spills_allowed(target: str, head_dim: int, form: str) -> int:
    return SPILLED_BY_3_6.get((target, head_dim, form), 0) if triton.__version__.startswith("3.6.") else 0


@pytest.mark.parametrize("form", KERNELS)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_nothing_spills(form: str, head_dim: int, target: str) -> None:
    compiled = emit(KERNELS[form]).compile(target, torch.bfloat16, head_dim)
    assert 0 < compiled.registers <= 255
    assert compiled.spills <= spills_allowed(target, head_dim, form)
    assert 0 < compiled.shared_memory <= SHARED_MEMORY[target]
    assert f".target {target}" in compiled.ptx
    assert compiled.cubin[:4] == b"\x7fELF"


@pytest.mark.parametrize("target", SHARED_MEMORY)
def test_wide_heads_do_not_spill(target: str) -> None:
    assert emit(forms.plain()).compile(target, torch.bfloat16, 256).spills == 0


@pytest.mark.parametrize(("target", "head_dim"), [("sm_90", 64), ("sm_100", 64), ("sm_100", 128)])
def test_gathering_takes_smaller_tiles(target: str, head_dim: int) -> None:
    """At those of plain attention it spills 856 and 952 bytes."""
    compiled = emit(forms.decomposed_position(32)).compile(target, torch.bfloat16, head_dim)
    assert compiled.spills <= spills_allowed(target, head_dim, "gathered")


@pytest.mark.parametrize("form", [forms.flash_sigmoid(), forms.plain()])
def test_a_backward_of_the_newest_devices_does_not_spill(form: Attend) -> None:
    assert all(compiled.spills == 0 for compiled in emit_backward(form).compile("sm_100", torch.bfloat16, 64).values())


def test_the_newest_devices_have_rows_of_their_own() -> None:
    """More shared memory than sm_80, less on sm_120; and the tensor cores of sm_90 multiply 64 rows by four warps."""
    older, hopper, blackwell = (tile_for(64, 64, 2, capability) for capability in (80, 90, 100))
    assert (hopper.block_k, blackwell.block_k) == (128, 128) > (older.block_k,)
    assert tile_for(64, 64, 2, 75) == tile_for(64, 64, 2, 89) == tile_for(64, 64, 2, 120) == older
    assert tile_for(128, 128, 2, 103) == tile_for(128, 128, 2, 100)
    assert all(tile_for(width, width, 2, 90).block_q * 4 >= 64 * tile_for(width, width, 2, 90).warps for width in (64, 128, 256))
    assert tile_for(64, 64, 2, 90, n_queries=1).block_q == 16
    assert "wgmma" in emit(forms.plain()).compile("sm_90", torch.bfloat16, 64).ptx


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
