"""Attention that is more than a softmax of scaled products: each form with the operation it is to be read as."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from spellings import SCALE, Attention, B, C, D, H, M, N, sizes, weighted, x
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import softmax

SIDE = 3  # of the grid that the keys lie on
GRID = SIDE * SIDE


@dataclass(frozen=True)
class Form:
    """A module, its inputs, and what is to be read: parts of `Attend` by name as they print, sizes, and the site's kind."""

    name: str
    make: Callable[[], nn.Module]
    reads: dict[str, str] = field(default_factory=dict)
    inputs: Callable[[], tuple[Tensor, ...]] = lambda: (x(),)
    sizes: dict[str, int] = field(default_factory=sizes)
    kind: str = "self"

    def __str__(self) -> str:
        return self.name


class Parameters(Attention):
    """Attention with the parameters that the forms here learn."""

    def __init__(self, core: Callable[..., Tensor]) -> None:
        super().__init__(core)
        self.before, self.after = nn.Linear(H, H), nn.Linear(H, H, bias=False)
        self.conv = nn.Conv2d(H, H, 1)
        self.mixer = nn.Parameter(torch.randn(H, H))
        self.sinks, self.gate = nn.Parameter(torch.randn(H)), nn.Parameter(torch.randn(H))
        self.where = nn.Parameter(torch.randn(H, N, N))
        self.rows, self.columns = nn.Parameter(torch.randn(SIDE, SIDE, D)), nn.Parameter(torch.randn(SIDE, SIDE, D))


