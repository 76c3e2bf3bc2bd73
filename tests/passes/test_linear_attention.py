"""Linear attention in causal sites and in vision: gradients through the operators against the papers' formulas, and what is declined."""

from __future__ import annotations

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lowered_body import lowered
from synthetic_sites import CAUSAL, SITES, example, random_parameters, site

from codegen.operator import attend
from passes import Agent, EnhancedLinear, Hedgehog, InlineAttention, Lightning, Rala
from rewrite.ir import QK, Pass, PassError, Program, Site, TokenLayout, tensor


def changed(setting: Pass, case: Site) -> Site:
    program = setting.apply(Program((case,)))
    assert program.touched, program.declined
    return program.sites[0]


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from(
        (Lightning(), Hedgehog(features=3), Hedgehog(features=3, window=1), Hedgehog(features=5, window=4, affine=True), EnhancedLinear())
    ),
    st.integers(1, 11),
    st.integers(0, 9),
    st.booleans(),
    st.integers(0, 99),
)
def test_output_and_every_gradient(setting: Pass, queries: int, earlier: int, padded: bool, seed: int) -> None:
    vision = isinstance(setting, EnhancedLinear)
    mask = sympy.And(sympy.true if vision else CAUSAL, sympy.Ne(tensor("padding", "bj"), 0) if padded else sympy.true)
    case = site(queries if vision else queries + earlier, queries=None if vision else queries, heads=(4, 2), mask=mask)
    rewritten, shown = changed(setting, case), example(case, seed)
    leaves = {
        name: value.clone().requires_grad_() if value.is_floating_point() else value
        for name, value in {**shown.operands, **random_parameters(rewritten, seed)}.items()
    }
    again = type(shown)(case, leaves, shown.hidden, shown.visual, shown.logits)
    wanted = [name for name, leaf in leaves.items() if leaf.requires_grad]
    if isinstance(setting, Hedgehog) and setting.window:
        # The window's scores are read from the logits, which here have to follow the queries and keys.
        logits = 0.3 * leaves["query"] @ leaves["key"].repeat_interleave(2, 1).transpose(-2, -1)
        again = type(shown)(case, leaves, shown.hidden, shown.visual, logits.masked_fill(shown.logits == -torch.inf, -torch.inf))
    expected = setting.reference(again.inputs({name: leaves[name] for name in wanted}))
    output = lowered(rewritten, leaves)
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)
    received = torch.randn(expected.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    known = torch.autograd.grad(expected, [leaves[name] for name in wanted], received, allow_unused=True)
    found = torch.autograd.grad(output, [leaves[name] for name in wanted], received, allow_unused=True)
    for name, got, want in zip(wanted, found, known, strict=True):
        nothing = torch.zeros_like(leaves[name])
        torch.testing.assert_close(nothing if got is None else got, nothing if want is None else want, rtol=1e-8, atol=1e-8, msg=name)


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from((InlineAttention(local=True), InlineAttention(kernel="leaky_relu", local=True), Rala(), Rala(learnable=True))),
    st.tuples(st.integers(1, 5), st.integers(1, 4)),
    st.integers(0, 2),
    st.integers(0, 99),
)
def test_output_and_every_gradient_on_a_grid(setting: Pass, grid: tuple[int, int], prefix: int, seed: int) -> None:
    case = site(grid[0] * grid[1] + prefix, grid, prefix, projected=True)
    rewritten, shown = changed(setting, case), example(case, seed)
    leaves = {name: value.clone().requires_grad_() for name, value in {**shown.operands, **random_parameters(rewritten, seed)}.items()}
    again = type(shown)(case, leaves, shown.hidden, shown.visual, shown.logits)
    expected, output = setting.reference(again.inputs(leaves)), lowered(rewritten, leaves)
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)
    received = torch.randn(expected.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    known, found = (torch.autograd.grad(each, list(leaves.values()), received, allow_unused=True) for each in (expected, output))
    for name, got, want in zip(leaves, found, known, strict=True):
        assert (got is None) == (want is None), name
        if got is not None and want is not None:
            torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8, msg=name)


def test_weights_of_inline_attention_sum_to_one() -> None:
    shown = example(SITES["grid"])
    ones = {**shown.operands, "value": torch.ones_like(shown.operands["value"])}
    output = lowered(changed(InlineAttention(), shown.site), ones)
    torch.testing.assert_close(output, torch.ones_like(output))


