"""Which heads divide by what, their gradients through the operator, and what is declined."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_sites import CAUSAL, SITES, example, site

from codegen.operator import attend
from passes import ReluAttention
from rewrite.ir import PassError, Program, Site


def changed(setting: ReluAttention, case: Site) -> Program:
    program = setting.apply(Program((case,)))
    assert program.touched, program.declined
    return program


def by_formula(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rectified: tuple[int, ...], by_sum: bool) -> torch.Tensor:
    """Causal attention of 4 heads that share 2 keys, as MPCViT's two formulas say."""
    key, value = (entry.repeat_interleave(2, 1) for entry in (key, value))
    logits, heads = 0.3 * query @ key.transpose(-2, -1), []
    earlier = logits.shape[-1] - logits.shape[-2]
    seen = torch.ones(logits.shape[-2:], dtype=torch.bool).tril(earlier)
    for head in range(4):
        scores = (logits[:, head].relu() if head in rectified else logits[:, head]) * seen
        divisor = scores.sum(-1, keepdim=True) + 1e-5 if by_sum and head in rectified else seen.sum(-1, keepdim=True)
        heads.append(scores / divisor @ value[:, head])
    return torch.stack(heads, 1)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 8),
    st.integers(0, 8),
    st.sets(st.integers(0, 3)).map(lambda heads: tuple(sorted(heads))),
    st.booleans(),
    st.integers(0, 9),
)
def test_output_and_gradients(queries: int, earlier: int, rectified: tuple[int, ...], by_sum: bool, seed: int) -> None:
    case = site(queries + earlier, queries=queries, heads=(4, 2), mask=CAUSAL)
    setting = ReluAttention(relu_heads=rectified, divide="sum" if by_sum else "count")
    leaves = [example(case, seed).operands[name].clone().requires_grad_() for name in ("query", "key", "value")]
    output, expected = attend(changed(setting, case).sites[0].attend, *leaves, {}), by_formula(*leaves, rectified, by_sum)
    torch.testing.assert_close(output, expected, rtol=1e-11, atol=1e-11)
    received = torch.randn(expected.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    wanted = torch.autograd.grad(expected, leaves, received)
    for got, known in zip(torch.autograd.grad(output, leaves, received), wanted, strict=True):
        # Where a row's scores are all but zero, 1e-5 is what its gradient is divided by, twice.
        torch.testing.assert_close(got, known, rtol=1e-9, atol=1e-9)


def test_a_row_without_a_positive_score_gives_zeros_and_finite_gradients() -> None:
    operation = changed(ReluAttention(), SITES["sequence"]).sites[0].attend
    query, key = torch.full((1, 2, 3, 4), -1.0, requires_grad=True), torch.ones(1, 2, 5, 4, requires_grad=True)
    value = torch.ones(1, 2, 5, 4, requires_grad=True)
    output = attend(operation, query, key, value, {})
    output.sum().backward()
    assert (output == 0).all()
    for leaf in (query, key, value):
        assert leaf.grad is not None
        assert (leaf.grad == 0).all()


def test_sum_of_the_weights() -> None:
    shown = example(SITES["sequence"])
    ones = {**shown.operands, "value": torch.ones_like(shown.operands["value"])}
    program = changed(ReluAttention(relu_heads=(1,)), shown.site)
    sums = type(shown)(shown.site, ones, shown.hidden, shown.visual, shown.logits).output(program, {})[..., 0]
    torch.testing.assert_close(sums[:, 0], shown.logits[:, 0].mean(-1))
    torch.testing.assert_close(sums[:, 1], torch.ones_like(sums[:, 1]), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("setting", "case", "words"),
    [
        (ReluAttention(relu_heads=(0, 5)), SITES["grid"], "it has 2 heads, 0 to 1, and relu_heads=(0, 5) names head 5"),
        (ReluAttention(relu_heads=((0,), (1,))), SITES["grid"], "it is layer 3, and relu_heads has entries for 2 layers"),
        (ReluAttention(relu_heads=(0,)), SITES["grid, bias"], "its score adds bias, which may hide keys with -inf"),
        (ReluAttention(divide="count"), SITES["cache, not causal"], "not found to be causal"),
        (ReluAttention(layers=(0,)), SITES["grid"], "it is layer 3, and layers=(0,)"),
    ],
)
def test_declines(setting: ReluAttention, case: Site, words: str) -> None:
    ((_, _, reason),) = setting.apply(Program((case,))).declined
    assert words in reason


@pytest.mark.parametrize("case", ["grid, bias", "cache, not causal"])
def test_rectified_heads_need_neither_a_count_nor_a_score_without_a_bias(case: str) -> None:
    assert changed(ReluAttention(), SITES[case]).touched


@pytest.mark.parametrize("heads", [(0, 0), (-1,), ((0,), (1, 1)), ((0,), (-2,))])
def test_out_of_range(heads: Any) -> None:
    with pytest.raises(PassError, match=r"relu_attention: relu_heads=.* is out of range"):
        ReluAttention(relu_heads=heads)


def test_heads_are_numbers_or_tuples_of_numbers() -> None:
    with pytest.raises(PassError, match="relu_heads"):
        ReluAttention(relu_heads=(0, (1,)))  # type: ignore[arg-type]
