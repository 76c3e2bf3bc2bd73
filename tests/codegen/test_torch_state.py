"""Linear attention through its state against the definition: results, every gradient, memory, what a decay may be."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import sympy
import torch
from attention_forms import Shape
from budget import expected, expected_lse, output_budget
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_forms import CAUSAL, FORMS, NORMALISED, lightning, linear_operands
from test_torch_lowering import Largest

from codegen import state_call, torch_streaming
from codegen.contraction_order import Sizes, StatePlan, chunked, state_plan
from codegen.interval_plan import interval_steps
from codegen.operator import attend, attend_op
from codegen.state_form import StateForm, state_form
from codegen.torch_backward import attend_gradients
from codegen.torch_streaming import attend_forward, output_like
from rewrite.ir import Attend, semantics, tensor


@contextmanager
def by_state(chunk: int) -> Iterator[None]:
    """Every linear attention goes through its state, `chunk` queries at a time, whatever that costs; results start as NaN."""

    def plan(operation: Attend, sizes: Sizes) -> StatePlan:
        form = state_form(operation)
        assert isinstance(form, StateForm)
        return chunked(form, sizes, chunk)

    def poisoned(*like: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(made.fill_(torch.nan) for made in output_like(*like))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state_call, "state_plan", plan)
        patch.setattr(state_call, "interval_plan", partial(interval_steps, chunk=chunk))
        patch.setattr(torch_streaming, "output_like", poisoned)
        yield


def run(operation: Attend, values: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    tensors = [values[name] for name in operation.tensors()]
    return attend_op(values["query"], values["key"], values["value"], tensors, operation.to_json())  # type: ignore[no-any-return]


shapes = st.builds(
    lambda batch, heads, group, n_queries, n_keys, head_dim, value_dim: Shape(
        batch, heads * group, heads, n_queries, n_keys or n_queries, head_dim, value_dim
    ),
    st.integers(1, 2), st.integers(1, 2), st.integers(1, 3), st.sampled_from([1, 2, 16, 37, 70]), st.sampled_from([0, 0, 1, 23, 90]),
    st.sampled_from([8, 17, 64, 256]), st.sampled_from([8, 33]),
)  # fmt: skip


def magnitudes(operation: Attend, values: dict[str, torch.Tensor], received: torch.Tensor) -> dict[str, float]:
    """The largest entry of the result and of every gradient, with magnitudes in place of operands: there no sum cancels."""
    leaves = {name: value.detach().abs().requires_grad_() for name, value in values.items() if value.is_floating_point()}
    out = semantics.attend(operation, {**values, **leaves})
    found = torch.autograd.grad(out, list(leaves.values()), received.abs(), allow_unused=True)
    named = {"out": out.detach(), **dict(zip(leaves, found, strict=True))}
    return {name: 0.0 if part is None or not part.numel() else float(part.abs().max()) for name, part in named.items()}


@given(
    st.sampled_from(list(FORMS)), shapes, st.sampled_from([7, 16, 64]), st.booleans(), st.sampled_from([1e-4, 0.1, 3.0]), st.integers(0, 99)
)
@settings(max_examples=60, deadline=None)
def test_results_and_gradients_in_double(form: str, shape: Shape, chunk: int, broadcast: bool, rate: float, seed: int) -> None:
    operation = FORMS[form][0]
    values = linear_operands(operation, shape, torch.float64, seed, rate, broadcast)
    leaves = {name: value.requires_grad_() for name, value in values.items() if value.is_floating_point()}
    reference = semantics.attend(operation, values)
    received = torch.randn(reference.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    wanted = torch.autograd.grad(reference, list(leaves.values()), received, allow_unused=True)
    with by_state(chunk):
        out, lse = run(operation, values)
        found = torch.autograd.grad(out, list(leaves.values()), received)
    # Each is a sum of at most so many products of these magnitudes.
    terms = max(shape.n_queries, shape.n_keys) * max(shape.head_dim, shape.value_dim) * shape.batch * shape.heads
    bounds, unit = magnitudes(operation, values, received), torch.finfo(torch.float64).eps * terms
    largest = max(1.0, *(float(leaf.detach().abs().max()) for leaf in leaves.values())) ** 2 * float(received.abs().max())
    assert (out - reference).abs().max() <= unit * (bounds["out"] + largest)
    for name, left, right in zip(leaves, wanted, found, strict=True):
        assert (right - (0 if left is None else left)).abs().max() <= unit * (bounds[name] + largest), name
    log = expected_lse(operation, values)
    assert torch.equal(lse == -torch.inf, log == -torch.inf)
    assert torch.allclose(lse.double(), log.float().double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision(form: str, dtype: torch.dtype) -> None:
    operation = FORMS[form][0]
    values = linear_operands(operation, Shape(n_queries=53), dtype)
    with by_state(16):
        out, _ = run(operation, values)
    assert out.dtype == dtype
    assert ((out.double() - expected(operation, values)).abs() <= output_budget(operation, values, dtype)).all()


@pytest.mark.parametrize("form", ["hedgehog", "hedgehog, causal", "gated, causal"])
def test_gradient_of_the_log_sum_exp(form: str) -> None:
    operation = FORMS[form][0]
    values = linear_operands(operation, Shape(), torch.float64)
    leaves = [values[name].requires_grad_() for name in ("query", "key")]
    reference = expected_lse(operation, values)
    wanted = torch.autograd.grad(reference.masked_fill(reference == -torch.inf, 0.0).sum(), leaves)
    with by_state(16):
        lse = run(operation, values)[1]
        found = torch.autograd.grad(lse.masked_fill(lse == -torch.inf, 0.0).sum(), leaves)
    for left, right in zip(found, wanted, strict=True):
        assert (left - right).abs().max() <= torch.finfo(torch.float64).eps * 2**14 * max(1.0, float(right.abs().max()))


def test_hidden_keys_reach_nothing() -> None:
    """A batch whose keys are all padding gives zeros, and what padding holds is not read into a sum."""
    operation = FORMS["gated, causal"][0]
    values = linear_operands(operation, Shape(), torch.float64)
    values["mask"][0] = False
    values["key"][0] = torch.inf
    with by_state(16):
        out, lse = run(operation, values)
    assert (out[0] == 0).all()
    assert (lse[0] == -torch.inf).all()
    assert out[1].isfinite().all()


@pytest.mark.parametrize("form", ["lightning", "hedgehog, causal", "inline"])
def test_memory_is_linear(form: str) -> None:
    operation, n, width = FORMS[form][0], 4096, 32
    values = linear_operands(operation, Shape(1, 2, 2, n, n, width, width))
    operands = values["query"], values["key"], values["value"]
    assert state_plan(operation, Sizes.of(*operands)) is not None
    with Largest() as forward:
        attend_forward(operation, *operands, values)
    with Largest() as backward:
        wanted = [name for name in operation.tensors() if values[name].is_floating_point()]
        attend_gradients(operation, (torch.ones(1, 2, n, width), torch.zeros(1, 2, n)), operands, values, wanted)
    # Features and gradients of all tokens, or the scores of a chunk; a state of every token would be 32 times as much.
    assert forward.elements <= 2 * 2 * n * (width + 1)
    assert backward.elements <= 2 * 2 * n * (width + 1)


def test_backward_is_deterministic() -> None:
    operation = FORMS["padded and decaying"][0]
    values = linear_operands(operation, Shape(n_queries=70, n_keys=70))
    received = torch.ones(2, 4, 70, 16), torch.zeros(2, 4, 70)
    operands = values["query"], values["key"], values["value"]
    with by_state(16):
        runs = [attend_gradients(operation, received, operands, values, ["rate"]) for _ in range(2)]
    assert all(torch.equal(left, right) for left, right in zip(*runs, strict=True))


@pytest.mark.parametrize("operation", [NORMALISED, replace(NORMALISED, mask=CAUSAL), lightning()])
def test_both_orders_agree_where_the_choice_changes(operation: Attend) -> None:
    """The same operator at lengths on either side of the choice, as a model calls it."""
    for n in (5, 700):
        values = linear_operands(operation, Shape(1, 4, 2, n, n, 8, 8), torch.float64)
        out = attend(operation, values["query"], values["key"], values["value"], values)
        chosen = state_plan(operation, Sizes(1, 4, 2, n, n, 8, 8)) is not None
        assert chosen == (n == 700)
        reference = semantics.attend(operation, values)
        assert (out - reference).abs().max() <= torch.finfo(torch.float64).eps * 64 * n * float(reference.abs().max())


@pytest.mark.parametrize("form", ["hedgehog", "hedgehog, causal", "lightning"])
@pytest.mark.parametrize("n_queries", [600, 300])
def test_a_mask_by_pair_that_is_padding_and_order_is_read_as_these(form: str, n_queries: int) -> None:
    """As models hand it over: rows padded on the left, one mask for all heads. Another mask of that shape goes pair by pair."""
    plain, causal = FORMS[form][0], FORMS[form][1]
    operation = replace(plain, mask=sympy.Ne(tensor("mask", "bij"), 0))
    values = linear_operands(operation, Shape(2, 4, 2, n_queries, 600, 8, 8), torch.float64)
    order = torch.arange(600) <= torch.arange(n_queries)[:, None] + 600 - n_queries if causal else torch.ones(n_queries, 600).bool()
    values["mask"] = order & (torch.arange(600) >= torch.tensor([0, 50])[:, None, None])
    odd = {**values, "mask": values["mask"].clone()}
    odd["mask"][1, 200, 90] ^= True
    for given_, by_state_ in ((values, True), (odd, False)):
        operands = given_["query"], given_["key"], given_["value"]
        assert (state_call.through_state(operation, operands, given_) is not None) == by_state_
        leaves = [operand.requires_grad_() for operand in operands]
        out, reference = run(operation, given_)[0], semantics.attend(operation, given_)
        assert (out - reference).abs().max() <= torch.finfo(torch.float64).eps * 64 * 600 * float(reference.abs().max())
        received = torch.ones_like(reference)
        for found, wanted in zip(torch.autograd.grad(out, leaves, received), torch.autograd.grad(reference, leaves, received), strict=True):
            assert (found - wanted).abs().max() <= torch.finfo(torch.float64).eps * 64 * 600 * float(wanted.abs().max())
