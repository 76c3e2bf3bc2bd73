"""Verification must be able to fail: a region read wrongly is told from one read rightly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import sympy
import torch
from capture import Capture, recognised
from spellings import SCALE, Attention, B, D, H, N, padding, repeated, weighted, x
from torch import Tensor, fx
from torch.nn.functional import scaled_dot_product_attention

from rewrite.ir.expression import QK, I, J
from rewrite.recognise import sites
from rewrite.recognise.region import Layout, Operand, Region
from rewrite.recognise.regions import NearMiss, find_regions
from rewrite.recognise.verify import structure, verify


def masked() -> Attention:
    """Scores with a bias, and pairs taken out by a mask where True hides."""
    return Attention(lambda self, q, k, v, m: weighted(q, k, v, lambda s: (s * SCALE + self.bias).masked_fill(m, -torch.inf)))


def region_of(model: Attention, *inputs: Tensor) -> Region:
    (found,) = recognised(model, *inputs).found
    return found.region


def swapped_heads(operand: Operand) -> Operand:
    """The operand's heads in the other order of merging: (h, b) read as (b, h)."""
    return Operand(operand.node, Layout(order=(1, 0, 2, 3), merged=(B, -1, N, D)))


def computing(region: Region, **changed: Any) -> Region:
    """The region with another score or mask."""
    return replace(region, attend=replace(region.attend, **changed))


def scaled(region: Region, factor: float) -> Region:
    return computing(region, score=region.attend.score.subs(QK, QK * sympy.Float(factor)))


def dot_product(region: Region) -> sympy.Expr:
    """The score's part in qk."""
    return region.attend.score.coeff(QK, 1) * QK


DAMAGE: dict[str, Callable[[Region], Region]] = {
    "scale": lambda region: scaled(region, 1.01),
    "scale, hardly": lambda region: scaled(region, 1 + 1e-6),
    "no bias": lambda region: computing(region, score=dot_product(region)),
    "bias twice": lambda region: computing(region, score=2 * region.attend.score - dot_product(region)),
    "no mask": lambda region: computing(region, mask=sympy.true),
    "mask swapped": lambda region: computing(region, mask=sympy.Not(region.attend.mask)),
    "causal too": lambda region: computing(region, mask=sympy.And(region.attend.mask, J <= I)),
    "keys for queries": lambda region: replace(region, query=region.key, key=region.query),
    "heads of values moved": lambda region: replace(region, value=swapped_heads(region.value)),
    "heads moved": lambda region: replace(region, key=swapped_heads(region.key)),
    "tokens for heads in the result": lambda region: replace(region, output_order=(0, 2, 1, 3)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found(damage: str) -> None:
    region = region_of(masked(), x(), ~padding())
    assert verify(region) is None
    reason = verify(DAMAGE[damage](region))
    assert reason is not None
    assert "differ by" in reason or "the graph gives" in reason


@pytest.mark.parametrize("polarity", [True, False])
@pytest.mark.parametrize("keys", [2, 3, 7, 40])
@pytest.mark.parametrize("keep", [True, False], ids=["True keeps", "True hides"])
def test_masks_of_few_and_many_keys_are_confirmed(keep: bool, keys: int, polarity: bool) -> None:
    """Some row of a drawn mask hides every key: that is no difference; the polarity is, in every case."""
    model = Attention(lambda self, q, k, v, m: weighted(q, k, v, lambda s: (s * SCALE).masked_fill(~m if keep else m, -torch.inf)))
    region = region_of(model, x(tokens=keys), torch.full((B, 1, keys, keys), keep))
    assert (verify(region if polarity else computing(region, mask=sympy.Not(region.attend.mask))) is None) is polarity


def test_wrong_shared_heads_are_found() -> None:
    region = region_of(Attention(lambda self, q, k, v: weighted(q, repeated(k, 2), repeated(v, 2)), shared=2), x())
    assert verify(region) is None
    exchanged = replace(region, value=Operand(region.value.node, Layout(order=(0, 2, 1, 3), split=(B, N, 2, D))))
    assert verify(exchanged) is not None


def test_a_causal_call_read_without_its_mask_is_found() -> None:
    region = region_of(Attention(lambda self, q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True)), x())
    assert verify(region) is None
    assert verify(computing(region, mask=sympy.true)) is not None
    assert verify(computing(region, mask=sympy.Lt(J, I) | sympy.Eq(J, 0))) is not None


def test_damage_is_reported_as_a_near_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(graph: fx.Graph) -> tuple[list[Region], list[NearMiss]]:
        regions, misses = find_regions(graph)
        return [DAMAGE["scale"](region) for region in regions], misses

    monkeypatch.setattr(sites, "find_regions", damaged)
    recognition = recognised(masked(), x(), ~padding())
    assert recognition.found == []
    (miss,) = recognition.misses
    assert miss.reason.startswith("its IR was not confirmed: the graph and the IR differ by")
    assert "softmax" in miss.node


class Two(torch.nn.Module):
    """Two attentions alike but for a number in the second."""

    def __init__(self, second: float) -> None:
        super().__init__()
        self.one = Attention(lambda self, q, k, v: weighted(q, k, v))
        self.two = Attention(lambda self, q, k, v: weighted(q, k, v, lambda s: s * second))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.one(x), self.two(x)


def test_a_proof_serves_only_regions_of_the_same_structure() -> None:
    for second, kinds in ((SCALE, 1), (0.5, 2)):
        torch._dynamo.reset()
        found = recognised(Two(second), x()).found
        assert len({structure(entry.region) for entry in found}) == kinds


def test_nothing_is_lowered_where_nothing_was_confirmed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sites, "verify", lambda region: "for this test")
    model, value = masked(), x()
    capture = Capture(lower=True)
    with torch.no_grad():
        expected = model(value, ~padding())
        actual = torch.compile(model, backend=capture, fullgraph=True, dynamic=False)(value, ~padding())
    assert torch.equal(actual, expected)
    assert [miss.reason for miss in capture.recognition.misses] == ["its IR was not confirmed: for this test"]
    assert H == 4
