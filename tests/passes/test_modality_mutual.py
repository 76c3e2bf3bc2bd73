"""Later text unlocked for visual queries: masks of positions, bool masks and additive ones, with padding and documents in one row."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import sympy
import torch
from synthetic_sites import BATCH, CAUSAL, SCALE, SITES, example, site
from test_every_pass import applied

from codegen.operator import attend
from passes import Composite, ModalityMutual, Neighborhood
from rewrite.ir import QK, PassError, Program, Site, as_passes, tensor
from rewrite.ir.semantics import attention_weights, evaluate_operation

TOKENS, IMAGE, PADDING = 12, (2, 3, 4, 5), 2
FORMS: dict[str, dict[str, Any]] = {
    "bool": {"mask": sympy.Ne(tensor("seen", "bij"), 0)},
    "bool, every row the same": {"mask": sympy.Ne(tensor("seen", "ij"), 0)},
    "additive": {"score": SCALE * QK + tensor("added", "bhij")},
    "positions and padding": {"mask": sympy.And(CAUSAL, sympy.Ne(tensor("padding", "bj"), 0))},
}


def causal_and_padded(side: str) -> torch.Tensor:
    """[B, N, N] bool: the mask that models build; the last row of the batch is padded."""
    seen = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril().repeat(BATCH, 1, 1)
    seen[-1, :, slice(PADDING) if side == "left" else slice(-PADDING, None)] = False
    return seen


def case(form: str, seen: torch.Tensor, queries: int = TOKENS) -> tuple[Site, dict[str, torch.Tensor]]:
    """A site of that form and its operands; the mask may be cut to the last queries."""
    random = torch.Generator().manual_seed(0)
    built = "positions" not in form
    made = site(TOKENS, queries=None if queries == TOKENS else queries, visual=True, hides_later=built, **FORMS[form])
    visual = torch.zeros(BATCH, TOKENS, dtype=torch.bool)
    visual[:, IMAGE] = True
    tensors = {
        "query": torch.randn(BATCH, 2, queries, 4, generator=random, dtype=torch.float64),
        "key": torch.randn(BATCH, 2, TOKENS, 4, generator=random, dtype=torch.float64),
        "value": torch.randn(BATCH, 2, TOKENS, 4, generator=random, dtype=torch.float64),
        "seen": (seen[0] if "same" in form else seen)[..., -queries:, :],
        "added": torch.zeros(BATCH, 1, queries, TOKENS, dtype=torch.float64).masked_fill(~seen[:, None, -queries:], -1e30),
        "padding": seen.diagonal(dim1=1, dim2=2).to(torch.int32),
        "visual": visual[:, -queries:],
    }
    return made, {name: tensors[name] for name in made.operands if name in tensors}


def pairs(made: Site, operands: dict[str, torch.Tensor], setting: ModalityMutual | None = None) -> torch.Tensor:
    """[B, Nq, Nk] bool: which pairs weigh something, after the pass."""
    (changed,) = (setting or ModalityMutual()).apply(Program((made,))).sites
    assert changed != made
    values = dict(operands)
    for operation in changed.body.operations[:-1]:
        evaluate_operation(operation, values)
    weights = attention_weights(changed.attend, values)
    assert (weights.sum(-1) <= 1 + 1e-9).all()
    return (weights != 0).any(1)


def expected(seen: torch.Tensor, image: tuple[int, ...] = IMAGE) -> torch.Tensor:
    """The formula, pair by pair: a visual query sees all later text but padding."""
    result = seen.clone()
    for row in range(len(seen)):
        for query in image:
            for key in range(query + 1, seen.shape[-1]):
                if key not in image and seen[row, key, key]:
                    result[row, query, key] = True
    return result


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("form", FORMS)
def test_later_text_is_unlocked_and_padding_is_not(form: str, side: str) -> None:
    seen = causal_and_padded(side)
    if "same" in form:
        seen = seen[:1].repeat(BATCH, 1, 1)
    sees = seen.any(-1)  # a row of padding in front sees nothing, or with a finite additive mask everything alike
    assert torch.equal(pairs(*case(form, seen))[sees], expected(seen)[sees])


@pytest.mark.parametrize("form", ["bool", "additive", "positions and padding"])
@pytest.mark.parametrize("queries", [10, 7])
def test_behind_a_cache_new_text_is_unlocked(form: str, queries: int) -> None:
    """Of the image, what is new sees the new text behind it; what the cache holds was encoded before."""
    seen = causal_and_padded("left")
    new = tuple(token for token in IMAGE if token >= TOKENS - queries)
    assert torch.equal(pairs(*case(form, seen, queries)), expected(seen, new)[:, -queries:])


def test_other_documents_of_a_row_stay_hidden() -> None:
    seen = causal_and_padded("left")
    seen[0, 8:, :8] = False
    mutual = pairs(*case("bool", seen))
    assert mutual[0, IMAGE[0], 7]
    assert not mutual[0, :8, 8:].any()


@pytest.mark.parametrize("form", FORMS)
def test_the_lowered_operator_and_its_gradients(form: str) -> None:
    seen = causal_and_padded("left")
    made, operands = case(form, seen[:1].repeat(BATCH, 1, 1) if "same" in form else seen)
    (changed,) = ModalityMutual().apply(Program((made,))).sites
    mask = expected(seen[:1].repeat(BATCH, 1, 1) if "same" in form else seen)[:, None]
    leaves = [operands[name].clone().requires_grad_() for name in ("query", "key", "value")]
    values = {**operands, **dict(zip(("query", "key", "value"), leaves, strict=True))}
    for operation in changed.body.operations[:-1]:
        evaluate_operation(operation, values)
    actual = attend(changed.attend, *leaves, values)
    query, key, value = leaves
    dense = (float(SCALE) * query @ key.transpose(-2, -1)).masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num(0.0) @ value
    kept = mask.any(-1, keepdim=True)
    torch.testing.assert_close(actual * kept, dense * kept, rtol=1e-10, atol=1e-12)
    weight = torch.randn(actual.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for got, wanted in zip(*(torch.autograd.grad((out * weight * kept).sum(), leaves) for out in (actual, dense)), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-11)


def test_the_changed_site_is_causal_no_more() -> None:
    program = ModalityMutual().apply(Program((SITES["image and text"],)))
    assert not program.sites[0].causal
    assert Neighborhood(3).apply(program).touched


def test_steps_of_one_token_are_left_alone() -> None:
    ((_, _, reason),) = applied(ModalityMutual(), "step of one").declined
    assert "changes nothing" in reason


def test_a_score_that_a_mask_is_inside_of_is_declined() -> None:
    made, _ = case("bool", causal_and_padded("left"))
    shown = sympy.Piecewise((SCALE * QK, sympy.Ne(tensor("seen", "bij"), 0)), (sympy.Float(-1e30), True))
    hidden = made.with_operations(replace(made.attend, mask=sympy.true, score=shown))
    assert "its score reads seen" in str(ModalityMutual().declines(hidden))


def test_composite_and_mutual_exclude_each_other() -> None:
    with pytest.raises(PassError, match="exclude each other"):
        as_passes([Composite(), ModalityMutual()])


def test_the_reference_agrees_on_every_synthetic_site() -> None:
    for name in ("image and text", "image and text, padded", "image and text, shared heads", "step of four"):
        shown, program = example(SITES[name]), applied(ModalityMutual(), name)
        assert program.touched, name
        torch.testing.assert_close(shown.output(program, {}), ModalityMutual().reference(shown.inputs({})))


def test_an_additive_mask_keeps_what_it_adds_besides_hiding() -> None:
    """A bias by distance: the unlocked pair gets what the pair has the other way round, and no other pair changes."""
    made, operands = case("additive", causal_and_padded("left")[:1].repeat(BATCH, 1, 1))
    place = torch.arange(TOKENS, dtype=torch.float64)
    operands["added"] = operands["added"] - 0.5 * (place[:, None] - place).abs()
    (changed,) = ModalityMutual().apply(Program((made,))).sites
    values = dict(operands)
    for operation in changed.body.operations[:-1]:
        evaluate_operation(operation, values)
    dots = float(SCALE) * operands["query"] @ operands["key"].transpose(-2, -1) - 0.5 * (place[:, None] - place).abs()
    mask = expected(causal_and_padded("left")[:1].repeat(BATCH, 1, 1))[:, None]
    torch.testing.assert_close(attention_weights(changed.attend, values), dots.masked_fill(~mask, -torch.inf).softmax(-1))
