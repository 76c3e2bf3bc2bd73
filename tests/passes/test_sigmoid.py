"""Sigmoid attention where its arguments are extreme, in decoding, and what is declined."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_sites import CAUSAL, SITES, example, site

from codegen.operator import attend
from passes import SigmoidAttention
from rewrite.ir import QK, PassError, Program, Sigmoid, Site
from rewrite.ir.evaluation import evaluate_expression


def changed(setting: SigmoidAttention, case: Site) -> Program:
    program = setting.apply(Program((case,)))
    assert program.touched, program.declined
    return program


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.integers(1, 40), st.booleans(), st.integers(0, 99))
def test_output_and_gradients(queries: int, keys: int, causal: bool, seed: int) -> None:
    """By the operator, against the published form in float64; queries in front of all keys see nothing."""
    keys = max(queries, keys)
    case = site(keys, queries=queries, heads=(4, 2), mask=CAUSAL) if causal else site(keys, heads=(4, 2))
    program, shown = changed(SigmoidAttention(bias="auto" if causal else -1.5), case), example(case, seed)
    leaves = [shown.operands[name].clone().requires_grad_() for name in ("query", "key", "value")]
    output = attend(program.sites[0].attend, *leaves, {})
    wide = [leaf.repeat_interleave(4 // leaf.shape[1], 1) for leaf in leaves]
    logits = 0.3 * wide[0] @ wide[1].transpose(-2, -1)
    length = logits.shape[-1] - logits.shape[-2] + 1 + torch.arange(logits.shape[-2])[:, None]
    weights = 1 / (1 + torch.exp(-(logits - (length.double().log() if causal else 1.5))))
    seen = torch.arange(logits.shape[-1]) < length if causal else torch.ones(1, 1, dtype=torch.bool)
    expected = weights.masked_fill(~seen, 0.0) @ wide[2]
    torch.testing.assert_close(output, expected, rtol=1e-11, atol=1e-11)
    received = torch.randn(expected.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    pairs = zip(torch.autograd.grad(output, leaves, received), torch.autograd.grad(expected, leaves, received), strict=True)
    for got, wanted in pairs:
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("size", [1e2, 1e4, 1e18])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_scores_give_zero_or_one_and_no_nan(size: float, dtype: torch.dtype) -> None:
    operation = changed(SigmoidAttention(bias=0.0), SITES["sequence"]).sites[0].attend
    query = torch.full((1, 1, 3, 4), size, dtype=dtype).requires_grad_()
    key = torch.ones(1, 1, 2, 4, dtype=dtype)
    key[:, :, 1] = -1
    key.requires_grad_()
    value = torch.tensor([[[[1.0, 2.0], [30.0, 40.0]]]], dtype=dtype, requires_grad=True)
    output = attend(operation, query, key, value, {})
    output.sum().backward()
    torch.testing.assert_close(output, torch.tensor([1.0, 2.0], dtype=dtype).expand(1, 1, 3, 2))
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in (query, key, value))


def test_small_weights_keep_their_digits() -> None:
    """At 2^20 keys the weights are about 1e-6; 0.5 (1 + tanh) in float32 has an error of 6e-8 there."""
    x = torch.linspace(-20, 20, 401)
    exact = x.double().sigmoid()
    for expression, reference in ((Sigmoid(QK), exact), (Sigmoid(QK).diff(QK), exact * (-x.double()).sigmoid())):
        found = evaluate_expression(expression, {"qk": x})
        assert ((found.double() - reference).abs() <= 4 * torch.finfo(torch.float32).eps * reference).all()


def test_decoding_continues_the_full_sequence() -> None:
    full, step = example(SITES["text"]), site(24, queries=1)
    operands = {name: entry[:, :, -1:] if name == "query" else entry for name, entry in full.operands.items()}
    output = replace(full, site=step, operands=operands).output(changed(SigmoidAttention(), step), {})
    torch.testing.assert_close(output, full.output(changed(SigmoidAttention(), full.site), {})[:, :, -1:], rtol=1e-12, atol=1e-12)


def test_the_automatic_bias_makes_equal_weights_sum_to_almost_one() -> None:
    shown = example(SITES["text"])
    operands = {**shown.operands, "query": torch.zeros_like(shown.operands["query"]), "value": torch.ones_like(shown.operands["value"])}
    sums = replace(shown, operands=operands).output(changed(SigmoidAttention(), shown.site), {})[0, 0, :, 0]
    # sigmoid(-log n) = 1 / (1 + n)
    torch.testing.assert_close(sums, torch.tensor([n / (1 + n) for n in range(1, 25)], dtype=torch.float64))


@pytest.mark.parametrize(
    ("setting", "case", "words"),
    [
        (SigmoidAttention(), SITES["cache, not causal"], "not found to be causal"),
        (SigmoidAttention(layers=(1,)), SITES["grid"], "it is layer 3, and layers=(1,)"),
        (SigmoidAttention(), SigmoidAttention().apply(Program((SITES["grid"],))).sites[0], "no normaliser"),
    ],
)
def test_declines(setting: SigmoidAttention, case: Site, words: str) -> None:
    ((_, _, reason),) = setting.apply(Program((case,))).declined
    assert words in reason


@pytest.mark.parametrize("values", [{"bias": math.inf}, {"layers": ()}])
def test_out_of_range(values: dict[str, object]) -> None:
    with pytest.raises(PassError, match=r"sigmoid: .* is out of range"):
        SigmoidAttention(**values)
