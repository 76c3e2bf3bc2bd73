"""Which heads are chosen, for which queries, and that decoding knows the image of the prompt."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_sites import IMAGE, SITES, example, site

from passes import HeadReinforce, SinkRedistribution
from rewrite.cost import rewritten_cost
from rewrite.ir import PassError, Program, ReinforceHeads, Site, VisualGroups
from rewrite.ir.semantics import evaluate_operation, reinforce_heads, visual_groups
from rewrite.lower import functions

CASE = "image and text, shared heads"


def changed(setting: HeadReinforce, case: Site) -> Program:
    program = setting.apply(Program((case,)))
    assert program.touched, program.declined
    return program


def test_half_of_the_heads_behind_the_image_are_scaled() -> None:
    shown = example(SITES[CASE])
    before, after = (shown.output(program, {}) for program in (Program((shown.site,)), changed(HeadReinforce(factor=3.0), shown.site)))
    for row in range(2):
        ratio = (after[row] / before[row]).mean(-1)
        behind = max(IMAGE) + row + 1
        torch.testing.assert_close(ratio[:, :behind], torch.ones_like(ratio[:, :behind]))
        scaled = (ratio[:, behind:] - 3.0).abs() < 1e-9
        assert (scaled.sum(0) == 2).all()
        torch.testing.assert_close(ratio[:, behind:][~scaled], torch.ones_like(ratio[:, behind:][~scaled]))


def test_the_chosen_heads_are_those_that_move_most_without_the_image() -> None:
    shown = example(SITES[CASE])
    image = shown.visual[:, None, None, :]
    both = (
        logits.softmax(-1).nan_to_num(0.0) @ shown.inputs({}).value
        for logits in (shown.logits, shown.logits.masked_fill(image, -torch.inf))
    )
    seen, blind = both
    strongest = (seen - blind).norm(dim=-1)[0, :, -1].argmax()
    after = shown.output(changed(HeadReinforce(factor=2.0, share=0.25), shown.site), {})
    expected = seen[0, :, -1].clone()
    expected[strongest] *= 2
    torch.testing.assert_close(after[0, :, -1], expected, rtol=1e-12, atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 8), st.integers(0, 99))
def test_decoding_with_cached_groups_continues_the_full_sequence(queries: int, seed: int) -> None:
    full = example(SITES["image and text"], seed)
    step = site(24, queries=queries, mask=full.site.attend.mask, visual=True)
    operands = {name: entry[:, :, -queries:] if name == "query" else entry for name, entry in full.operands.items()}
    operands |= {name: full.operands[name][:, -queries:] for name in ("hidden", "visual")}
    output = replace(full, site=step, operands=operands).output(changed(HeadReinforce(), step), {})
    whole = full.output(changed(HeadReinforce(), full.site), {})[:, :, -queries:]
    torch.testing.assert_close(output, whole, rtol=1e-12, atol=1e-12)


def test_a_row_without_an_image_is_left_alone() -> None:
    shown = example(SITES[CASE])
    visual = shown.visual.clone()
    visual[1] = False
    blind = replace(shown, visual=visual, operands={**shown.operands, "visual": visual})
    before, after = blind.output(Program((shown.site,)), {}), blind.output(changed(HeadReinforce(), shown.site), {})
    assert torch.equal(after[1], before[1])
    assert not torch.equal(after[0], before[0])


def test_groups_of_keys_and_the_queries_behind_them() -> None:
    operation = VisualGroups("groups", "behind", "visual")
    visual = torch.tensor([[False, True, False], [False, False, False]])
    codes, behind = visual_groups(operation, {"visual": visual})
    assert codes.tolist() == [[0, 1, 0], [0, 0, 0]]
    assert behind.tolist() == [[0, 0, 1], [0, 0, 0]]
    earlier = torch.tensor([[1, 0], [1, 1]], dtype=torch.int32)
    for cached, wanted in ((earlier, [[0, 0, 1], [1, 1, 1]]), (earlier[:1], [[0, 0, 1], [1, 1, 1]])):
        codes, behind = visual_groups(operation, {"visual": visual}, cached)
        assert codes[:, 2:].tolist() == [[0, 1, 0], [0, 0, 0]]
        assert behind.tolist() == wanted


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_kept_and_distances_do_not_overflow(dtype: torch.dtype) -> None:
    output = torch.tensor([[[[300.0, 300.0]], [[299.0, 299.0]]]], dtype=dtype)
    operation = ReinforceHeads("result", "output", "without", "active", heads=1, factor=2.0)
    values = {"output": output, "without": -output, "active": torch.ones(1, 1, dtype=torch.int32)}
    result = reinforce_heads(operation, values)
    assert result.dtype == dtype
    assert torch.equal(result[0, :, 0, 0], output[0, :, 0, 0] * torch.tensor([2.0, 1.0], dtype=dtype))


def test_gradients_pass_the_chosen_heads_times_the_factor() -> None:
    output = torch.randn(2, 4, 3, 5, dtype=torch.float64, requires_grad=True)
    without = torch.randn(2, 4, 3, 5, dtype=torch.float64, requires_grad=True)
    active = torch.tensor([[0, 1, 1], [1, 1, 0]], dtype=torch.int32)
    result = functions.reinforce_heads(output, without, active, 2, 1.5)
    d_output, d_without = torch.autograd.grad(result.sum(), (output, without), allow_unused=True)
    assert d_without is None
    assert d_output.unique().tolist() == [1.0, 1.5]
    assert ((d_output[..., 0] == 1.5).sum(1) == 2 * active).all()


def test_lowered_functions_are_the_semantics() -> None:
    shown = example(SITES[CASE])
    groups = changed(HeadReinforce(), shown.site).sites[0].body.operations[0]
    values = dict(shown.operands)
    evaluate_operation(groups, values)
    codes, behind = functions.visual_groups(shown.operands["visual"], None)
    assert torch.equal(codes, values["visual_group"])
    assert torch.equal(behind, values["behind_image"])


def test_cost_is_that_of_two_attentions_and_their_comparison() -> None:
    program = changed(HeadReinforce(), SITES[CASE])
    one, both = rewritten_cost(SITES[CASE], 4), rewritten_cost(program.sites[0], 4)
    assert both.multiply_adds == 2 * one.multiply_adds + 2 * 4 * 24 * 4


@pytest.mark.parametrize(
    ("setting", "case", "words"),
    [
        (HeadReinforce(), SITES["text"], "no visual tokens"),
        (HeadReinforce(factor=1.0), SITES[CASE], "changes nothing"),
        (HeadReinforce(layers=(0,)), SITES[CASE], "it is layer 3, and layers=(0,)"),
        (HeadReinforce(), site(24, queries=4, visual=True), "not found to be causal"),
        (HeadReinforce(), SinkRedistribution().apply(Program((SITES[CASE],))).sites[0], "an earlier pass changed it"),
    ],
)
def test_declines(setting: HeadReinforce, case: Site, words: str) -> None:
    ((_, _, reason),) = setting.apply(Program((case,))).declined
    assert words in reason


@pytest.mark.parametrize("values", [{"factor": 0.0}, {"factor": float("nan")}, {"share": 0.0}, {"share": 1.5}, {"layers": (-1,)}])
def test_out_of_range(values: dict[str, object]) -> None:
    with pytest.raises(PassError, match=r"head_reinforce: .* is out of range"):
        HeadReinforce(**values)
