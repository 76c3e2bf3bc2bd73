"""Linear attention of new tokens behind a state, against the whole sequence at once in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sympy
import torch

from codegen import packed
from codegen.recurrence import recurrent, without_recurrence
from rewrite.ir import NK, NQ, QK, Attend, H, I, J, ModelCallError, tensor
from rewrite.ir.expression import TOTAL
from rewrite.ir.semantics import attend as dense

NAMES = ("out", "query", "key", "value")
BIJ, BJ = sympy.Ne(tensor("mask", "bij"), 0), sympy.Ne(tensor("mask", "bj"), 0)
DECAY = sympy.exp((J - I - (NK - NQ)) * (H + 1) / 10)
FORMS = {
    "decay": Attend(*NAMES, score=0.3 * QK * DECAY, mask=BIJ, normaliser="none"),
    "learned decay and a weight by head": Attend(
        *NAMES, score=QK * sympy.exp((J - I - (NK - NQ)) * tensor("rate", "h")) * tensor("scale", "bh"), mask=BIJ, normaliser="none"
    ),
    "sum": Attend(*NAMES, score=QK + 1, mask=BIJ, normaliser="sum", denominator=TOTAL + sympy.Float(1e-3)),
}


def step(attend: Attend, operands: list[torch.Tensor], named: dict[str, torch.Tensor], start: int, stop: int, state: list[torch.Tensor]):  # type: ignore[no-untyped-def]
    """The tokens from start to stop; one alone has its mask without an axis of queries, as models make it."""
    mask = named["mask"][:, start:stop, :stop]
    if stop - start == 1:
        attend, mask = replace(attend, mask=BJ), mask[:, 0]
    tensors = [{**named, "mask": mask}[name] for name in attend.tensors()]
    return torch.ops.rewrite.attend_state(*(each[:, :, start:stop] for each in operands), tensors, state, attend.to_json())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("lengths", [(1, 1, 1), (200, 1, 40, 1), (33, 70)])
def test_turns_are_the_whole_sequence(form: str, lengths: tuple[int, ...]) -> None:
    """Rows padded on the left, also within a later turn's reach; a state that lies in NaN where it was not written would show."""
    attend, n, dtype = FORMS[form], sum(lengths), torch.float64
    query, key, value = (torch.randn(2, heads, n, 8, dtype=dtype).abs() for heads in (4, 2, 2))
    seen = torch.arange(n) >= torch.tensor([[0], [min(2, lengths[0] - 1)]])
    named = {
        "mask": seen[:, None] & torch.ones(n, n, dtype=torch.bool).tril(),
        "rate": torch.rand(4, dtype=dtype) / 9,
        "scale": torch.rand(2, 4, dtype=dtype),
    }
    expected = dense(attend, {"query": query, "key": key, "value": value, **named})
    state: list[torch.Tensor] = []
    found, start, sizes = [], 0, set()
    for length in lengths:
        out, *held_state, held = step(attend, [query, key, value], named, start, start + length, state)
        assert held
        state, start = held_state, start + length
        found.append(out)
        sizes.add(tuple(state[0].shape))
    assert len(sizes) == 1
    assert torch.equal(state[1], seen)
    real = seen[:, None, :, None].expand_as(expected)
    assert (torch.cat(found, 2) - expected)[real].abs().max() <= 1e3 * torch.finfo(dtype).eps * expected[real].abs().max()


def test_the_operator_is_one_that_torch_can_compile() -> None:
    attend = FORMS["sum"]
    operands = [torch.randn(2, heads, 6, 8) for heads in (4, 2, 2)]
    named = {"mask": torch.ones(6, 6, dtype=torch.bool).tril().expand(2, 6, 6)}
    _, state, seen, _ = step(attend, operands, named, 0, 5, [])
    new = [each[:, :, 5:] for each in operands]
    torch.library.opcheck(torch.ops.rewrite.attend_state.default, (*new, [named["mask"][:, 5:]], [state, seen], attend.to_json()))


def test_masks_that_a_state_cannot_follow() -> None:
    """A first call says that it holds none; behind a state it is an error, and so is a mask that hides what the state holds."""
    attend, operands = FORMS["decay"], [torch.randn(2, heads, 6, 8) for heads in (4, 2, 2)]
    causal = torch.ones(6, 6, dtype=torch.bool).tril().expand(2, 6, 6)
    window = {"mask": causal.triu(-2)}
    out, state, _, held = step(attend, operands, window, 0, 5, [])
    assert not held
    assert state.isnan().all()
    given = {name: each[:, :, :5] for name, each in zip(NAMES[1:], operands, strict=True)}
    expected = dense(attend, {**given, "mask": window["mask"][:, :5, :5]})
    assert torch.allclose(out, expected, atol=1e-5)
    _, *state, held = step(attend, operands, {"mask": causal}, 0, 4, [])
    assert held
    with pytest.raises(ModelCallError, match="more than the order of the tokens and padding"):
        step(attend, operands, window, 4, 6, state)
    with pytest.raises(ModelCallError, match="hides other tokens of the cache"):
        step(attend, operands, window, 4, 5, state)


def test_what_has_no_recurrence() -> None:
    causal = J <= I + (NK - NQ)
    by_place = Attend(*NAMES, score=QK * sympy.cos(J), mask=causal, normaliser="none")
    by_length = Attend(*NAMES, score=QK / NK, mask=causal, normaliser="none")
    by_key = Attend(*NAMES, score=QK * tensor("gate", "bj"), mask=causal, normaliser="none")
    for attend, words in ((by_place, "place in the sequence"), (by_length, "place in the sequence"), (by_key, "tensor by key")):
        assert words in str(recurrent(attend))
    assert "softmax" in str(recurrent(Attend(*NAMES, score=QK, mask=causal)))
    form = replace(FORMS["decay"], mask=causal)
    assert without_recurrence(form, one_query=False, first=True, device="cuda") is None
    # Without an offset of queries it is the order in a first call alone.
    early = replace(form, mask=J <= I)
    assert without_recurrence(early, one_query=False, first=True, device="cpu") is None
    assert "no" in str(without_recurrence(early, one_query=False, first=False, device="cpu"))
    assert "tensor" in str(without_recurrence(FORMS["decay"], one_query=False, first=True, device="cuda"))
    # Padding that is no tensor of all pairs goes into the state unseen.
    assert without_recurrence(replace(form, mask=sympy.And(J <= I, BJ)), one_query=False, first=True, device="cuda") is None
    assert "mask" in str(without_recurrence(packed(form), one_query=False, first=True, device="cpu"))
    window = replace(form, mask=sympy.And(causal, J > I + (NK - NQ) - 4))
    assert "mask" in str(without_recurrence(window, one_query=False, first=True, device="cpu"))
