"""Linear attention of packed sequences through the state of each: against each of them alone, and against sequences in any order."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import interpreted
import pytest
import torch
from attention_forms import Shape
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from linear_forms import CAUSAL, FORMS, NORMALISED, lightning, linear_operands
from test_state_kernels import state_budget
from torch._subclasses.fake_tensor import FakeTensorMode

from codegen import attend, packed, segment_ids
from codegen.contraction_order import Sizes
from codegen.interval_plan import interval_plan
from codegen.intervals import intervals
from codegen.operator import attend_op
from codegen.state_call import through_state, way_on_device
from codegen.state_form import StateForm, split_by_side, state_form
from codegen.torch_streaming import attend_forward
from rewrite.ir import Attend, semantics

ALONE = {"hedgehog": NORMALISED, "hedgehog, causal": replace(NORMALISED, mask=CAUSAL), "lightning": lightning()}
NAMES = ("query", "key", "value")


@pytest.fixture(scope="module")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    with interpreted.start() as pool:
        yield pool


def one_by_one(operation: Attend, values: dict[str, torch.Tensor], lengths: list[int]) -> torch.Tensor:
    """Every sequence by itself, by the definition."""
    parts = zip(*(values[name].split(lengths, 2) for name in NAMES), strict=True)
    alone = [semantics.attend(operation, {**values, **dict(zip(NAMES, own, strict=True))}) for own in parts if own[0].shape[2]]
    return torch.cat(alone, 2)


def packed_operands(operation: Attend, lengths: list[int], shape: Shape, dtype: torch.dtype, seed: int) -> dict[str, torch.Tensor]:
    ids = segment_ids(torch.tensor([0, *lengths]).cumsum(0), sum(lengths))
    return linear_operands(operation, shape, dtype, seed) | {"query_segments": ids, "key_segments": ids}


lengths_of = st.lists(st.sampled_from([0, 1, 2]) | st.integers(3, 45), min_size=1, max_size=5).filter(any)


@settings(max_examples=5, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(
    form=st.sampled_from(list(ALONE)), lengths=lengths_of, heads=st.sampled_from([(2, 2), (2, 1)]),
    widths=st.sampled_from([(8, 8), (17, 24), (64, 64), (256, 16)]), dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_kernels(
    interpreter: ProcessPoolExecutor, form: str, lengths: list[int], heads: tuple[int, int], widths: tuple[int, int], dtype: torch.dtype,
    seed: int,
) -> None:  # fmt: skip
    """Results and the gradients of query, key and value, several chunks in a sequence and several sequences in a chunk."""
    operation, total = packed(ALONE[form]), sum(lengths)
    values = packed_operands(operation, lengths, Shape(1, *heads, total, total, *widths), dtype, seed)
    doubled = {name: value.double() if value.is_floating_point() else value for name, value in values.items()}
    leaves = [doubled[name].requires_grad_() for name in NAMES]
    reference = one_by_one(ALONE[form], doubled, lengths)
    operands = [values[name] for name in (*NAMES, *operation.tensors())]
    out, _ = interpreter.submit(interpreted.run_state, operation.to_json(), operands, (16, 16, 16, 32)).result()
    assert ((out.double() - reference).abs() <= state_budget(operation, values, dtype)).all()
    by_torch, _ = attend_forward(operation, values["query"], values["key"], values["value"], values)
    assert ((out.double() - by_torch.double()).abs() <= 2 * state_budget(operation, values, dtype)).all()
    received = torch.randn(reference.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    wanted = torch.autograd.grad(reference, leaves, received.double())
    given_ = reference.detach().to(dtype), received, torch.zeros(reference.shape[:3])
    found = interpreter.submit(interpreted.run_state_backward, operation.to_json(), operands, given_, (16, 16, 16, 32)).result()
    for left, right in zip(found, wanted, strict=True):
        # Products of what was rounded to the dtype, each sum over a few tens of them.
        assert (left.double() - right).abs().max() <= (8 * torch.finfo(dtype).eps + 1e-4) * max(1.0, float(right.abs().max()))


@pytest.mark.parametrize("form", ["packed", "packed, causal", "packed, padded and decaying", "windows, packed"])
def test_sequences_in_any_order(interpreter: ProcessPoolExecutor, form: str) -> None:
    """Sequences that lie apart, each row with others, of negative and of missing numbers; queries of none."""
    operation, generator = FORMS[form][0], torch.Generator().manual_seed(0)
    values = linear_operands(operation, Shape(2, 2, 1, 60, 90, 16, 16))
    values["query_segments"] = torch.randint(-2, 4, (2, 60), generator=generator)
    values["key_segments"] = torch.randint(-2, 3, (2, 90), generator=generator)
    operands = [values[name] for name in (*NAMES, *operation.tensors())]
    out, lse = interpreter.submit(interpreted.run_state, operation.to_json(), operands, (16, 16, 16, 32)).result()
    reference = semantics.attend(operation, {name: v.double() if v.is_floating_point() else v for name, v in values.items()})
    assert ((out.double() - reference).abs() <= state_budget(operation, values, torch.float32)).all()
    unseen = values["query_segments"] == 3
    assert (out.transpose(1, 2)[unseen] == 0).all()
    assert form == "packed, padded and decaying" or (lse.transpose(1, 2)[unseen] == -torch.inf).all()


@pytest.mark.parametrize("form", ALONE)
def test_long_sequences_go_through_states(form: str) -> None:
    """As a model calls it: short sequences among long ones, every gradient; all short ones go pair by pair."""
    operation, lengths = packed(ALONE[form]), [700, 0, 3, 1, 40, 900, 30]
    total = sum(lengths)
    values = packed_operands(operation, lengths, Shape(2, 4, 2, total, total, 8, 8), torch.float64, 0)
    operands = values["query"], values["key"], values["value"]
    assert through_state(operation, operands, values) is not None
    leaves = [value.requires_grad_() for value in values.values() if value.is_floating_point()]
    reference = one_by_one(ALONE[form], values, lengths)
    out = attend(operation, *operands, values)
    received = torch.randn(reference.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert (out - reference).abs().max() <= 1e-11 * float(reference.detach().abs().max())
    for found, wanted in zip(torch.autograd.grad(out, leaves, received), torch.autograd.grad(reference, leaves, received), strict=True):
        assert (found - wanted).abs().max() <= 1e-11 * float(wanted.abs().max())
    short = values | packed_operands(operation, [16] * (total // 16) + [total % 16], Shape(2, 4, 2, total, total, 8, 8), torch.float64, 0)
    assert through_state(operation, operands, short) is None
    with torch.no_grad():
        expected = attend_op(*operands, [short[name] for name in operation.tensors()], operation.to_json())[0]
    assert (expected - semantics.attend(operation, short)).abs().max() <= 1e-11 * float(expected.abs().max())


def test_floating_numbers_are_left_to_pairs() -> None:
    """A segment that is no number is nobody's, and has no place among the others."""
    operation = packed(NORMALISED)
    values = packed_operands(operation, [2000, 2000], Shape(1, 1, 1, 4000, 4000, 8, 8), torch.float32, 0)
    operands = values["query"], values["key"], values["value"]
    assert way_on_device(operation, operands, values, None) == "kernels"
    assert way_on_device(operation, operands, values, "some reason") == "pairs"
    floating = {name: value.float() for name, value in values.items()}
    assert way_on_device(operation, operands, floating, None) == "pairs"
    assert through_state(operation, operands, floating) is None


