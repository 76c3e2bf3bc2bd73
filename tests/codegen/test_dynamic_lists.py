"""Kernels that walk lists made on the device, in Triton's interpreter: right, clean of what no list names, and the same for all data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import attention_forms as forms
import interpreted
import pytest
import sympy
import test_backward_kernels as backward
import test_interpreter as forward
import torch
import triton
from attention_forms import SCALE, Shape, operands
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_tile_masks import CAUSAL, PREDICATES
from test_token_order import regions, with_choice

from codegen import emit, emit_backward, kernel
from codegen import tile_list as tile_lists
from codegen.operator import attend_op
from codegen.torch_backward import attend_gradients
from rewrite.ir import QK, Attend, J, tensor


@pytest.fixture(scope="module")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    with interpreted.start() as pool:
        yield pool


def chosen() -> Attend:
    """Blocks that every head chooses for itself, behind a prefix that sees all and that all see."""
    return replace(forms.plain(), mask=PREDICATES["blocks, prefix"])


FORMS: dict[str, Callable[[], Attend]] = {
    "packed": forms.packed,
    "packed, causal, padded": lambda: replace(forms.plain(), mask=PREDICATES["packed, causal, padded"]),
    "packed, biased by pair": lambda: replace(forms.packed(CAUSAL), score=SCALE * QK + tensor("bias", "hij")),
    "packed, one part looked at by pair": lambda: forms.packed(sympy.Ne(tensor("mask", "bhij"), 0)),
    "packed, sinks": lambda: replace(forms.packed(), sink=tensor("t", "h")),
    "packed, rectified": lambda: replace(forms.packed(), score=forms.rectified().score, normaliser="sum"),
    "chosen blocks": chosen,
    "spans of heads": lambda: replace(forms.plain(), mask=PREDICATES["spans of heads"]),
}
CASES = (
    (Shape(2, 2, 1, 35, 35, 16, 24), torch.float32, False),
    (Shape(1, 2, 1, 32, 37, 40, 40), torch.float32, True),
    (Shape(1, 2, 2, 37, 49, 8, 8), torch.bfloat16, False),
)


@pytest.mark.parametrize(("form", "case"), [(form, CASES[place % len(CASES)]) for place, form in enumerate(FORMS)])
def test_form(interpreter: ProcessPoolExecutor, form: str, case: tuple[Shape, torch.dtype, bool]) -> None:
    forward.check(interpreter, FORMS[form](), *case)
    backward.check(interpreter, FORMS[form](), *case)


few = settings(max_examples=2, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


@few
@given(form=st.sampled_from(list(FORMS)), shape=backward.shapes(), dtype=st.sampled_from(forward.DTYPES))
def test_any_form_at_any_shape(interpreter: ProcessPoolExecutor, form: str, shape: Shape, dtype: torch.dtype) -> None:
    forward.check(interpreter, FORMS[form](), shape, dtype, False)
    backward.check(interpreter, FORMS[form](), shape, dtype, False)


LENGTH = 96
FIRST = 64
SIZE = Shape(1, 2, 1, LENGTH, LENGTH, 8, 8)


def two_sequences(first: int) -> dict[str, torch.Tensor]:
    segments = (torch.arange(LENGTH) >= first).int()[None]
    return operands(forms.packed(CAUSAL), SIZE) | {"query_segments": segments, "key_segments": segments}


def run(interpreter: ProcessPoolExecutor, attend: Attend, values: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The result, and the gradients of query, key and value for ones."""
    given_ = [values[name] for name in ("query", "key", "value", *attend.tensors())]
    results = interpreter.submit(interpreted.run, attend.to_json(), given_, (16, 16)).result()
    received = torch.ones_like(results[0]), torch.zeros_like(results[1])
    found = interpreter.submit(interpreted.run_backward, attend.to_json(), given_, received, [], (16, 16), results).result()
    return results[0], dict(zip(("query", "key", "value"), found, strict=True))


def test_the_tiles_of_another_sequence_are_not_touched(interpreter: ProcessPoolExecutor) -> None:
    """Where hidden keys are no numbers, a tile that held some would give none: zero times no number is none."""
    attend, values = forms.packed(CAUSAL), two_sequences(FIRST)
    out, gradients = run(interpreter, attend, values)
    for name in ("query", "key", "value"):
        values[name] = values[name].clone()
        values[name][:, :, FIRST:] = torch.nan
    poisoned, poisoned_gradients = run(interpreter, attend, values)
    assert torch.equal(poisoned[:, :, :FIRST], out[:, :, :FIRST])
    assert poisoned[:, :, FIRST:].isnan().all()
    for name, gradient in poisoned_gradients.items():
        assert torch.equal(gradient[:, :, :FIRST], gradients[name][:, :, :FIRST]), name


