"""Temperatures by row: what they are in decoding, beta's gradient through the operator, and what is declined."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_sites import CAUSAL, SCALE, SITES, example, site

from codegen.operator import attend
from passes import Neighborhood, Temperature
from rewrite.ir import QK, PassError, Program, Site, tensor

KINDS = ("position", "log")


def changed(setting: Temperature, case: Site) -> Program:
    program = setting.apply(Program((case,)))
    assert program.touched, program.declined
    return program


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.integers(0, 9), st.booleans(), st.sampled_from(KINDS))
def test_every_row_has_the_formulas_factor(queries: int, earlier: int, causal: bool, kind: str) -> None:
    earlier *= causal
    case = site(queries + earlier, queries=queries if earlier else None, **({"mask": CAUSAL} if causal else {}))
    score = changed(Temperature(kind=kind, value=1.5), case).sites[0].attend.score
    for query in range(queries):
        length = earlier + query + 1 if causal else queries
        share = math.exp(-math.exp(1.5)) if kind == "position" else 1.5
        values = {symbol: {"i": query, "Nq": queries, "Nk": queries + earlier, "qk": 1}[symbol.name] for symbol in score.free_symbols}
        factor = float(score.subs(values)) / float(SCALE)
        assert factor == pytest.approx(1 + share * math.log(length), rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_decoding_step_continues_the_full_sequence(kind: str) -> None:
    full = example(SITES["text"])
    step = site(24, queries=1)
    operands = {name: entry[:, :, -1:] if name == "query" else entry for name, entry in full.operands.items()}
    setting = Temperature(kind=kind, value=0.3)
    output = replace(full, site=step, operands=operands).output(changed(setting, step), {})
    torch.testing.assert_close(output, full.output(changed(setting, full.site), {})[:, :, -1:], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hides", [True, False], ids=["additive mask", "no mask"])
def test_the_gradient_of_beta(kind: str, hides: bool) -> None:
    """Also where the model hides keys by adding -inf to their logits, which no gradient may be multiplied by."""
    setting = Temperature(kind=kind, learnable=True)
    case = site(9, mask=CAUSAL, score=SCALE * QK + tensor("bias", "hij"))
    program, shown = changed(setting, case), example(case)
    bias = shown.operands["bias"].clone()
    logits = shown.logits
    if hides:
        hidden = torch.rand(bias.shape, generator=torch.Generator().manual_seed(3)) < 0.3
        hidden[:, :, 0] = False
        bias, logits = bias.masked_fill(hidden, -torch.inf), logits.masked_fill(hidden, -torch.inf)
    (added,) = program.sites[0].body.parameters
    assert (added.shape, added.init) == ((1,), ("constant", 2.0 if kind == "position" else 1e-5))
    query, key, value = (shown.operands[name].clone().requires_grad_() for name in ("query", "key", "value"))
    beta = torch.full((1,), 0.4, dtype=torch.float64, requires_grad=True)
    output = attend(program.sites[0].attend, query, key, value, {"bias": bias, added.name: beta})
    found = torch.autograd.grad(output.square().sum(), (beta, query, key, value))

    row = torch.arange(1, 10, dtype=torch.float64).log()[:, None]
    factor = 1 + ((-beta.exp()).exp() if kind == "position" else beta) * row
    # In place of -inf a number that weighs nothing either: torch's own gradient of -inf times a factor is NaN.
    dot = float(SCALE) * query @ key.transpose(-2, -1) + bias.nan_to_num(neginf=-1e5)
    dot = dot.masked_fill(logits == -torch.inf, -1e5)
    expected = (dot * factor).softmax(-1) @ value
    wanted = torch.autograd.grad(expected.square().sum(), (beta, query, key, value))
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)
    assert float(found[0].abs()) > 1e-3
    for got, known in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, known, rtol=1e-9, atol=1e-9)


def test_windows_after_a_temperature_keep_it() -> None:
    program = Neighborhood(4).apply(Temperature(value=0.5).apply(Program((SITES["text"],))))
    assert len(program.touched) == 2
    assert sympy.expand(program.sites[0].attend.score - 2 * SCALE * QK) == 0


@pytest.mark.parametrize(
    ("setting", "case", "words"),
    [
        (Temperature(value=1.0), "grid", "changes nothing"),
        (Temperature(kind="log", value=0.0), "grid", "changes nothing"),
        (Temperature(layers=(0,)), "grid", "it is layer 3, and layers=(0,)"),
        (Temperature(kind="position"), "cache, not causal", "not found to be causal"),
    ],
)
def test_declines(setting: Temperature, case: str, words: str) -> None:
    ((_, _, reason),) = setting.apply(Program((SITES[case],))).declined
    assert words in reason


def test_a_constant_needs_no_row_length() -> None:
    assert changed(Temperature(), SITES["cache, not causal"]).touched


@pytest.mark.parametrize(
    "values",
    [
        {"value": 0.0},
        {"value": float("inf")},
        {"kind": "position", "value": 11.0},
        {"kind": "log", "value": -0.1},
        {"learnable": True},
        {"kind": "log", "layers": ()},
    ],
)
def test_out_of_range(values: dict[str, object]) -> None:
    with pytest.raises(PassError, match=r"temperature: .* is out of range"):
        Temperature(**values)
