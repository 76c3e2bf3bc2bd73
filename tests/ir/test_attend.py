"""The attention operation: what its parts mean, written out by hand, what may be combined, and how it reads."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sympy
import torch

from rewrite.ir import NK, QK, TOTAL, Attend, B, G, Groups, H, HeadMix, I, J, W, mass, read, tensor
from rewrite.ir.semantics import attend, attention_weights

PLAIN = Attend("out", "query", "key", "value", QK / 2)
MASKED = replace(PLAIN, mask=sympy.And(J <= I, I > 0))
UNUSUAL: dict[str, Attend] = {
    "is linear attention": replace(PLAIN, normaliser="sum", denominator=TOTAL + 1e-6),
    "no normaliser": replace(PLAIN, normaliser="none"),
    "has sink logits": replace(PLAIN, sink=tensor("t", "h")),
    "changes its weights": replace(PLAIN, weight=W * tensor("gate", "h")),
    "normalises its weights again": replace(PLAIN, renormalised=True),
    "mixes heads": replace(PLAIN, score_mix=HeadMix("before", "shift"), weight_mix=HeadMix("after")),
}


def operands(batch: int = 2, heads: int = 3, queries: int = 4, keys: int = 5) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=random, dtype=torch.float64)

    return {
        "query": normal(batch, heads, queries, 2),
        "key": normal(batch, heads, keys, 2),
        "value": normal(batch, heads, keys, 2),
        "t": normal(heads),
        "gate": normal(heads),
        "before": normal(heads, heads),
        "shift": normal(heads),
        "after": normal(heads, heads),
        "rows": normal(batch, heads, queries, 3),
    }


def logits(values: dict[str, torch.Tensor]) -> torch.Tensor:
    return values["query"] @ values["key"].transpose(-2, -1) / 2


def seen() -> torch.Tensor:
    return torch.ones(4, 5, dtype=torch.bool).tril() & (torch.arange(4) > 0)[:, None]


@pytest.mark.parametrize("said", UNUSUAL)
def test_json_and_facts(said: str) -> None:
    operation = UNUSUAL[said]
    again = Attend.from_json(operation.to_json())
    assert replace(again, result="out") == operation
    assert not operation.is_plain
    assert any(said in part for part in operation.unusual)
    assert PLAIN.is_plain
    assert not PLAIN.unusual


def test_tensors_with_where_they_are_read() -> None:
    operation = replace(UNUSUAL["mixes heads"], score=QK + read("rows", B, H, I, sympy.floor(J / 2)), sink=tensor("t", "h"))
    assert operation.tensors() == {
        "after": (G, H), "before": (G, H), "rows": (B, H, I, sympy.floor(J / 2)), "shift": (G,), "t": (H,)
    }  # fmt: skip


def test_a_sink_is_one_more_key_without_a_value() -> None:
    values = operands()
    wide = torch.cat([logits(values), values["t"].view(1, 3, 1, 1).expand(2, 3, 4, 1)], -1)
    torch.testing.assert_close(attend(UNUSUAL["has sink logits"], values), wide.softmax(-1)[..., :5] @ values["value"])
    weights = attention_weights(replace(PLAIN, sink=sympy.Integer(0)), values)
    torch.testing.assert_close(weights, logits(values).exp() / (1 + logits(values).exp().sum(-1, keepdim=True)))


def test_a_query_that_sees_no_key_gives_zeros_whatever_its_normaliser() -> None:
    values = operands()
    for said in ("is linear attention", "no normaliser", "has sink logits", "normalises its weights again"):
        out = attend(replace(UNUSUAL[said], mask=MASKED.mask), values)
        assert (out[:, :, 0] == 0).all()
        assert not out.isnan().any()


def test_other_normalisers() -> None:
    values = operands()
    squares = replace(MASKED, score=QK**2)
    kept = (2 * logits(values)) ** 2 * seen()
    torch.testing.assert_close(attention_weights(replace(squares, normaliser="none"), values), kept)
    weights = attention_weights(replace(squares, normaliser="sum", denominator=TOTAL + 0.5), values)
    torch.testing.assert_close(weights, kept / (kept.sum(-1, keepdim=True) + 0.5))
    by_head = sympy.Piecewise((NK + I, sympy.Eq(H, 1)), (TOTAL, True))
    divisor = kept.sum(-1, keepdim=True).clone()
    divisor[:, 1] = 5 + torch.arange(4.0)[:, None]
    weights = attention_weights(replace(squares, normaliser="sum", denominator=by_head), values)
    torch.testing.assert_close(weights, (kept / divisor).nan_to_num())


def test_a_weight_is_changed_and_normalised_again() -> None:
    values = operands()
    gate = values["gate"].view(3, 1, 1)
    mixed = (1 - gate) * logits(values).softmax(-1) + gate / 5
    operation = replace(PLAIN, weight=(1 - tensor("gate", "h")) * W + tensor("gate", "h") / NK)
    torch.testing.assert_close(attention_weights(operation, values), mixed)
    again = replace(operation, weight=sympy.Abs(operation.weight), renormalised=True)
    torch.testing.assert_close(attention_weights(again, values), mixed.abs() / mixed.abs().sum(-1, keepdim=True))


def test_what_is_hidden_weighs_nothing_until_the_weight_expression() -> None:
    values = operands()
    mixed = replace(MASKED, weight_mix=HeadMix("after", "shift"))
    assert (attention_weights(mixed, values)[:, :, ~seen()] == 0).all()
    assert (attention_weights(replace(mixed, weight=W + 1), values)[:, :, ~seen()] == 1).all()


def test_heads_are_mixed_before_and_after() -> None:
    values = operands()
    before = torch.einsum("gh,bhij->bgij", values["before"], logits(values)) + values["shift"].view(3, 1, 1)
    after = torch.einsum("gh,bhij->bgij", values["after"], before.softmax(-1))
    torch.testing.assert_close(attention_weights(UNUSUAL["mixes heads"], values), after)


def test_a_tensor_is_read_at_expressions() -> None:
    values = operands()
    weights = attention_weights(replace(PLAIN, score=QK / 2 + read("rows", B, H, I, sympy.floor(J / 2))), values)
    torch.testing.assert_close(weights, (logits(values) + values["rows"][..., torch.arange(5) // 2]).softmax(-1))


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"normaliser": "max"}, "no such normaliser"),
        ({"normaliser": "none", "sink": tensor("t", "h")}, "a logit of a softmax"),
        ({"denominator": TOTAL + 1}, "'sum' normaliser"),
        ({"normaliser": "sum", "denominator": TOTAL + J}, "not on j"),
        ({"normaliser": "sum", "denominator": TOTAL + tensor("t", "h")}, "not on t"),
        ({"normaliser": "sum", "score": QK / TOTAL}, "total belongs to the denominator"),
        ({"score": QK + W}, "w belongs to the weight"),
        ({"weight": W * QK}, "qk to the score"),
        ({"mask": QK > 0}, "qk to the score"),
        ({"sink": tensor("t", "hj")}, "not on a key"),
        ({"sink": QK}, "not on a key"),
        ({"score": QK + tensor("t", "h"), "sink": tensor("t", "i")}, "t is read at"),
        ({"score": QK + tensor("after", "hj"), "weight_mix": HeadMix("after")}, "after is read at"),
        ({"score": QK + tensor("h", "j")}, "cannot be called h"),
        ({"groups": Groups("member", ("a",), (mass("a"),)), "renormalised": True}, "groups of keys are defined for plain"),
    ],
)
def test_parts_that_do_not_go_together(parts: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        replace(PLAIN, **parts)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("operation", "text"),
    [
        (PLAIN, "out = softmax(qk/2) @ value"),
        (replace(PLAIN, mask=J <= I, sink=tensor("t", "h")), "out = softmax(qk/2, where=j <= i, sink=t[h]) @ value"),
        (UNUSUAL["is linear attention"], "out = sum(qk/2, denominator=total + 1.0e-6) @ value"),
        (UNUSUAL["no normaliser"], "out = scores(qk/2) @ value"),
        (UNUSUAL["mixes heads"], "out = mixed(softmax(mixed(qk/2, before, shift)), after) @ value"),
        (
            replace(UNUSUAL["changes its weights"], renormalised=True),
            "out = normalised((w*gate[h] with w = softmax(qk/2))) @ value",
        ),
        (
            replace(PLAIN, score=QK + read("rows", B, H, I, sympy.floor(J / 2))),
            "out = softmax(qk + rows[b, h, i, floor(j/2)]) @ value",
        ),
        (
            replace(PLAIN, groups=Groups("member", ("a", "b"), (mass("a"), sympy.Integer(1)))),
            "out = grouped(softmax(qk/2), by=member[b, j], a: mass_a, b: 1) @ value",
        ),
    ],
)
def test_text(operation: Attend, text: str) -> None:
    assert str(operation) == text


def test_groups_of_every_head() -> None:
    values = operands()
    groups = Groups("member", ("a", "b"), (mass("b"), sympy.Integer(2)), per_head=True)
    operation = replace(PLAIN, groups=groups)
    assert replace(Attend.from_json(operation.to_json()), result="out") == operation
    assert operation.tensors() == {"member": (B, H, J)}
    values["member"] = torch.randint(0, 3, (2, 3, 5), generator=torch.Generator().manual_seed(1))
    plain = logits(values).softmax(-1)
    in_a, in_b = ((values["member"] == code)[:, :, None] for code in (0, 1))
    expected = plain * (in_a * (plain * in_b).sum(-1, keepdim=True) + in_b * 2)
    torch.testing.assert_close(attention_weights(operation, values), expected)
