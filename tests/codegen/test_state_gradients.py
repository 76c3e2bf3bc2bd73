"""The gradients of linear attention as linear attentions, against autograd of the definition, and which kernels serve them."""

from __future__ import annotations

import pytest
import torch
from attention_forms import Shape
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_forms import FORMS, linear_operands

from codegen.state_gradients import GradientForms, gradient_forms, gradients_through_state
from codegen.state_kernels import has_triton_state_backward
from rewrite.ir import semantics

SERVED = {name: forms for name, (form, _) in FORMS.items() if isinstance(forms := gradient_forms(form), GradientForms)}


def dense(attend, operands, tensors):  # type: ignore[no-untyped-def]
    return semantics.attend(attend, {**tensors, **dict(zip(("query", "key", "value"), operands, strict=True))})


def test_which_have_kernels() -> None:
    assert FORMS.keys() - SERVED.keys() == {"gated", "gated, causal", "packed, gated, padded"}
    assert "do not turn round" in str(gradient_forms(FORMS["gated"][0]))
    # Of "columns" the score does not depend on queries and keys at all.
    without = {name: has_triton_state_backward(FORMS[name][0], ()) for name in FORMS}
    assert {name for name, reason in without.items() if reason} == (FORMS.keys() - SERVED.keys()) | {"columns", "prefix", "frames"}
    assert "the gradient of rate" in str(has_triton_state_backward(FORMS["lightning"][0]))
    assert has_triton_state_backward(FORMS["hedgehog, causal"][0]) is None


@given(
    st.sampled_from(list(SERVED)),
    st.sampled_from([(1, 1), (37, 37), (20, 53), (53, 20)]),
    st.sampled_from([1e-4, 0.3]),
    st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_gradients_in_double(form: str, lengths: tuple[int, int], rate: float, seed: int) -> None:
    operation, forms = FORMS[form][0], SERVED[form]
    shape = Shape(2, 4, 2, *lengths, 8, 11)
    values = linear_operands(operation, shape, torch.float64, seed, rate)
    leaves = [values[name].requires_grad_() for name in ("query", "key", "value")]
    out = semantics.attend(operation, values)
    generator = torch.Generator().manual_seed(seed)
    received = torch.randn(out.shape, dtype=torch.float64, generator=generator)
    wanted = torch.autograd.grad(out, leaves, received, allow_unused=True)
    operands = tuple(leaf.detach() for leaf in leaves)
    found = gradients_through_state(operation, forms, (received, torch.zeros(out.shape[:3])), out.detach(), operands, values, dense)  # type: ignore[arg-type]
    for left, reference in zip(found, wanted, strict=True):
        right = torch.zeros_like(left) if reference is None else reference
        largest = max(1.0, float(right.abs().max()), float(left.abs().max()))
        assert (left - right).abs().max() <= torch.finfo(torch.float64).eps * 2**12 * largest


@pytest.mark.parametrize("form", ["hedgehog", "hedgehog, causal"])
def test_gradient_of_the_log_sum_exp(form: str) -> None:
    operation = FORMS[form][0]
    values = linear_operands(operation, Shape(n_queries=37, n_keys=37), torch.float64)
    leaves = [values[name].requires_grad_() for name in ("query", "key")]
    weights = values["query"] @ values["key"].repeat_interleave(2, 1).transpose(-2, -1)
    seen = torch.ones(37, 37).tril() if "causal" in form else torch.ones(37, 37)
    wanted = torch.autograd.grad((weights * seen).sum(-1).log().sum(), leaves)
    operands = values["query"].detach(), values["key"].detach(), values["value"].detach()
    out = semantics.attend(operation, values).detach()
    nothing = torch.zeros_like(out), torch.ones(out.shape[:3])
    found = gradients_through_state(operation, SERVED[form], nothing, out, operands, values, dense)
    for left, right in zip(found, wanted, strict=False):
        assert (left - right).abs().max() <= 1e-11 * float(right.abs().max())
