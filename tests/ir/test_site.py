"""Sites, programs and the facts by which passes choose."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sympy
import torch

from rewrite.ir import (
    NK,
    NQ,
    QK,
    Attend,
    Body,
    Exit,
    Fits,
    H,
    HeadMix,
    I,
    J,
    Pool,
    Program,
    RewriteError,
    Site,
    TokenLayout,
    W,
    read,
    tensor,
)
from rewrite.ir.passes import is_causal
from rewrite.ir.semantics import evaluate, evaluate_site, pool

CAUSAL = J <= I + NK - NQ


def site(mask: sympy.Basic = sympy.true, score: sympy.Expr = QK / 2, queries: int = 6, **facts: object) -> Site:
    attend = Attend("output", "query", "key", "value", score, mask)
    dims = {"B": 2, "H": 1, "Hkv": 1, "Nq": queries, "Nk": 6, "D": 3, "Dv": 3}
    whole = Site("attn", 0, 2, 0, "self", Body((attend,)), dims, TokenLayout(), ("query", "key", "value", *attend.tensors()))
    return replace(whole, **facts)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("case", "causal"),
    [
        (site(), False),
        (site(CAUSAL), True),
        (site(sympy.And(CAUSAL, J > I - 3)), True),
        (site(queries=1, cached=True), True),
        (site(queries=1), False),
        (site(queries=2, cached=True), False),
        (site(sympy.Ne(tensor("mask", "bj"), 0), queries=1, cached=True), False),
    ],
)
def test_a_step_of_one_query_on_a_cache_is_causal(case: Site, causal: bool) -> None:
    assert is_causal(case) is causal
    assert (Fits(causal=True).reason_against(case) is None) is causal
    assert (Fits(causal=False).reason_against(case) is None) is not causal


@pytest.mark.parametrize(
    ("fits", "facts", "word"),
    [
        (Fits(), {"kind": "cross"}, "cross-attention"),
        (Fits(grid=True), {}, "grid"),
        (Fits(grid=True), {"layout": TokenLayout((2, 3, 1))}, "frames"),
        (Fits(visual=True), {}, "visual"),
        (Fits(hidden=True), {}, "hidden states"),
        (Fits(cached=False), {"cached": True}, "KV cache"),
        (Fits(), {"dropout": 0.1}, "dropout is 0.1"),
        (Fits(), {"map_read": True}, "map is read"),
    ],
)
def test_sites_that_do_not_fit(fits: Fits, facts: dict[str, object], word: str) -> None:
    reason = fits.reason_against(site(**facts))
    assert reason is not None
    assert word in reason
    assert Fits().reason_against(site()) is None


def test_a_grid_of_frames_fits_where_it_may() -> None:
    assert Fits(grid=True, frames=True).reason_against(site(layout=TokenLayout((2, 3, 1)))) is None


@pytest.mark.parametrize(
    ("parts", "word"),
    [
        ({"score_mix": HeadMix("mix")}, "mixes heads"),
        ({"sink": sympy.Integer(0)}, "has sink logits"),
        ({"normaliser": "sum"}, "is linear attention"),
        ({"normaliser": "none"}, "has no normaliser"),
        ({"weight": 2 * W}, "changes its weights"),
        ({"renormalised": True}, "normalises its weights again"),
    ],
)
def test_a_pass_takes_unusual_attention_only_where_it_says_so(parts: dict[str, object], word: str) -> None:
    case = site()
    case = case.with_operations(replace(case.attend, **parts))  # type: ignore[arg-type]
    assert not case.is_plain
    reason = Fits().reason_against(case)
    assert reason is not None
    assert word in reason
    assert Fits(unusual=True).reason_against(case) is None


def test_what_is_read_by_position_cannot_be_cut() -> None:
    operands = {name: torch.randn(1, 1, 6, 3) for name in ("query", "key", "value")}
    visual = torch.tensor([[False, True, False, False, False, False]])
    for index, cut in ((sympy.floor(J / 2), False), (sympy.Integer(0), True)):
        case = site(score=QK + read("table", H, index))
        program = Program((case,), exits=(Exit(stack=0, layer=0, by="token_exit"),))
        values = {**operands, "table": torch.randn(1, 3)}
        if cut:
            assert evaluate_site(program, case, values, visual)[0, :, 2:].isfinite().all()
        else:
            with pytest.raises(RewriteError, match=r"table\[h, floor\(j/2\)\] cannot be cut"):
                evaluate_site(program, case, values, visual)


def test_the_scale_is_the_factor_of_qk_in_any_spelling() -> None:
    bias, slope = tensor("bias", "hij"), tensor("slope", "h")
    assert site(score=sympy.Rational(1, 8) * (QK + bias)).scale == sympy.Rational(1, 8)
    assert site(score=slope * (QK + bias)).scale == slope
    assert site(score=bias).scale == 0


def test_pooling_along_a_sequence_takes_the_length_of_the_call() -> None:
    query = torch.randn(1, 1, 11, 2)
    pooled = pool(Pool("agents", "query", (8,), (5,), prefix=1), {"query": query})
    torch.testing.assert_close(pooled[0, 0, :, 0], torch.nn.functional.adaptive_avg_pool1d(query[0, :, 1:, 0], 5)[0])


def test_after_an_exit_a_site_is_computed_on_the_kept_tokens() -> None:
    random = torch.Generator().manual_seed(0)
    operands = {name: torch.randn(2, 1, 6, 3, generator=random) for name in ("query", "key", "value")}
    case = site(CAUSAL, layer=1)
    visual = torch.tensor([[0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 1, 0]], dtype=torch.bool)
    program = Program((case,), exits=(Exit(stack=0, layer=1, by="token_exit"),))
    output = evaluate_site(program, case, operands, visual)
    for row in range(2):
        kept = {name: entry[row : row + 1, :, ~visual[row]] for name, entry in operands.items()}
        torch.testing.assert_close(output[row, :, ~visual[row]], evaluate(case.body, kept)[0])
        assert output[row, :, visual[row]].isnan().all()
    for other in (Program((case,)), replace(program, exits=(Exit(stack=1, layer=0, by=""), Exit(stack=0, layer=2, by="")))):
        assert torch.equal(evaluate_site(other, case, operands, visual), evaluate(case.body, operands))
    with pytest.raises(ValueError, match="visual must be given"):
        evaluate_site(program, case, operands)


def test_scores_with_positions_are_computed_in_the_precision_of_the_operands() -> None:
    operands = {name: torch.randn(2, 1, 6, 3) for name in ("query", "key", "value")}
    case = site(score=QK / 2 + sympy.Piecewise((sympy.Float(0.1) * (J - I), J < I), (sympy.Integer(0), True)))
    assert evaluate(case.body, operands).dtype == torch.float32
