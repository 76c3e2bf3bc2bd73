"""Masks that choose blocks of keys from the data: gathered keys against the dense definition, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import attention_forms as forms
import pytest
import sympy
import torch
from attention_forms import SCALE, Shape
from budget import expected, expected_lse, output_budget
from hypothesis import given, settings
from hypothesis import strategies as st
from test_torch_lowering import Largest
from torch.utils.flop_counter import FlopCounterMode

from codegen import attend, torch_streaming, visited_pairs
from codegen.block_choice import block_plan, choice_term
from codegen.gathered import gathered
from codegen.operator import attend_op
from codegen.torch_backward import attend_gradients
from codegen.torch_streaming import attend_forward, output_like
from rewrite.ir import NK, NQ, QK, Attend, B, BlockChoice, H, I, J, RewriteError, W, read, semantics, tensor

# Blocks of queries and of keys, of 96 positions or so: shorter at the end where they do not divide.
ROWS, COLUMNS = 16, 8
MOST = 3


def blocks(most: int = MOST, prefix: int = 0, by_head: bool = False, rows: int = ROWS, columns: int = COLUMNS) -> Attend:
    """Blocks of a sequence behind a prefix that all see and that sees all."""
    lead = (B, H) if by_head else (B,)
    chosen = sympy.Ne(read("choice", *lead, sympy.floor((I - prefix) / rows), sympy.floor((J - prefix) / columns)), 0)
    mask = sympy.Or(sympy.Lt(I, prefix), sympy.Lt(J, prefix), chosen) if prefix else chosen
    return replace(forms.plain(), mask=mask, choice=BlockChoice("choice", most))


def regions(prefix: int = 1) -> Attend:
    """Regions 2 x 4 of a grid 8 x 12, as bi-level routing has them."""

    def region(token: sympy.Expr) -> sympy.Expr:
        return sympy.floor(sympy.floor(token / 12) / 4) * 4 + sympy.floor(sympy.Mod(token, 12) / 3)

    chosen = sympy.Ne(read("choice", B, region(I - prefix), region(J - prefix)), 0)
    return replace(forms.plain(), mask=sympy.Or(sympy.Lt(I, prefix), sympy.Lt(J, prefix), chosen), choice=BlockChoice("choice", MOST))


def causal(attend: Attend) -> Attend:
    return replace(attend, mask=sympy.And(attend.mask, sympy.Le(J, I + NK - NQ)))


def scored(score: sympy.Expr, **parts: Any) -> Attend:
    return replace(blocks(prefix=2), score=score, **parts)


GATE = 1 / (1 + sympy.exp(-tensor("gate", "bhj")))
SIZE = Shape(2, 4, 2, 96, 96)
FORMS: dict[str, tuple[Attend, Shape]] = {
    "blocks": (blocks(), SIZE),
    "blocks of single keys": (blocks(most=9, columns=1, rows=1), Shape(1, 2, 1, 33, 33)),
    "regions": (regions(), Shape(2, 4, 2, 97, 97)),
    "prefix": (blocks(prefix=3), Shape(2, 4, 4, 99, 99)),
    "shorter last blocks": (blocks(prefix=1), Shape(2, 4, 2, 90, 91)),
    "by head": (blocks(by_head=True), SIZE),
    "by head, prefix, shorter last blocks": (blocks(by_head=True, prefix=2), Shape(2, 4, 2, 93, 93)),
    "causal": (causal(blocks()), SIZE),
    "causal, prefix": (causal(blocks(prefix=2)), Shape(2, 4, 2, 91, 91)),
    "more keys than queries": (causal(blocks()), Shape(n_queries=37, n_keys=96)),
    "padding": (replace(blocks(), mask=sympy.And(blocks().mask, sympy.Ne(tensor("mask", "bj"), 0))), SIZE),
    "bias": (scored(SCALE * QK + tensor("bias", "hij")), SIZE),
    "bias by key, by head": (replace(blocks(by_head=True), score=SCALE * QK + tensor("bias", "bj")), SIZE),
    "table": (scored(SCALE * QK + read("table", H, I - J + 11)), SIZE),
    "softcap": (scored(30 * sympy.tanh(SCALE * QK / 30)), SIZE),
    "sink": (replace(causal(blocks(by_head=True)), sink=tensor("t", "h")), SIZE),
    "sigmoid": (scored(forms.flash_sigmoid().score, normaliser="none"), SIZE),
    "rectified": (scored(sympy.Max(0, SCALE * QK - 1), normaliser="sum"), SIZE),
    "gated": (scored(SCALE * QK, weight=GATE * W, renormalised=True), SIZE),
    "grouped": (replace(blocks(prefix=1), groups=forms.grouped().groups), SIZE),
    "wide values": (blocks(), replace(SIZE, value_dim=24)),
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def operands(operation: Attend, shape: Shape, dtype: torch.dtype = torch.float32, seed: int = 0, fewer: bool = False) -> dict[str, Any]:
    """`attention_forms.operands` with a choice of exactly `most` blocks for each row, or, with `fewer`, of 0 to `most`."""
    values = forms.operands(operation, shape, dtype, seed)
    term = choice_term(operation)
    assert term is not None
    plan = block_plan(replace(term, most=1), (shape.n_queries, shape.n_keys), None, torch.device("cpu"))
    assert plan is not None
    generator = torch.Generator().manual_seed(seed)
    n_rows, n_columns = int(plan.blocks.max()) + 1, len(plan.columns)
    lead = (shape.batch, shape.heads) if H in term.indices else (shape.batch,)
    order = torch.rand(*lead, n_rows, n_columns, generator=generator).argsort(-1).argsort(-1)
    count = torch.randint(0, term.most + 1, (*lead, n_rows, 1), generator=generator) if fewer else term.most
    return values | {"choice": order < count}


def run(operation: Attend, values: dict[str, torch.Tensor]) -> torch.Tensor:
    return attend(operation, values["query"], values["key"], values["value"], values)


def is_gathered(operation: Attend, values: dict[str, torch.Tensor]) -> bool:
    return gathered(operation, values["query"], values["key"], values) is not None


@pytest.mark.parametrize("fewer", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_output_and_log_sum_exp(form: str, fewer: bool) -> None:
    operation, shape = FORMS[form]
    for dtype in DTYPES:
        values = operands(operation, shape, dtype, fewer=fewer)
        assert is_gathered(operation, values)
        assert ((run(operation, values).double() - expected(operation, values)).abs() <= output_budget(operation, values, dtype)).all()
    values = operands(operation, shape, torch.float64, fewer=fewer)
    lse = attend_op(values["query"], values["key"], values["value"], [values[name] for name in operation.tensors()], operation.to_json())[1]
    reference = expected_lse(operation, values)
    assert torch.equal(lse == -torch.inf, reference == -torch.inf)
    finite = reference.isfinite()
    assert ((lse - reference)[finite].abs() <= torch.finfo(torch.float32).eps * reference[finite].abs()).all()


# Autograd takes what a group without mass weighs for NaN, which the lowering does not (test_torch_lowering).
@pytest.mark.parametrize(
    ("form", "fewer"), [(form, fewer) for form in FORMS for fewer in (False, True) if (form, fewer) != ("grouped", True)]
)
def test_gradients(form: str, fewer: bool) -> None:
    operation, shape = FORMS[form]
    values = operands(operation, shape, torch.float64, fewer=fewer)
    leaves = {name: value.requires_grad_() for name, value in values.items() if value.is_floating_point()}
    reference = semantics.attend(operation, values)
    received = torch.randn(reference.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    wanted = torch.autograd.grad(reference, list(leaves.values()), received, allow_unused=True)
    found = torch.autograd.grad(run(operation, values), list(leaves.values()), received, allow_unused=True)
    # As in test_torch_lowering: sums of at most B H N D products of these magnitudes.
    largest = max(1.0, *(float(leaf.detach().abs().max()) for leaf in leaves.values()))
    terms = max(shape.n_queries, shape.n_keys) * max(shape.head_dim, shape.value_dim) * shape.batch * shape.heads
    budget = torch.finfo(torch.float64).eps * terms * largest**2 * float(received.abs().max())
    for name, left, right in zip(leaves, wanted, found, strict=True):
        assert right is not None, name
        assert (right - (0 if left is None else left)).abs().max() <= budget, name


@pytest.mark.parametrize("form", ["by head", "table", "causal, prefix"])
def test_gradients_have_the_operands_dtype_and_are_deterministic(form: str) -> None:
    operation, shape = FORMS[form]
    values = operands(operation, shape, torch.bfloat16)
    wanted = [name for name in operation.tensors() if values[name].is_floating_point()]
    received = torch.ones(*values["query"].shape[:3], shape.value_dim), torch.ones(values["query"].shape[:3])
    given = (values["query"], values["key"], values["value"])
    runs = [attend_gradients(operation, received, given, values, wanted) for _ in range(2)]
    assert all(torch.equal(left, right) for left, right in zip(*runs, strict=True))
    assert all(gradient.dtype == torch.bfloat16 for gradient in runs[0])


@pytest.mark.parametrize("form", FORMS)
def test_every_entry_is_written(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_streaming, "output_like", lambda *given: tuple(made.fill_(torch.nan) for made in output_like(*given)))
    operation, shape = FORMS[form]
    values = operands(operation, shape, fewer=True)
    out, lse = attend_forward(operation, values["query"], values["key"], values["value"], values)
    assert not out.isnan().any()
    assert not lse.isnan().any()


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(st.integers(1, 3), st.sampled_from([(1, 1), (2, 1), (4, 2)])),
    st.tuples(st.integers(1, 50), st.integers(1, 50)),
    st.tuples(st.integers(2, 20), st.integers(2, 20)),
    st.integers(0, 3),
    st.booleans(),
    st.booleans(),
    st.integers(0, 1000),
)
def test_any_shape(
    counts: tuple[int, tuple[int, int]],
    lengths: tuple[int, int],
    sizes: tuple[int, int],
    prefix: int,
    by_head: bool,
    is_causal: bool,
    seed: int,
) -> None:
    """Blocks of any size on sequences of any length, gathered or not: the choice is of a tensor of a size of its own."""
    batch, (heads, key_heads) = counts
    operation = blocks(2, prefix, by_head, *sizes)
    operation = causal(operation) if is_causal else operation
    values = forms.operands(operation, Shape(batch, heads, key_heads, *lengths, 4, 4), torch.float64, seed)
    generator = torch.Generator().manual_seed(seed)
    # More or fewer blocks than there are positions for: reads outside of the tensor are clamped.
    n_rows, n_columns = (int(torch.randint(1, 8, (), generator=generator)) for _ in range(2))
    lead = (batch, heads) if by_head else (1,)
    values["choice"] = torch.rand(*lead, n_rows, n_columns, generator=generator).argsort(-1).argsort(-1) < 2
    for name in ("query", "key", "value"):
        values[name].requires_grad_()
    reference, found = semantics.attend(operation, values), run(operation, values)
    torch.testing.assert_close(found, reference, rtol=1e-10, atol=1e-10)
    given_ = [values[name] for name in ("query", "key", "value")]
    received = torch.randn(reference.shape, dtype=torch.float64, generator=generator)
    for left, right in zip(torch.autograd.grad(found, given_, received), torch.autograd.grad(reference, given_, received), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-10)


def test_keys_that_nobody_chose_are_not_touched() -> None:
    operation, shape = FORMS["prefix"]
    values = operands(operation, shape)
    values["choice"][..., 5] = False
    unseen = slice(3 + 5 * COLUMNS, 3 + 6 * COLUMNS)
    before = run(operation, values)
    for name in ("key", "value"):
        values[name] = values[name].clone()
        values[name][:, :, unseen] = torch.nan
    after = run(operation, values)
    # The queries of the prefix see every key.
    assert after[:, :, :3].isnan().all()
    assert torch.equal(after[:, :, 3:], before[:, :, 3:])


def test_no_map_is_made() -> None:
    n = 2048
    operation, shape = blocks(2, 1, rows=64, columns=64), Shape(1, 2, 2, n + 1, n + 1, 16, 16)
    values = operands(operation, shape)
    received = torch.ones(1, 2, n + 1, 16), torch.zeros(1, 2, n + 1)
    with Largest() as found:
        attend_forward(operation, values["query"], values["key"], values["value"], values)
        attend_gradients(operation, received, (values["query"], values["key"], values["value"]), values, [])
    assert found.elements <= 1 << 20 < n * n


def test_a_broken_promise_is_an_error() -> None:
    operation, shape = FORMS["blocks"]
    values = operands(operation, shape)
    values["choice"][0, 2] = True
    with pytest.raises(RewriteError, match="choice chooses 12 blocks of keys for one block of queries, and at most 3 were promised"):
        run(operation, values)


def local() -> Attend:
    chosen = blocks()
    return replace(chosen, mask=sympy.Or(chosen.mask, sympy.And(J > I - 4, J <= I)))


NOT_GATHERED: dict[str, Callable[[], Attend]] = {
    "no promise": lambda: replace(blocks(), choice=None),
    "other keys for each query by position": local,
    "hidden pairs have weights": lambda: replace(blocks(), weight=forms.offset_under_a_mask().weight),
    "mixed heads": lambda: replace(blocks(), score_mix=forms.talking_heads(False).score_mix),
    "those that were not chosen": lambda: replace(blocks(), mask=sympy.Not(blocks().mask)),
    "most of the keys": lambda: blocks(most=7),
}


@pytest.mark.parametrize("form", NOT_GATHERED)
def test_what_cannot_be_gathered_is_right_all_the_same(form: str) -> None:
    operation = NOT_GATHERED[form]()
    values = forms.operands(operation, SIZE, torch.float64)
    values["choice"] = torch.rand(2, 6, 12, generator=torch.Generator().manual_seed(0)).argsort(-1) < MOST
    assert not is_gathered(operation, values)
    torch.testing.assert_close(run(operation, values), semantics.attend(operation, values), rtol=1e-10, atol=1e-10)


def test_a_choice_of_other_axes_is_not_gathered() -> None:
    for lead in ((H, B), (sympy.Integer(0),), (I,)):
        mask = sympy.Ne(read("choice", *lead, sympy.floor(I / ROWS), sympy.floor(J / COLUMNS)), 0)
        assert choice_term(replace(blocks(), mask=mask)) is None
    assert choice_term(replace(blocks(), mask=sympy.Ne(tensor("choice", "j"), 0))) is None


def test_pairs_are_counted_as_they_are_computed() -> None:
    operation, shape = FORMS["prefix"]
    values = operands(operation, shape)
    pairs = int(semantics.attention_weights(operation, {k: v.double() for k, v in values.items()})[0, 0].count_nonzero())
    assert visited_pairs(operation, 99, 99) == pairs == 3 * 99 + 96 * (3 + MOST * COLUMNS)
    assert visited_pairs(causal(operation), 99, 99) <= pairs
    assert visited_pairs(replace(operation, choice=None), 99, 99) == 99 * 99
    with FlopCounterMode(display=False) as counter:
        run(operation, values)
    assert counter.get_total_flops() == 2 * 2 * 4 * pairs * (16 + 16)


@pytest.mark.parametrize("gradient", [False, True])
def test_opcheck(gradient: bool) -> None:
    operation, shape = FORMS["regions"]
    values = operands(operation, shape, torch.float64)
    for name in ("query", "key", "value"):
        values[name].requires_grad_(gradient)
    given_ = (values["query"], values["key"], values["value"], [values["choice"]], operation.to_json())
    assert set(torch.library.opcheck(torch.ops.rewrite.attend, given_).values()) == {"SUCCESS"}


def test_a_choice_that_the_mask_does_not_read_is_refused() -> None:
    with pytest.raises(ValueError, match="blocks are chosen by choice, which the mask True does not read"):
        replace(forms.plain(), choice=BlockChoice("choice", 2))
    with pytest.raises(ValueError, match="at least one block"):
        BlockChoice("choice", 0)
