"""What is no attention that can be rewritten is left alone and said to be so; what only has a softmax in it is not mentioned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from capture import recognised, relowered
from spellings import SCALE, Attention, B, C, H, N, weighted, x
from torch import Tensor, nn
from torch.nn.functional import softmax

from rewrite.ir.passes import Fits

Score = Callable[..., Tensor]


def scored(score: Callable[[Attention, Tensor], Tensor]) -> Attention:
    return Attention(lambda self, q, k, v: weighted(q, k, v, lambda s: score(self, s)))


class MixedScores(Attention):
    """Scores that a linear map of heads or of keys goes over, and what is done to them afterwards."""

    def __init__(self, over: str, then: Score = lambda s: s) -> None:
        super().__init__(self.attend)
        self.over, self.then = over, then
        self.heads, self.keys = nn.Linear(H, H, bias=False), nn.Linear(N, N, bias=False)

    def attend(self, _: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def mixed(s: Tensor) -> Tensor:
            return self.keys(s) if self.over == "keys" else self.heads(s.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

        return weighted(q, k, v, lambda s: self.then(mixed(mixed(s) if self.over == "heads twice" else s)))


# What stands in the way -> a module, and what is said of it.
BETWEEN: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "cumsum": (lambda: scored(lambda self, s: s.cumsum(-1)), "cumsum"),
    "sort": (lambda: scored(lambda self, s: s.sort(-1).values), "getitem"),
    "weighted by a reduction": (lambda: scored(lambda self, s: s * s.sum(-2, keepdim=True)), "from the scores themselves"),
    "clamped after a global maximum": (lambda: scored(lambda self, s: (s - s.max()).clamp(min=-5e4)), "reduction of the scores"),
    "heads mixed, then changed": (lambda: MixedScores("heads", torch.tanh), "after their heads were mixed"),
    "heads mixed twice": (lambda: MixedScores("heads twice"), "a second time"),
    "keys mixed": (lambda: MixedScores("keys"), "something else than heads"),
    "weights of a part of the keys": (
        lambda: Attention(lambda self, q, k, v: softmax(q @ k.mT, -1)[..., 1:] @ v[:, :, 1:]), "takes a part of the scores"
    ),
    "divided by the sum over queries": (
        lambda: Attention(lambda self, q, k, v: (w := softmax(q @ k.mT, -1)) / w.sum(-2, keepdim=True) @ v), "not the one over the keys"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BETWEEN)
def test_what_stands_between_scores_and_softmax_is_a_near_miss(name: str) -> None:
    make, said = BETWEEN[name]
    recognition = recognised(make(), x())
    assert recognition.found == []
    (miss,) = recognition.misses
    assert miss.node
    assert said in miss.reason
    assert "not confirmed" not in miss.reason  # it was not read at all


def test_a_near_miss_is_left_as_it_was() -> None:
    model = scored(lambda self, s: s.cumsum(-1))
    value = x()
    with torch.no_grad():
        expected = model(value)
    actual, capture = relowered(model, value)
    assert torch.equal(actual, expected)
    assert len(capture.recognition.misses) == 1


def test_wrong_group_layout_is_a_near_miss() -> None:
    """Heads of keys repeated as blocks, [k0 k1 k0 k1]: no consecutive groups."""
    model = Attention(lambda self, q, k, v: weighted(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1)), shared=2)
    expanded = Attention(
        lambda self, q, k, v: weighted(q, *(part[:, None].expand(B, 2, 2, N, 8).reshape(B, H, N, 8) for part in (k, v))),
        shared=2,
    )
    (found,) = recognised(model, x()).found
    assert found.site.dims["Hkv"] == H  # `repeat` copies; the copies are heads of their own
    recognition = recognised(expanded, x())
    assert recognition.found == []
    (miss,) = recognition.misses
    assert "consecutive groups" in miss.reason


class Classifier(nn.Module):
    """Softmaxes that are no attention: class probabilities, and a gate of a mixture."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.gate = nn.Linear(C, 10), nn.Linear(C, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.head(x.mean(1)).softmax(-1), (softmax(self.gate(x), -1)[..., None] * x[..., None, :]).sum(-2)


def test_a_classifier_is_not_listed() -> None:
    recognition = recognised(Classifier(), x())
    assert recognition.found == []
    assert recognition.misses == []


class Escaping(nn.Module):
    """Also returns the map, or something computed from it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.q, self.k, self.v = (nn.Linear(C, C) for _ in range(3))

    def forward(self, x: Tensor) -> Any:
        q, k, v = (project(x).view(B, N, H, -1).transpose(1, 2) for project in (self.q, self.k, self.v))
        weights = softmax(q @ k.transpose(-2, -1) * SCALE, dim=-1)
        out = nn.functional.dropout(weights, 0.1, self.training) @ v
        if self.kind == "returned":
            return out, weights
        if self.kind == "averaged":
            return out, weights.mean(1)
        return out


@pytest.mark.parametrize("kind", ["returned", "averaged"])
def test_a_map_that_escapes_is_seen_and_declined(kind: str) -> None:
    recognition = recognised(Escaping(kind).eval(), x())
    (found,) = recognition.found
    assert found.site.map_read
    assert found.region.map_readers
    reason = Fits().reason_against(found.site)
    assert reason is not None
    assert "map is read elsewhere" in reason


def test_a_map_that_does_not_escape_fits() -> None:
    (found,) = recognised(Escaping("").eval(), x()).found
    assert not found.site.map_read
    assert Fits().reason_against(found.site) is None


def test_active_dropout_is_declined() -> None:
    (found,) = recognised(Escaping("").train(), x()).found
    assert found.site.dropout == 0.1
    assert "dropout" in str(Fits().reason_against(found.site))


def test_queries_broadcast_over_the_batch_are_a_near_miss() -> None:
    recognition = recognised(
        Attention(lambda self, q, k, v: weighted(self.bias[None, :, :, :1] * torch.ones(8), k, v)), torch.randn(B, N, C)
    )
    assert recognition.found == []
