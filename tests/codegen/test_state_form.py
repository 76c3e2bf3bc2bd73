"""The algebra from an attention to its state, and the choice between the two orders of contraction."""

from __future__ import annotations

from dataclasses import replace

import attention_forms as forms
import pytest
import sympy
import torch
from linear_forms import CAUSAL, FORMS, NORMALISED, UNNORMALISED, lightning, linear_operands
from torch.utils.flop_counter import FlopCounterMode

from codegen import attend, computed_multiply_adds, visible_pairs
from codegen.contraction_order import Sizes, limits, state_plan
from codegen.state_form import Feature, StateForm, state_form
from codegen.torch_streaming import attend_forward
from rewrite.ir import NK, NQ, QK, Attend, H, I, J, W, tensor

REFUSED = {
    "a softmax": forms.plain(),
    "linear in qk": forms.linear(),
    "together": replace(UNNORMALISED, score=QK + tensor("bias", "ij")),
    "no decay": replace(lightning(), score=QK * sympy.exp(-tensor("rate", "h") * sympy.Abs(I - J))),
    "at a rate of its head": replace(lightning(), score=QK * sympy.exp(-tensor("rate", "bi") * (I - J))),
    "no mask hides": replace(lightning(), mask=sympy.true),
    "decay differently": replace(lightning(), score=lightning().score + 1),
    "up to some limit": replace(UNNORMALISED, score=QK, mask=sympy.And(CAUSAL, J > I - 5)),
    "more than their positions": replace(UNNORMALISED, score=QK, mask=sympy.Ne(tensor("segment", "bi"), tensor("of_key", "bj"))),
    "several ways": replace(UNNORMALISED, score=QK, mask=sympy.And(CAUSAL, tensor("segment", "bi") <= tensor("of_key", "bj"))),
    "segments of its own": replace(UNNORMALISED, score=QK, mask=sympy.Eq(tensor("segment", "bhi"), tensor("of_key", "bj"))),
    "integers tell apart": replace(UNNORMALISED, score=QK, mask=sympy.Eq(sympy.exp(tensor("segment", "bi")), tensor("of_key", "bj"))),
    "w times a factor": replace(NORMALISED, weight=W**2),
    "no product": replace(NORMALISED, weight=W * (tensor("gate", "bi") + tensor("other", "bj"))),
    "mixed": replace(NORMALISED, renormalised=True),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_has_no_state_says_why(words: str) -> None:
    reason = state_form(REFUSED[words])
    assert isinstance(reason, str)
    assert words in reason


def form_of(operation: Attend) -> StateForm:
    form = state_form(operation)
    assert isinstance(form, StateForm), form
    return form


def test_terms_of_a_key_are_gathered() -> None:
    a, b, c = tensor("a", "bhi"), tensor("b_", "bhi"), tensor("c", "bj")
    form = form_of(replace(UNNORMALISED, score=c * (a * QK + b) + 2 * c * QK + sympy.Float(0.5)))
    assert set(form.features) == {Feature(a + 2, c, True), Feature(b, c, False), Feature(sympy.Float(0.5), sympy.Integer(1), False)}
    assert form.width(64) == 66
    assert form.shares_keys
    assert not form_of(replace(UNNORMALISED, score=QK * tensor("c", "hj"))).shares_keys


def test_a_decay_is_kept_relative() -> None:
    form = form_of(lightning(64))
    assert (form.rate, form.shift) == (tensor("rate", "h"), NK - NQ)
    constant = form_of(replace(lightning(), score=QK * sympy.exp(2 * tensor("rate", "h") * (J - I) + H)))
    assert (constant.rate, constant.shift) == (2 * tensor("rate", "h"), 0)
    assert constant.features[0].query == sympy.exp(H)


@pytest.mark.parametrize("form", [name for name, (_, limited) in FORMS.items() if limited])
@pytest.mark.parametrize(("n_queries", "n_keys"), [(37, 37), (20, 53), (53, 20), (1, 9)])
def test_limits_are_the_mask(form: str, n_queries: int, n_keys: int) -> None:
    operation = FORMS[form][0]
    seen = torch.arange(n_keys) < limits(form_of(operation), n_queries, n_keys)[:, None]
    assert int(seen.sum()) == visible_pairs(operation.mask, n_queries, n_keys)


@pytest.mark.parametrize("operation", [NORMALISED, replace(NORMALISED, mask=CAUSAL), lightning()])
def test_the_cheaper_order_is_taken(operation: Attend) -> None:
    def plan(n: int, n_queries: int | None = None) -> object:
        return state_plan(operation, Sizes(1, 8, 8, n_queries or n, n, 64, 64))

    assert plan(32) is None
    assert plan(4096) is not None
    assert plan(4096, 1) is None
    sizes = {"B": 1, "H": 8, "Hkv": 8, "D": 64, "Dv": 64}
    small, large = (computed_multiply_adds(operation, {**sizes, "Nq": n, "Nk": n}) for n in (4096, 8192))
    # Linear in the number of tokens, and less than pair by pair.
    assert large == pytest.approx(2 * small, rel=0.05)
    assert small < 8 * visible_pairs(operation.mask, 4096, 4096) * 128 / 4


@pytest.mark.parametrize("operation", [NORMALISED, replace(NORMALISED, mask=CAUSAL), lightning()])
def test_products_are_counted_as_they_are_done(operation: Attend) -> None:
    """The operator's formula against what torch counts of the products inside it."""
    values = linear_operands(operation, forms.Shape(1, 4, 2, 1100, 1100, 8, 8))
    given = values["query"], values["key"], values["value"]
    assert state_plan(operation, Sizes.of(*given)) is not None
    with FlopCounterMode(display=False) as counter:
        attend(operation, *given, values)
    with FlopCounterMode(display=False) as inside:
        attend_forward(operation, *given, values)
    # The last chunk goes into no state.
    assert inside.get_total_flops() == pytest.approx(counter.get_total_flops(), rel=0.15)
    assert inside.get_total_flops() <= counter.get_total_flops()
