"""The torch lowering on masks that the data decide: what no query of a block may see is not visited, and nothing else is lost."""

from __future__ import annotations

from dataclasses import replace

import attention_forms as forms
import pytest
import torch
from attention_forms import Shape, operands
from test_tile_masks import CAUSAL, PREDICATES

from codegen import attend, statistic
from codegen.narrowed_visits import seen_keys
from codegen.torch_streaming import blockwise_visits
from rewrite.ir import Attend, semantics
from rewrite.ir.statistic import Statistic

LENGTH = 300
SIZE = Shape(1, 4, 2, LENGTH, LENGTH, 8, 8)
FORMS: dict[str, Attend] = {
    "packed": forms.packed(),
    "packed, causal, padded": replace(forms.plain(), mask=PREDICATES["packed, causal, padded"]),
    "packed, on a grid": forms.packed(forms.neighbourhood_2d(15, 20, 5).mask),
    "packed, rectified": replace(forms.packed(), score=forms.rectified().score, normaliser="sum"),
    "packed, talking heads": replace(forms.packed(), score_mix=forms.talking_heads(False).score_mix),
    "one map": forms.masked("ij"),
    "spans": replace(forms.plain(), mask=PREDICATES["spans"]),
}  # fmt: skip


def given(form: str, dtype: torch.dtype = torch.float64) -> tuple[Attend, dict[str, torch.Tensor]]:
    values = operands(FORMS[form], SIZE, dtype)
    if form == "one map":
        values["mask"] = values["mask"].triu(90).flip(0)
    return FORMS[form], values


@pytest.mark.parametrize("form", FORMS)
def test_output_and_gradients(form: str) -> None:
    operation, values = given(form)
    leaves = [values[name].requires_grad_() for name in ("query", "key", "value")]
    found, reference = attend(operation, *leaves, values), semantics.attend(operation, values)
    torch.testing.assert_close(found, reference, rtol=1e-10, atol=1e-10)
    received = torch.randn(reference.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for left, right in zip(torch.autograd.grad(found, leaves, received), torch.autograd.grad(reference, leaves, received), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_less_is_visited(form: str) -> None:
    operation, values = given(form)
    planned = blockwise_visits(operation, values["query"], values["key"], values)
    rows = torch.cat([torch.arange(LENGTH)[visit.rows] for visit in planned])
    assert len(rows.unique()) == len(rows)
    pairs = sum(visit.n_queries * len(visit.key_positions(rows.device)) for visit in planned)
    # Tiles of the grid, which the order of queries makes, share no run of the sequence.
    assert pairs <= (1.0 if form == "packed, on a grid" else 0.4) * LENGTH**2


def test_another_sequence_is_not_touched() -> None:
    operation, values = FORMS["packed"], operands(FORMS["packed"], SIZE)
    for name in ("query_segments", "key_segments"):
        values[name] = (torch.arange(LENGTH) >= 128).int()[None]
    before = attend(operation, values["query"], values["key"], values["value"], values)
    poisoned = values["value"].clone()
    poisoned[:, :, 128:] = torch.nan
    after = attend(operation, values["query"], values["key"], poisoned, values)
    assert torch.equal(after[:, :, :128], before[:, :, :128])
    assert after[:, :, 128:].isnan().all()


def test_statistics_visit_what_the_attention_does() -> None:
    operation, values = given("packed, causal, padded")
    received = Statistic("received", operation)
    found = statistic(received, values["query"], values["key"], values, None)
    torch.testing.assert_close(found, semantics.attention_weights(operation, values).sum(2), rtol=1e-10, atol=1e-10)


def test_few_pairs_are_all_looked_at() -> None:
    operation = forms.packed(CAUSAL)
    values = operands(operation, replace(SIZE, n_queries=40, n_keys=40))
    assert seen_keys(operation, values["query"], values["key"], values) is None