def test_nothing_is_asked_of_the_device() -> None:
    with FakeTensorMode():
        ids, query = torch.zeros(2, 50, dtype=torch.int32), torch.zeros(2, 1, 50, 8)
        found = intervals(split_by_side(packed(lightning()).mask), {"query_segments": ids, "key_segments": ids}, query, query)
        assert found.chunk_begins(16).shape == (2, 4)


def test_the_plan_takes_every_query_once() -> None:
    operation = packed(replace(NORMALISED, mask=CAUSAL))
    form = state_form(operation)
    assert isinstance(form, StateForm)
    ids = segment_ids(torch.tensor([0, 5, 5, 3000, 3001, 4000]), 4000)
    query = torch.zeros(3, 2, 4000, 8)
    found = intervals(split_by_side(operation.mask), {"query_segments": ids, "key_segments": ids}, query, query)
    runs = interval_plan(form, Sizes.of(query, query, query), found)
    assert runs is not None
    ((places, plan),) = runs
    assert places.batch == slice(0, 3)
    assert torch.cat([step.rows for step in plan.steps]).sort().values.equal(torch.arange(4000))  # type: ignore[arg-type]
    assert {step.start for step in plan.steps} == {0, 5, 3000, 3001}
    assert plan.counts["diagonal"] < 4000 * 256