def test_keys_that_no_block_chose_are_not_touched(interpreter: ProcessPoolExecutor) -> None:
    attend = forms.masked_by_block()
    values = operands(attend, replace(SIZE, n_queries=80, n_keys=72))
    # Blocks of 9 keys: the first two lie in tiles 0 and 1, and what shares a tile with a chosen block is looked at.
    values["mask"] = (torch.arange(8) < 2).expand(1, 16, 8)
    job = interpreter.submit(interpreted.run, attend.to_json(), [values[name] for name in ("query", "key", "value", "mask")], (16, 16))
    for name in ("key", "value"):
        values[name] = values[name].clone()
        values[name][:, :, 32:] = torch.nan
    given_ = [values[name] for name in ("query", "key", "value", "mask")]
    poisoned, _ = interpreter.submit(interpreted.run, attend.to_json(), given_, (16, 16)).result()
    assert not poisoned.isnan().any()
    assert torch.equal(poisoned, job.result()[0])


def test_other_lengths_run_the_same_kernel(interpreter: ProcessPoolExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is emitted for them, and what a launch compiles for, the types and alignment of its arguments, does not change."""
    monkeypatch.setattr(tile_lists, "LEAST_WORK", 0)
    attend = forms.packed(CAUSAL)
    emitted = kernel.kernel_for(attend.to_json())
    lists = []
    for first in (7, 48, 96):
        values = two_sequences(first)
        forward.check(interpreter, attend, SIZE, torch.float32, False)
        operands_ = (values["query"], values["key"], values["value"])
        (predicate,) = (line for line in emitted.source.splitlines() if line.startswith("LISTED_MASK"))
        lists.append(tile_lists.tile_list(predicate.split("'")[1], values, operands_, (16, 16)))
    assert kernel.kernel_for(attend.to_json()) is emitted
    assert len({(each.starts.shape, each.blocks.shape, each.per_b, each.per_h) for each in lists}) == 1
    assert len({tuple(each.starts.tolist()) for each in lists}) == 3


def test_kernels_are_given_tokens_in_the_order_of_regions(interpreter: ProcessPoolExecutor) -> None:
    """The results, and every gradient, in the tokens' own order, at the tiles of the table."""
    grid, counts = (16, 32), (2, 4)
    attend = replace(regions(grid, counts, 1), score=SCALE * QK + tensor("bias", "bj"), sink=tensor("t", "h"))
    shape = Shape(1, 1, 1, 513, 513, 8, 8)
    values = with_choice(attend, shape, counts, torch.float32)
    qkv, names = [values[name] for name in ("query", "key", "value")], list(attend.tensors())
    given = [*qkv, *(values[name] for name in names)]
    wanted = [names.index("bias")]
    received = torch.randn(1, 1, 513, 8, generator=torch.Generator().manual_seed(3)), torch.zeros(1, 1, 513)
    out, lse, *found = interpreter.submit(interpreted.run_in_order, attend.to_json(), given, received, wanted).result()
    expected = attend_op(*qkv, [values[name] for name in names], attend.to_json())
    torch.testing.assert_close(out, expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse, expected[1], rtol=1e-4, atol=1e-5)
    lowered = attend_gradients(attend, received, tuple(qkv), values, ["bias"])
    for gradient, other in zip(found, lowered, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_nothing_spills(target: str, head_dim: int) -> None:
    types = dict.fromkeys(("query_segments", "key_segments"), torch.int32)
    attend = forms.packed(CAUSAL)
    assert emit(attend).compile(target, torch.bfloat16, head_dim, tensor_dtypes=types).spills == 0
    if (target, head_dim) in (("sm_80", 64), ("sm_90", 128)) and not triton.__version__.startswith("3.6."):
        for compiled in emit_backward(attend).compile(target, torch.bfloat16, head_dim, tensor_dtypes=types).values():
            assert compiled.spills == 0


def test_padding_is_looked_at_by_pair() -> None:
    assert "tile_list" not in emit(forms.masked("bj")).source
    assert "tile_list" in emit(replace(forms.masked("bij"), mask=sympy.And(forms.masked("bij").mask, J > 2))).source