def over_heads(linear: nn.Module, weights: Tensor) -> Tensor:
    return linear(weights.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def talking(self: Parameters, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """CaiT (Touvron et al. 2021)."""
    return over_heads(self.after, softmax(over_heads(self.before, q @ k.mT * SCALE), -1)) @ v


def talking_by_convolution(self: Parameters, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return softmax(self.conv(q @ k.mT * SCALE), -1) @ v


def talking_by_einsum(self: Parameters, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhij,hg->bgij", softmax(q @ k.mT * SCALE, -1), self.mixer) @ v


def with_sinks(self: Parameters, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """gpt-oss: one more logit for every head, dropped after the softmax."""
    joined = torch.cat([q @ k.mT * SCALE, self.sinks.reshape(1, -1, 1, 1).expand(B, -1, N, -1)], -1)
    joined = joined - joined.max(dim=-1, keepdim=True).values
    return softmax(joined, -1)[..., :-1] @ v


def off_by_one(self: Parameters, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * SCALE
    return softmax(torch.cat([scores.new_zeros(B, H, N, 1), scores], -1), -1)[..., 1:] @ v


def gated(self: Parameters, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """ConViT (d'Ascoli et al. 2021), with weights made to sum to one again."""
    gate = torch.sigmoid(self.gate).view(1, -1, 1, 1)
    weights = (1 - gate) * softmax(q @ k.mT * SCALE, -1) + gate * softmax(self.where, -1)
    return weights / weights.sum(-1).unsqueeze(-1) @ v


def by_hand(self: Parameters, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * SCALE
    powers = torch.exp(scores - scores.amax(-1, keepdim=True))
    return powers / powers.sum(-1, keepdim=True) @ v


def by_logarithm(self: Parameters, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return functional.log_softmax(q @ k.mT * SCALE, -1).exp() @ v


def decomposed(self: Parameters, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """SAM and MViTv2: what a query adds for the row and for the column of a key."""
    at = q.view(B, H, SIDE, SIDE, D)
    rows, columns = torch.einsum("bhyxd,ykd->bhyxk", at, self.rows), torch.einsum("bhyxd,xkd->bhyxk", at, self.columns)
    scores = (q @ k.mT * SCALE).view(B, H, SIDE, SIDE, SIDE, SIDE) + rows[..., None] + columns[..., None, :]
    return softmax(scores.view(B, H, GRID, GRID), -1) @ v


def for_some(self: Parameters, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A bias for all but the first token, written into the scores."""
    scores = q @ k.mT * SCALE
    scores[:, :, 1:, 1:] = scores[:, :, 1:, 1:] + self.where[:, 1:, 1:]
    return softmax(scores, -1) @ v


def normalised_products(self: Parameters, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Swin v2: cosines times a clamped temperature."""
    cosine = functional.normalize(q, dim=-1) @ functional.normalize(k, dim=-1).mT
    return softmax(cosine * self.temperature.clamp(max=4.6).exp() + self.where, -1) @ v


def over_queries(self: Parameters, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores and map transposed: the softmax runs over the first of two axes."""
    return softmax(k @ q.mT * SCALE, dim=-2).mT @ v


def kernel_features(self: Parameters, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """EfficientViT (Cai et al. 2023): ReLU linear attention."""
    padded = functional.pad(v, (0, 1), mode="constant", value=1.0)
    out = functional.relu(q) @ (functional.relu(k).mT @ padded)
    return out[..., :-1] / (out[..., -1:] + 1e-5)


def normalised_sum(self: Parameters, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """ReLU attention divided by its sum."""
    weights = functional.relu(q @ k.mT)
    return weights / (weights.sum(-1, keepdim=True) + 1e-6) @ v


class CrossCovariance(nn.Module):
    """XCiT (El-Nouby et al. 2021): channels attend to channels, over all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(C, 3 * C)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(B, N, 3, H, D).permute(2, 0, 3, 4, 1).unbind(0)
        weights = softmax(functional.normalize(q, dim=-1) @ functional.normalize(k, dim=-1).mT * SCALE, -1)
        return (weights @ v).permute(0, 3, 1, 2).reshape(B, N, C)


class AddmmProjections(nn.Module):
    """GPT-2's layer: one addmm makes queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(C, 3 * C) / C**0.5), nn.Parameter(torch.zeros(3 * C))

    def forward(self, x: Tensor) -> Tensor:
        qkv = torch.addmm(self.bias, x.view(-1, C), self.weight).view(B, N, 3 * C)
        q, k, v = (part.view(B, N, H, D).transpose(1, 2) for part in qkv.split(C, dim=2))
        return weighted(q, k, v)


def form(name: str, core: Callable[..., Tensor], **reads: Any) -> Form:
    return Form(name, lambda: Parameters(core), reads)


FORMS: tuple[Form, ...] = (
    form("talking heads", talking, score_mix="HeadMix(matrix='score_mix', bias='score_mix_bias')",
         weight_mix="HeadMix(matrix='weight_mix', bias=None)"),
    form("talking heads, convolution", talking_by_convolution, score_mix="HeadMix(matrix='score_mix', bias='score_mix_bias')"),
    form("talking heads, einsum", talking_by_einsum, weight_mix="HeadMix(matrix='weight_mix', bias=None)"),
    form("sink logits", with_sinks, sink="bias0[b, h, i]"),
    form("softmax off by one", off_by_one, sink="bias0[b, h, i]"),
    form("gated positions", gated, renormalised="True"),
    form("softmax by hand", by_hand, normaliser="softmax"),
    form("softmax by its logarithm", by_logarithm, normaliser="softmax"),
    Form("decomposed relative position", lambda: Parameters(decomposed),
         {"score": "0.353553390593274*qk + bias0[b, h, i, floor(j/3)] + bias1[b, h, i, Mod(j, 3)]"},
         lambda: (x(tokens=GRID),), sizes(Nq=GRID, Nk=GRID)),
    form("a bias for some", for_some, mask="True"),
    form("cosine", normalised_products, normaliser="softmax"),
    form("softmax not last", over_queries, normaliser="softmax"),
    form("tanh cap", lambda self, q, k, v: weighted(q, k, v, lambda s: 5.0 * torch.tanh(s * SCALE / 5.0)), normaliser="softmax"),
    form("clamped", lambda self, q, k, v: weighted(q, k, v, lambda s: (s * SCALE).clamp(-1.0, 1.0)), normaliser="softmax"),
    form("negated", lambda self, q, k, v: weighted(q, k, v, lambda s: -s), score="-qk"),
    form("head mask", lambda self, q, k, v: softmax(q @ k.mT, -1) * self.gate.view(1, H, 1, 1) @ v, weight="w*bias0[h]"),
    form("sigmoid", lambda self, q, k, v: torch.sigmoid(q @ k.mT * SCALE - 2.0) @ v, normaliser="none"),
    form("squared ReLU", lambda self, q, k, v: torch.relu(q @ k.mT).square() @ v, normaliser="none"),
    form("ReLU over its sum", normalised_sum, normaliser="sum", denominator="total + 1.0e-6"),
    form("ReLU linear attention", kernel_features, normaliser="sum", denominator="total + 1.0e-5", score="qk"),
    form("linear attention, not normalised", lambda self, q, k, v: q @ (k.mT @ v), normaliser="none", score="qk"),
    form("linear attention with softmax features", lambda self, q, k, v: softmax(q, -1) @ (softmax(k, -2).mT @ v), normaliser="none"),
    Form("cross-covariance", CrossCovariance, sizes=sizes(Nq=D, Nk=D, D=N, Dv=N), kind="channel"),
    Form("addmm projections", AddmmProjections),
)  # fmt: skip

__all__ = ["FORMS", "M", "Form"]
