"""Bi-level routing: what it declines, which regions it chooses, and its convolution."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_sites import SITES, example, site

from passes import Agent, Neighborhood, Routed
from rewrite.ir import QK, BlockChoice, PassError, Program, RegionRoutes, Site, TokenLayout
from rewrite.ir.semantics import evaluate_expression, positions, read_at, region_routes


def routed(setting: Routed, case: Site) -> Site:
    program = setting.apply(Program((case,)))
    assert program.touched, program.declined
    return program.sites[0]


@pytest.mark.parametrize(
    ("setting", "case", "words"),
    [
        (Routed(), SITES["grid"], "the 8 rows of its grid 8x9 cannot be cut into 7 equal regions"),
        (Routed(regions=(4, 2)), SITES["grid, CLS"], "the 9 columns of its grid 8x9 cannot be cut into 2 equal regions"),
        (Routed(regions=(2, 3)), SITES["grid, other count"], "0 prefix tokens and the grid 8x9 make 72 tokens, it has 49"),
        (Routed(regions=(2, 3)), SITES["text"], "it is causal"),
        (Routed(regions=(2, 3)), SITES["cross"], "it is cross-attention"),
        (Routed(regions=(2, 3)), SITES["sequence"], "its tokens lie on no grid that was found"),
        (Routed(regions=(2, 3)), SITES["volume"], "its tokens lie on a grid of frames"),
        (Routed(regions=7), site(49, layout=TokenLayout((14, 14), window=(7, 7))), "it attends in windows of 7x7"),
        (Routed(regions=(2, 3), layers=(0, 1)), SITES["grid"], "it is layer 3, and layers=(0, 1)"),
        (Routed(regions=(2, 3), lepe=True), SITES["grid, shared heads"], "its 4 heads share 2"),
        (Routed(regions=(2, 3), scale="all"), site(72, (8, 9), score=QK**2), "its score is qk**2"),
        (Routed(regions=(2, 3), topk=6), SITES["grid"], "changes nothing"),
    ],
)
def test_declines(setting: Routed, case: Site, words: str) -> None:
    ((_, _, reason),) = setting.apply(Program((case,))).declined
    assert words in reason


def test_after_another_choice_or_several_attentions_it_is_declined() -> None:
    once = Routed(regions=(2, 3), topk=2).apply(Program((SITES["grid"],)))
    assert "an earlier pass chooses its keys by region_routes" in Routed(regions=(4, 3)).apply(once).declined[-1][2]
    agents = Agent(4).apply(Program((SITES["grid"],)))
    assert "2 attentions" in Routed(regions=(2, 3)).apply(agents).declined[-1][2]


def test_with_another_mask_both_hold() -> None:
    program = Neighborhood(3).apply(Routed(regions=(2, 3), topk=2).apply(Program((SITES["grid"],))))
    assert len(program.touched) == 2
    assert program.sites[0].attend.choice == BlockChoice("region_routes", 2)
    seen = Neighborhood(3).predicate(SITES["grid"])
    assert program.sites[0].attend.mask.has(*seen.args)


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(st.integers(1, 4), st.integers(1, 4)), st.tuples(st.integers(1, 3), st.integers(1, 3)), st.sampled_from((0, 1, 5)), st.data()
)
def test_queries_see_the_regions_of_their_own_regions_choice(
    regions: tuple[int, int], size: tuple[int, int], prefix: int, data: st.DataObject
) -> None:
    """The mask of the rewritten site, for a choice of regions that is drawn."""
    (down, across), (high, wide), count = regions, size, regions[0] * regions[1]
    if count == 1:
        return
    topk = data.draw(st.integers(1, count - 1))
    grid = (down * high, across * wide)
    tokens = prefix + grid[0] * grid[1]
    changed = routed(Routed(regions=regions, topk=topk), site(tokens, grid, prefix))
    order = torch.tensor(data.draw(st.permutations(range(count))))
    routes = torch.zeros(1, count, count, dtype=torch.bool)
    for region in range(count):
        routes[0, region, order.roll(region)[:topk]] = True
    known = {**positions(tokens, tokens, torch.device("cpu")), "b": torch.zeros(1, 1, 1, 1, dtype=torch.int64)}
    known["region_routes"] = read_at(routes, changed.attend.tensors()["region_routes"], known)
    mask = evaluate_expression(changed.attend.mask, known).expand(1, 1, tokens, tokens)[0, 0]
    region_of = [(token // grid[1] // high) * across + token % grid[1] // wide for token in range(tokens - prefix)]
    assert mask[:prefix].all()
    assert mask[:, :prefix].all()
    assert torch.equal(mask[prefix:, prefix:], routes[0][region_of][:, region_of])


def test_regions_with_like_means_choose_each_other() -> None:
    """Two kinds of regions, by turns: a query's mean is most like the keys of its own kind, summed over heads."""
    grid, regions = (4, 6), (2, 3)
    kind = (torch.arange(4)[:, None] // 2 + torch.arange(6) // 2) % 2
    direction = torch.stack([torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])])[kind.flatten()]
    query = torch.cat([torch.full((1, 2), 9.0), direction]).expand(1, 2, -1, -1)
    found = region_routes(RegionRoutes("routes", "query", "key", grid, regions, 3, 1), {"query": query, "key": query})
    kinds = kind[::2, ::2].flatten()
    assert torch.equal(found[0], kinds[:, None] == kinds)


def test_the_choice_is_of_all_heads_together_and_has_no_gradient() -> None:
    shown = example(SITES["grid, shared heads"])
    query, key = (shown.operands[name].clone().requires_grad_() for name in ("query", "key"))
    operation = RegionRoutes("routes", "query", "key", (8, 9), (4, 3), 5, 1)
    found = region_routes(operation, {"query": query, "key": key})
    assert not found.requires_grad
    assert found.shape == (2, 12, 12)
    assert (found.sum(-1) == 5).all()


def test_the_convolution_changes_nothing_at_first() -> None:
    shown = example(SITES["grid, CLS"])
    with_it, without = (Routed(regions=(4, 3), topk=2, lepe=lepe).apply(Program((shown.site,))) for lepe in (True, False))
    added = with_it.sites[0].body.parameters
    assert {each.name: (each.shape, each.init, each.trainable) for each in added} == {
        "routed_lepe_weight": ((8, 1, 5, 5), "zeros", True),
        "routed_lepe_bias": ((8,), "zeros", True),
    }
    zeros = {each.name: torch.zeros(each.shape, dtype=torch.float64) for each in added}
    assert torch.equal(shown.output(with_it, zeros), shown.output(without, {}))


@pytest.mark.parametrize(
    "values", [{"topk": 0}, {"topk": 50}, {"regions": 0}, {"regions": (2, 0)}, {"regions": (2, 3), "topk": 7}, {"layers": ()}]
)
def test_out_of_range(values: dict[str, object]) -> None:
    with pytest.raises(PassError, match=r"routed: .* is out of range"):
        Routed(**values)