@pytest.mark.parametrize("setting", [InlineAttention(local=True), Rala(learnable=True)])
def test_what_is_learned_starts_without_effect(setting: Pass) -> None:
    shown = example(SITES["grid, CLS"])
    without, with_ = (changed(each, shown.site) for each in (type(setting)(), setting))
    start = {"zeros": 0.0, "ones": 1.0}
    added = {
        each.name: torch.full(each.shape, start[each.init], dtype=torch.float64)
        if isinstance(each.init, str)
        else torch.randn(each.shape, dtype=torch.float64)
        for each in with_.body.parameters
    }
    assert added
    torch.testing.assert_close(lowered(with_, {**shown.operands, **added}), lowered(without, shown.operands))


def test_a_decay_that_overflows_where_it_is_hidden_leaves_no_trace() -> None:
    """The first of 32 heads would weigh a key 200 steps ahead by e^168, which float32 does not have."""
    operation = changed(Lightning(), site(200, heads=(32, 32), mask=CAUSAL)).attend
    leaves = [torch.randn(1, 32, 200, 4, generator=torch.Generator().manual_seed(seed)).requires_grad_() for seed in range(3)]
    output = attend(operation, *leaves, {})
    assert output.isfinite().all()
    for gradient in torch.autograd.grad(output.sum(), leaves):
        assert gradient.isfinite().all()
        assert gradient.abs().max() > 0


def test_a_decoding_step_of_lightning_goes_on_where_the_prompt_ended() -> None:
    whole = changed(Lightning(), site(9, mask=CAUSAL)).attend
    step = changed(Lightning(), site(9, queries=1)).attend
    operands = example(site(9)).operands
    query, key, value = (operands[name] for name in ("query", "key", "value"))
    torch.testing.assert_close(attend(step, query[:, :, -1:], key, value, {}), attend(whole, query, key, value, {})[:, :, -1:])


@pytest.mark.parametrize(
    ("setting", "case", "words"),
    [
        (Lightning(), SITES["sequence"], "it is not causal"),
        (Lightning(), site(24, mask=CAUSAL, score=tensor("bias", "hij")), "its score is bias[h, i, j], not a number times qk"),
        (Hedgehog(), SITES["grid, bias"], "features of queries and keys have no place for the rest"),
        (Hedgehog(window=3), SITES["grid"], "it is not causal, and window=3 is of the last keys"),
        (EnhancedLinear(), SITES["text"], "it is causal"),
        (InlineAttention(), SITES["grid, mask"], "its weights sum to one over all keys"),
        (InlineAttention(), SITES["grid, bias"], "its score is"),
        (InlineAttention(drop_bias=True), site(9, score=QK + tensor("windows", "bij")), "its score is"),
        (InlineAttention(local=True), SITES["sequence"], "lie on no grid that was found"),
        (InlineAttention(local=True), SITES["grid, shared heads"], "its 4 heads share 2"),
        (InlineAttention(local=True), SITES["grid of even sides"], "which was not found"),
        (InlineAttention(stacks=(1, 2)), SITES["grid"], "it is in stack 0, and stacks=(1, 2)"),
        (Rala(), site(49, layout=TokenLayout((14, 14), window=(7, 7))), "it attends in windows of 7x7"),
        (Rala(), SITES["grid, shared heads"], "4 heads share 2"),
        (Rala(learnable=True), SITES["grid of even sides"], "which was not found"),
        (EnhancedLinear(layers=(1,)), SITES["grid"], "it is layer 3, and layers=(1,)"),
    ],
)
def test_declines(setting: Pass, case: Site, words: str) -> None:
    ((_, _, reason),) = setting.apply(Program((case,))).declined
    assert words in reason


def test_after_agents_there_is_no_softmax_to_replace() -> None:
    program = Agent(4).apply(Program((SITES["grid"],)))
    assert "an earlier pass changed it" in EnhancedLinear().apply(program).declined[-1][2]


@pytest.mark.parametrize(
    ("cls", "values"),
    [(Hedgehog, {"features": 0}), (Hedgehog, {"window": -1}), (EnhancedLinear, {"smallest": 0.0}), (Lightning, {"layers": (-1,)})],
)
def test_out_of_range(cls: type[Pass], values: dict[str, object]) -> None:
    with pytest.raises(PassError, match="is out of range"):
        cls(**values)
