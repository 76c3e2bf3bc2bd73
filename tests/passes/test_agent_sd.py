"""AgentSD: gradients through the operators, which tokens are merged, when there are no agents, and what is declined."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lowered_body import lowered
from synthetic_sites import SITES, example, site

from passes import AgentSd
from rewrite.ir import Attend, PassError, Program, Site, TokenMatch


def changed(setting: AgentSd, case: Site) -> Site:
    program = setting.apply(Program((case,)))
    assert program.touched, program.declined
    return program.sites[0]


@settings(max_examples=12, deadline=None)
@given(
    st.tuples(st.integers(2, 7), st.integers(3, 6)),
    st.integers(0, 2),
    st.floats(0.1, 0.95),
    st.floats(0.1, 0.95),
    st.tuples(st.integers(1, 3), st.integers(2, 3)),
    st.integers(0, 99),
)
def test_output_and_every_gradient(
    grid: tuple[int, int], prefix: int, ratio: float, agent_ratio: float, stride: tuple[int, int], seed: int
) -> None:
    case = site(grid[0] * grid[1] + prefix, grid, prefix, projected=True)
    setting = AgentSd(ratio=ratio, agent_ratio=agent_ratio, stride=stride, seed=seed)
    if setting.apply(Program((case,))).declined:
        return
    rewritten, shown = changed(setting, case), example(case, seed)
    names = ("query", "key", "value")
    leaves = {name: tensor.clone().requires_grad_(name in names) for name, tensor in shown.operands.items()}
    expected = setting.reference(type(shown)(case, leaves, shown.hidden, shown.visual, shown.logits).inputs({}))
    output = lowered(rewritten, leaves)
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)
    received = torch.randn(expected.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    known, found = (torch.autograd.grad(each, [leaves[name] for name in names], received) for each in (expected, output))
    for name, got, want in zip(names, found, known, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8, msg=name)


def test_destinations_are_drawn_from_the_seed_in_even_batches_alone() -> None:
    def match(seed: int | None) -> TokenMatch:
        return TokenMatch("match", "hidden", (7, 9), (2, 3), seed)

    corner = [row * 9 + column for row in (0, 2, 4) for column in (0, 3, 6)]
    assert match(None).places(2) == match(5).places(1) == corner
    assert match(5).places(2) == match(5).places(4) != match(6).places(2)
    cells = [(place // 9 // 2, place % 9 // 3) for place in match(5).places(2)]
    assert sorted(cells) == [(row, column) for row in range(3) for column in range(3)]
    tokens = torch.randn(2, 63, 5, generator=torch.Generator().manual_seed(0))
    place, rank = match(5).compute({"tokens": tokens}).unbind(-1)
    assert all(sorted(row.tolist()) == [-1] * 9 + list(range(54)) for row in rank)
    assert place.max() == 8


def test_where_agents_would_be_too_many_the_merged_tokens_attend_to_each_other() -> None:
    (attend,) = changed(AgentSd(ratio=0.5, agent_ratio=0.5), SITES["grid"]).body.attends()
    assert attend == Attend("merged_output", "merged_query", "merged_key", "merged_value", score=SITES["grid"].attend.score)


def test_coarser_grids_are_left_alone() -> None:
    fine = site(64, (8, 8), projected=True)
    coarse = replace(site(16, (4, 4), projected=True), name="blocks.4.attn")
    program = AgentSd().apply(Program((fine, coarse)))
    assert program.touched == ((fine.name, "agent_sd"),)
    ((name, _, reason),) = program.declined
    assert (name, reason) == (coarse.name, "its grid is 2 times coarser than the model's finest, and max_downsample=1")
    assert len(AgentSd(max_downsample=2).apply(Program((fine, coarse))).touched) == 2


@pytest.mark.parametrize(
    ("setting", "case", "words"),
    [
        (AgentSd(), SITES["grid of even sides"], "the hidden states that enter its layer were not found"),
        (AgentSd(stride=9), SITES["grid"], "no cell of 9x9 fits on its grid 8x9"),
        (AgentSd(layers=(0,)), SITES["grid"], "it is layer 3"),
        (AgentSd(ratio=0.0), SITES["grid"], "changes nothing"),
    ],
)
def test_declines(setting: AgentSd, case: Site, words: str) -> None:
    ((_, _, reason),) = setting.apply(Program((case,))).declined
    assert words in reason


@pytest.mark.parametrize("values", [{"ratio": 1.0}, {"agent_ratio": -0.1}, {"stride": 1}, {"power": float("inf")}, {"max_downsample": 0}])
def test_out_of_range(values: dict[str, object]) -> None:
    with pytest.raises(PassError, match=r"agent_sd: .* is out of range"):
        AgentSd(**values)
