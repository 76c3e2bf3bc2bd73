"""Kernels that carry a state: in Triton's interpreter against the float64 reference, and compiled ahead of time."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import interpreted
import pytest
import torch
from attention_forms import Shape
from budget import expected, expected_lse, score_error, weight_error
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from linear_forms import CAUSAL, FORMS, NORMALISED, lightning, linear_operands

from codegen.state_gradients import GradientForms, gradient_forms
from codegen.state_kernels import emit_state, has_triton_state
from rewrite.ir import QK, Attend, RewriteError, tensor
from rewrite.ir.semantics import attend, attention_weights

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(scope="module")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    with interpreted.start() as pool:
        yield pool


def test_what_is_left_to_torch_says_why() -> None:
    assert not any(has_triton_state(operation) for operation, _ in FORMS.values())
    nine = sum((tensor(f"key{n}", "bj") * tensor(f"query{n}", "bi") for n in range(9)), start=QK)
    assert "8 at most" in str(has_triton_state(replace(NORMALISED, score=nine)))
    with pytest.raises(RewriteError, match="together"):
        emit_state(replace(NORMALISED, score=QK + tensor("bias", "ij")))


shapes = st.builds(
    lambda batch, heads, lengths, widths: Shape(batch, *heads, *lengths, *widths),
    st.integers(1, 2), st.sampled_from([(2, 2), (2, 1), (3, 3)]),
    st.sampled_from([(1, 1), (37, 37), (1, 70), (70, 37), (19, 83), (49, 33)]),
    st.sampled_from([(8, 8), (16, 24), (40, 40), (64, 64), (128, 16), (256, 32)]),
)  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=2, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(shape=shapes, dtype=st.sampled_from(DTYPES), rate=st.sampled_from([1e-4, 0.1, 3.0]), broadcast=st.booleans())
def test_form(interpreter: ProcessPoolExecutor, form: str, shape: Shape, dtype: torch.dtype, rate: float, broadcast: bool) -> None:
    operation = FORMS[form][0]
    values = linear_operands(operation, shape, dtype, rate=rate, broadcast=broadcast)
    given_ = [values[name] for name in ("query", "key", "value", *operation.tensors())]
    out, lse = interpreter.submit(interpreted.run_state, operation.to_json(), given_, (16, 16, 16, 32)).result()
    assert out.dtype == dtype
    assert ((out.double() - expected(operation, values)).abs() <= state_budget(operation, values, dtype)).all()
    reference = expected_lse(operation, values)
    assert torch.equal(lse == -torch.inf, reference == -torch.inf)
    finite = reference.isfinite()
    assert (lse[finite].double() - reference[finite]).abs().le(2 * score_error(operation, values)).all()


def state_budget(operation: Attend, values: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """[B, H, Nq, Dv]: as `budget.output_budget`, with weights of the products' magnitudes: a state does not know where a score cancels."""
    magnitudes = {name: value.double().abs() if value.is_floating_point() else value for name, value in values.items()}
    weights = attention_weights(operation, magnitudes).abs()
    value = magnitudes["value"].repeat_interleave(weights.shape[1] // magnitudes["value"].shape[1], 1)
    numbers = torch.finfo(dtype)
    relative = 3 * numbers.eps + (weights.shape[-1] + values["query"].shape[3]) * torch.finfo(torch.float32).eps
    smallest = numbers.eps * numbers.smallest_normal
    return (relative * weights + weight_error(operation, values)) @ value + smallest * value.sum(2, keepdim=True)


@pytest.mark.parametrize(
    ("form", "dtype", "lengths"),
    [("lightning", torch.float32, (49, 49)), ("hedgehog, causal", torch.bfloat16, (37, 70)), ("l2vit", torch.float16, (33, 40))],
)
def test_gradients(interpreter: ProcessPoolExecutor, form: str, dtype: torch.dtype, lengths: tuple[int, int]) -> None:
    """Of query, key and value, over several chunks, heads that share keys."""
    operation = FORMS[form][0]
    values = linear_operands(operation, Shape(1, 4, 2, *lengths, 16, 24), dtype)
    doubled = {name: value.double() if value.is_floating_point() else value for name, value in values.items()}
    leaves = [doubled[name].requires_grad_() for name in ("query", "key", "value")]
    out = attend(operation, doubled)
    received = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    wanted = torch.autograd.grad(out, leaves, received.double())
    operands = [values[name] for name in ("query", "key", "value", *operation.tensors())]
    given_ = out.detach().to(dtype), received, torch.zeros(out.shape[:3])
    found = interpreter.submit(interpreted.run_state_backward, operation.to_json(), operands, given_, (16, 16, 16, 32)).result()
    for left, right in zip(found, wanted, strict=True):
        assert left.dtype == dtype
        # Products of what was rounded to the dtype, each sum over a few tens of them.
        assert (left.double() - right).abs().max() <= (8 * torch.finfo(dtype).eps + 1e-4) * float(right.abs().max())


def test_a_state_outgrows_float16(interpreter: ProcessPoolExecutor) -> None:
    """Sums of keys times values that float16 cannot hold, under weights that bring them back."""
    operation = FORMS["rala"][0]
    values = linear_operands(operation, Shape(1, 1, 1, 33, 70, 16, 16), torch.float16)
    values["key"], values["value"] = values["key"].abs() * 50, values["value"].abs() * 50
    values["z"] = values["z"] / 1000
    given_ = [values[name] for name in ("query", "key", "value", "z")]
    out, _ = interpreter.submit(interpreted.run_state, operation.to_json(), given_, (16, 16, 16, 32)).result()
    assert float((values["key"][0, 0].double().T @ values["value"][0, 0].double()).max()) > torch.finfo(torch.float16).max
    assert ((out.double() - expected(operation, values)).abs() <= state_budget(operation, values, torch.float16)).all()


def backward_of(operation: Attend) -> tuple[Attend, Attend]:
    """Of the gradients' attentions the two with most to hold."""
    forms = gradient_forms(operation)
    assert isinstance(forms, GradientForms)
    return forms.of_query, forms.of_key


@pytest.mark.parametrize(
    ("operation", "target", "head_dim"),
    [
        (NORMALISED, "sm_100", 64),
        (replace(NORMALISED, mask=CAUSAL), "sm_90", 128),
        (lightning(), "sm_80", 128),
        (lightning(), "sm_90", 64),
        (FORMS["gated, causal"][0], "sm_80", 64),
        (FORMS["packed, padded and decaying"][0], "sm_80", 64),
        (FORMS["packed, causal"][0], "sm_90", 128),
        *((each, "sm_90", 128) for each in backward_of(FORMS["hedgehog, causal"][0])),
        (backward_of(FORMS["packed, causal"][0])[1], "sm_80", 256),
    ],
)
def test_nothing_spills(operation: Attend, target: str, head_dim: int) -> None:
    compiled = emit_state(operation).compile(target, torch.bfloat16, head_dim)
    assert compiled.keys() == ({"states", "outputs"} if operation == NORMALISED else {"states", "carry", "outputs"})
    for part in compiled.values():
        assert 0 < part.registers <= 255
        assert part.spills == 0
        # What sm_86 and sm_89 give a program; sm_80, sm_90 and sm_100 give more.
        assert part.shared_memory <= 99 * 1024
        assert f".target {target}" in part.ptx
