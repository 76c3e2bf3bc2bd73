"""What is particular to agent attention: what it declines, and its parameters."""

from __future__ import annotations

import pytest
import torch
from synthetic_sites import SCALE, SITES, example, site

from passes import Agent, Neighborhood
from rewrite.ir import QK, PassError, Program, tensor


@pytest.mark.parametrize(
    ("setting", "case", "words"),
    [
        (Agent(50), SITES["grid"], "50 agents form no square on its grid 8x9; 49 or 64 would"),
        (Agent(64), SITES["sequence"], "64 agents are more than its 60 tokens"),
        (Agent(61), SITES["sequence, prefix"], "61 agents are more than its 60 tokens"),
        (Agent(64), site(72, (6, 12)), "8x8 agents do not fit on its grid 6x12"),
        (Agent(4), SITES["grid, mask"], "it is masked (Ne(padding[b, j], 0))"),
        (Agent(4), SITES["grid, bias"], "its score reads bias"),
        (Agent(4), site(72, (8, 9), score=QK * tensor("logit_scale", "h")), "its score reads logit_scale"),
        (Agent(4), site(72, (8, 9), score=SCALE * QK**2), "not a number times qk"),
        (Agent(4), SITES["text"], "it is causal"),
        (Agent(4), SITES["cache, not causal"], "KV cache"),
        (Agent(4), SITES["volume"], "2x4x9 has 3 axes"),
        (Agent(4), SITES["grid, other count"], "make 72 tokens, it has 49"),
        (Agent(4, learnable=True), SITES["sequence"], "no grid was found"),
        (Agent(4, learnable=True), SITES["grid, shared heads"], "its 4 heads share 2"),
        (Agent(4, layers=(0, 1)), SITES["grid"], "it is layer 3"),
        (Agent(4, stacks=(1, 2)), SITES["grid"], "it is in stack 0, and stacks=(1, 2)"),
        (Agent((4, 9)), site(72, (8, 9), stack=2), "it is in stack 2, and tokens has entries for 2 stacks"),
        (Agent(4, drop_bias=True), site(72, (8, 9), score=SCALE * QK + tensor("bias", "bhij")), "its score reads bias"),
        (Agent(4, drop_bias=True), site(72, (8, 9), score=SCALE * QK * tensor("scale", "h")), "its score reads scale"),
    ],
)
def test_declines(setting: Agent, case: object, words: str) -> None:
    ((_, _, reason),) = setting.apply(Program((case,))).declined
    assert words in reason


def test_each_stack_has_its_own_number_of_agents() -> None:
    sites = tuple(site(72, (8, 9), stack=stack, name=f"stages.{stack}") for stack in range(3))
    program = Agent((4, 9, 16), learnable=True, stacks=(0, 2)).apply(Program(sites))
    shapes = [[each.shape for each in one.body.parameters if each.name == "agent_an_bias"] for one in program.sites]
    assert shapes == [[(2, 4, 7, 7)], [], [(2, 16, 7, 7)]]


def test_after_another_pass_on_the_same_site_it_is_declined() -> None:
    program = Agent(4).apply(Program((SITES["grid"],)))
    assert "2 attentions" in Neighborhood(3).apply(program).declined[-1][2]


@pytest.mark.parametrize("case", ["grid", "grid, CLS", "grid, CLS and registers"])
def test_learnable_parameters_start_without_effect(case: str) -> None:
    shown = example(SITES[case])
    learnable, fixed = (Agent(4, learnable=value).apply(Program((shown.site,))) for value in (True, False))
    zeros = {
        parameter.name: torch.zeros(parameter.shape, dtype=torch.float64)
        for parameter in learnable.sites[0].body.parameters
        if parameter.init == "zeros"
    }
    torch.testing.assert_close(shown.output(learnable, zeros), shown.output(fixed, {}), rtol=1e-12, atol=1e-12)


def test_learnable_parameters_have_the_papers_shapes() -> None:
    parameters = Agent(4, learnable=True).apply(Program((SITES["grid, CLS"],))).sites[0].body.parameters
    assert {parameter.name.removeprefix("agent_"): parameter.shape for parameter in parameters} == {
        "an_bias": (2, 4, 7, 7),
        "na_bias": (2, 4, 7, 7),
        "ah_bias": (1, 2, 4, 8, 1),
        "aw_bias": (1, 2, 4, 1, 9),
        "ha_bias": (1, 2, 4, 8, 1),
        "wa_bias": (1, 2, 4, 1, 9),
        "ac_bias": (1, 2, 4, 1),
        "ca_bias": (1, 2, 4, 1),
        "dwc_weight": (8, 1, 3, 3),
        "dwc_bias": (8,),
    }


@pytest.mark.parametrize(
    "values", [{"tokens": 0}, {"tokens": ()}, {"tokens": (4, 0)}, {"stacks": (0, 0)}, {"layers": ()}, {"layers": (-1,)}]
)
def test_out_of_range(values: dict[str, object]) -> None:
    with pytest.raises(PassError, match=r"agent: .* is out of range"):
        Agent(**values)
