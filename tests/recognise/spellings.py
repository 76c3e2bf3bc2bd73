"""Attention written in many ways: one small module per spelling, and what is to be read from it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, scaled_dot_product_attention, softmax

B, H, N, M, D = 2, 4, 7, 5, 8
C = H * D
SCALE = D**-0.5

Core = Callable[..., Tensor]


class Attention(nn.Module):
    """Projects x (and `context`) to heads, runs `core(self, q, k, v, *rest)` and returns what it gives."""

    def __init__(self, core: Core, heads: int = H, shared: int | None = None) -> None:
        super().__init__()
        self.core, self.heads, self.shared = core, heads, shared or heads
        width = self.shared * D
        self.to_q, self.to_k, self.to_v = nn.Linear(C, heads * D), nn.Linear(C, width), nn.Linear(C, width)
        self.bias = nn.Parameter(torch.randn(heads, N, N))
        self.temperature = nn.Parameter(torch.rand(heads, 1, 1) + 0.5)

    def split(self, projected: Tensor) -> Tensor:
        """[B, N, heads * D] -> [B, heads, N, D]."""
        return projected.view(*projected.shape[:2], -1, D).transpose(1, 2)

    def forward(self, x: Tensor, *rest: Tensor) -> Tensor:
        return self.core(self, self.split(self.to_q(x)), self.split(self.to_k(x)), self.split(self.to_v(x)), *rest)


class CrossAttention(Attention):
    """Keys and values from the second input."""

    def forward(self, x: Tensor, *rest: Tensor) -> Tensor:
        context = rest[0]
        return self.core(self, self.split(self.to_q(x)), self.split(self.to_k(context)), self.split(self.to_v(context)), *rest[1:])


class FusedQKV(nn.Module):
    """One projection for q, k and v, taken apart by `apart`."""

    def __init__(self, apart: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]) -> None:
        super().__init__()
        self.apart = apart
        self.qkv = nn.Linear(C, 3 * C)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.apart(self.qkv(x))
        out = ((q @ k.transpose(-2, -1)) * SCALE).softmax(-1) @ v
        return out.transpose(1, 2).reshape(*x.shape)


class SingleHead(nn.Module):
    """[B, N, C] queries, keys and values without a head axis."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(C, D), nn.Linear(C, D), nn.Linear(C, D)

    def forward(self, x: Tensor) -> Tensor:
        return softmax(self.q(x) @ self.k(x).transpose(1, 2) / math.sqrt(D), dim=-1) @ self.v(x)


def sizes(**other: int) -> dict[str, int]:
    """The usual sizes, some of them changed."""
    return {"B": B, "H": H, "Hkv": H, "Nq": N, "Nk": N, "D": D, "Dv": D} | other


def x(batch: int = B, tokens: int = N) -> Tensor:
    return torch.randn(batch, tokens, C)


@dataclass(frozen=True)
class Spelling:
    """A module, what it is called with, and what is to be read."""

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]] = lambda: (x(),)
    sizes: dict[str, int] = field(default_factory=sizes)
    kind: str = "self"
    causal: bool = False
    dropout: float = 0.0

    def __str__(self) -> str:
        return self.name


def later() -> Tensor:
    """[N, N]: True where the key comes after the query."""
    return torch.ones(N, N, dtype=torch.bool).triu(1)


def padding() -> Tensor:
    """[B, 1, 1, N]: True for real tokens; the second row has two fewer."""
    lengths = torch.tensor([N, N - 2])
    return (torch.arange(N) < lengths[:, None])[:, None, None]


def weighted(q: Tensor, k: Tensor, v: Tensor, score: Callable[[Tensor], Tensor] = lambda s: s * SCALE) -> Tensor:
    return score(q @ k.transpose(-2, -1)).softmax(-1) @ v


def merged(q: Tensor) -> Tensor:
    """[B, H, N, D] -> [B * H, N, D]."""
    return q.reshape(-1, *q.shape[2:])


def bmm(self: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.bmm(merged(q) * SCALE, merged(k).transpose(1, 2))
    return torch.bmm(softmax(scores, -1), merged(v)).view(*q.shape).transpose(1, 2).reshape(q.shape[0], -1, C)


def bmm_masked(self: Attention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """The way of older BART and OPT: the mask is added between two views."""
    scores = torch.bmm(merged(q) * SCALE, merged(k).transpose(1, 2)).view(B, H, N, N) + mask
    return torch.bmm(scores.view(B * H, N, N).softmax(-1), merged(v)).view(B, H, N, D).transpose(1, 2).reshape(B, N, C)


def baddbmm(self: Attention, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    scores = torch.baddbmm(bias, merged(q), merged(k).transpose(1, 2), beta=0.5, alpha=SCALE)
    return torch.bmm(scores.softmax(-1), merged(v)).view(B, H, N, D)


def baddbmm_named(self: Attention, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """BLOOM's way: every operand by name."""
    scores = bias.baddbmm(batch1=merged(q), batch2=merged(k).transpose(1, 2), beta=1.0, alpha=SCALE)
    return torch.bmm(input=scores.softmax(-1), mat2=merged(v)).view(B, H, N, D)


def baddbmm_unread(self: Attention, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    scores = torch.baddbmm(bias, merged(q), merged(k).transpose(1, 2), beta=0, alpha=SCALE)
    return torch.bmm(scores.softmax(-1), merged(v)).view(B, H, N, D)


def einsum_heads_second(self: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("bhid,bhjd->bhij", q, k).mul(SCALE).softmax(dim=-1)
    return torch.einsum("bhij,bhjd->bhid", weights, v)


def einsum_heads_third(self: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (entry.transpose(1, 2) for entry in (q, k, v))
    weights = torch.einsum("bihd,bjhd->bhij", q, k) * SCALE
    return torch.einsum("bhij,bjhd->bihd", weights.softmax(-1), v).flatten(2)


def transposed(self: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Keys down, queries across: softmax over the axis before the last, values from the left."""
    weights = softmax(k @ q.transpose(-2, -1) * SCALE, dim=-2)
    return v.transpose(-2, -1) @ weights


def repeated(shared: Tensor, times: int) -> Tensor:
    """[B, Hkv, N, D] -> [B, Hkv * times, N, D], consecutive heads sharing one (transformers' repeat_kv)."""
    batch, heads, tokens, width = shared.shape
    return shared[:, :, None].expand(batch, heads, times, tokens, width).reshape(batch, heads * times, tokens, width)


def grouped_5d(self: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Queries as [B, Hkv, group, N, D] against keys with an axis of size one."""
    q = q.view(B, 2, 2, N, D)
    out = ((q @ k[:, :, None].transpose(-2, -1)) * SCALE).softmax(-1) @ v[:, :, None]
    return out.reshape(B, H, N, D)


def upcast(self: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.transpose(2, 3)) * SCALE
    return softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v


def upcast_scores(self: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.transpose(2, 3)).float() * SCALE).softmax(-1).type_as(v) @ v


class Dropped(Attention):
    """Attention dropout on the map."""

    def __init__(self, training: bool) -> None:
        super().__init__(lambda self, q, k, v: dropout(softmax(q @ k.mT * SCALE, -1), 0.25, self.training) @ v)
        self.train(training)


class DroppedFused(Attention):
    """Attention dropout inside the fused call."""

    def __init__(self, training: bool) -> None:
        super().__init__(lambda self, q, k, v: scaled_dot_product_attention(q, k, v, dropout_p=0.25 if self.training else 0.0))
        self.train(training)


def attention(core: Core, heads: int = H, shared: int | None = None) -> Callable[[], nn.Module]:
    return lambda: Attention(core, heads, shared)


def apart_unbind(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv.reshape(B, N, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def apart_index(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    split = qkv.reshape(B, N, 3, H, D).permute(2, 0, 3, 1, 4)
    return split[0], split[1], split[2]


def apart_chunk(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (part.unflatten(-1, (H, D)).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
    return q, k, v


def apart_split(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (part.view(B, N, H, D).permute(0, 2, 1, 3) for part in qkv.split(C, dim=2))
    return q, k, v


def apart_heads_first(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Heads outermost in the channels, as BLOOM and Persimmon have them."""
    q, k, v = qkv.view(B, N, H, 3 * D).transpose(1, 2).chunk(3, dim=-1)
    return q, k, v


LOWEST = torch.finfo(torch.float32).min

SPELLINGS: tuple[Spelling, ...] = (
    # Fused calls
    Spelling("sdpa", attention(lambda self, q, k, v: scaled_dot_product_attention(q, k, v))),
    Spelling(
        "sdpa, boolean mask",
        attention(lambda self, q, k, v, m: scaled_dot_product_attention(q, k, v, attn_mask=m)),
        lambda: (x(), padding()),
    ),
    Spelling(
        "sdpa, additive mask by position",
        attention(lambda self, q, k, v, m: scaled_dot_product_attention(q, k, v, m, 0.0, False)),
        lambda: (x(), torch.randn(B, 1, N, N)),
    ),
    Spelling("sdpa, mask [N, N]", attention(lambda self, q, k, v: scaled_dot_product_attention(q, k, v, self.bias[0]))),
    Spelling("sdpa, causal", attention(lambda self, q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True)), causal=True),
    Spelling(
        "sdpa, causal by position", attention(lambda self, q, k, v: scaled_dot_product_attention(q, k, v, None, 0.0, True)), causal=True
    ),
    Spelling("sdpa, scale", attention(lambda self, q, k, v: scaled_dot_product_attention(q, k, v, scale=0.3))),
    Spelling(
        "sdpa, enable_gqa",
        attention(lambda self, q, k, v: scaled_dot_product_attention(q, k, v, enable_gqa=True), shared=2),
        sizes=sizes(Hkv=2),
    ),
    Spelling(
        "sdpa, enable_gqa with one head of keys",
        attention(lambda self, q, k, v: scaled_dot_product_attention(q, k, v, enable_gqa=True), shared=1),
        sizes=sizes(Hkv=1),
    ),
    Spelling("sdpa, keywords", attention(lambda self, q, k, v: scaled_dot_product_attention(query=q, key=k, value=v))),
    Spelling("sdpa, dropout in training", lambda: DroppedFused(True), dropout=0.25),
    Spelling("sdpa, dropout in evaluation", lambda: DroppedFused(False)),
    # Where the scale stands
    Spelling("scale before", attention(lambda self, q, k, v: weighted(q * SCALE, k, v, lambda s: s))),
    Spelling("scale after", attention(lambda self, q, k, v: weighted(q, k, v))),
    Spelling("divided by the root", attention(lambda self, q, k, v: weighted(q, k, v, lambda s: s / math.sqrt(D)))),
    Spelling("scale on the keys", attention(lambda self, q, k, v: weighted(q, k * SCALE, v, lambda s: s))),
    Spelling("scale on both", attention(lambda self, q, k, v: weighted(q * SCALE**0.5, k * SCALE**0.5, v, lambda s: s))),
    Spelling("scale from the left", attention(lambda self, q, k, v: weighted(SCALE * q, k, v, lambda s: s))),
    Spelling("no scale", attention(lambda self, q, k, v: weighted(q, k, v, lambda s: s))),
    Spelling("temperature per head", attention(lambda self, q, k, v: weighted(q, k, v, lambda s: s * self.temperature))),
    Spelling("scale spelt out", attention(lambda self, q, k, v: weighted(q, k, v, lambda s: torch.multiply(s, SCALE)))),
    Spelling("divide", attention(lambda self, q, k, v: weighted(q, k, v, lambda s: torch.divide(s, math.sqrt(D))))),
    # Contractions
    Spelling("einsum bhid,bhjd", attention(einsum_heads_second)),
    Spelling("einsum bihd,bjhd", attention(einsum_heads_third)),
    Spelling("bmm", attention(bmm)),
    Spelling("bmm with a mask between views", attention(bmm_masked), lambda: (x(), torch.randn(B, 1, N, N))),
    Spelling("baddbmm", attention(baddbmm), lambda: (x(), torch.randn(B * H, N, N))),
    Spelling("baddbmm, names", attention(baddbmm_named), lambda: (x(), torch.randn(B * H, 1, N))),
    Spelling("baddbmm, beta 0", attention(baddbmm_unread), lambda: (x(), torch.randn(B * H, N, N))),
    Spelling("transposed", attention(transposed)),
    Spelling("special softmax", attention(lambda self, q, k, v: torch.special.softmax(q @ k.mT * SCALE, -1) @ v)),
    # Fused projections
    Spelling("qkv unbind", lambda: FusedQKV(apart_unbind)),
    Spelling("qkv indexed", lambda: FusedQKV(apart_index)),
    Spelling("qkv chunk", lambda: FusedQKV(apart_chunk)),
    Spelling("qkv split", lambda: FusedQKV(apart_split)),
    Spelling("qkv heads first", lambda: FusedQKV(apart_heads_first)),
    # Shared heads
    Spelling(
        "shared heads, expand and reshape",
        attention(lambda self, q, k, v: weighted(q, repeated(k, 2), repeated(v, 2)), shared=2),
        sizes=sizes(Hkv=2),
    ),
    Spelling(
        "shared heads, repeat_interleave",
        attention(lambda self, q, k, v: weighted(q, k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)), shared=2),
        sizes=sizes(Hkv=2),
    ),
    Spelling(
        "shared heads, torch.repeat_interleave before sdpa",
        attention(
            lambda self, q, k, v: scaled_dot_product_attention(q, torch.repeat_interleave(k, 2, 1), torch.repeat_interleave(v, 2, 1)),
            shared=2,
        ),
        sizes=sizes(Hkv=2),
    ),
    Spelling("shared heads, five axes", attention(grouped_5d, shared=2), sizes=sizes(Hkv=2)),
    Spelling("one shared head, by broadcasting", attention(lambda self, q, k, v: weighted(q, k, v), shared=1), sizes=sizes(Hkv=1)),
    # Masks and biases
    Spelling(
        "additive mask",
        attention(lambda self, q, k, v, m: weighted(q, k, v, lambda s: s * SCALE + m)),
        lambda: (x(), torch.randn(B, 1, N, N)),
    ),
    Spelling(
        "masked_fill, True hides",
        attention(lambda self, q, k, v, m: weighted(q, k, v, lambda s: (s * SCALE).masked_fill(m, -torch.inf))),
        lambda: (x(), ~padding()),
    ),
    Spelling(
        "masked_fill, True hides, causal",
        attention(lambda self, q, k, v, m: weighted(q, k, v, lambda s: (s * SCALE).masked_fill(m, float("-inf")))),
        lambda: (x(), later()),
        causal=True,
    ),
    Spelling(
        "masked_fill of what is not kept",
        attention(lambda self, q, k, v, m: weighted(q, k, v, lambda s: (s * SCALE).masked_fill(~m, -torch.inf))),
        lambda: (x(), padding()),
    ),
    Spelling(
        "masked_fill with the lowest number",
        attention(lambda self, q, k, v, m: weighted(q, k, v, lambda s: (s * SCALE).masked_fill(m == 0, LOWEST))),
        lambda: (x(), padding().long()),
    ),
    Spelling(
        "where with the lowest number",
        attention(lambda self, q, k, v, m: weighted(q, k, v, lambda s: torch.where(m, s * SCALE, LOWEST))),
        lambda: (x(), padding()),
    ),
    Spelling(
        "where with a tensor of the lowest number",
        attention(lambda self, q, k, v, m: weighted(q, k, v, lambda s: torch.where(m, s * SCALE, torch.full([], LOWEST, dtype=s.dtype)))),
        lambda: (x(), padding()),
    ),
    Spelling(
        "where, scores second",
        attention(lambda self, q, k, v, m: weighted(q, k, v, lambda s: torch.where(m, -torch.inf, s * SCALE))),
        lambda: (x(), ~padding()),
    ),
    Spelling(
        "where as a method",
        attention(lambda self, q, k, v, m: weighted(q, k, v, lambda s: (s * SCALE).where(m, torch.full_like(s, LOWEST)))),
        lambda: (x(), padding()),
    ),
    Spelling("relative position bias", attention(lambda self, q, k, v: weighted(q, k, v, lambda s: s * SCALE + self.bias))),
    Spelling("bias, unsqueezed", attention(lambda self, q, k, v: weighted(q, k, v, lambda s: s * SCALE + self.bias[None]))),
    Spelling(
        "one number added",
        attention(lambda self, q, k, v, m: weighted(q, k, v, lambda s: s * SCALE + m)),
        lambda: (x(), torch.randn(1, 1, 1, 1)),
    ),
    Spelling(
        "bias and mask",
        attention(lambda self, q, k, v, m: weighted(q, k, v, lambda s: (s * SCALE + self.bias).masked_fill(~m, -torch.inf))),
        lambda: (x(), padding()),
    ),
    # Precision and dropout
    Spelling("softmax in float32", attention(upcast)),
    Spelling("scores in float32", attention(upcast_scores)),
    Spelling("dropout in training", lambda: Dropped(True), dropout=0.25),
    Spelling("dropout in evaluation", lambda: Dropped(False)),
    # Sizes of one, and two token streams
    Spelling("a batch of one", attention(lambda self, q, k, v: weighted(q, k, v)), lambda: (x(1),), sizes(B=1)),
    Spelling("a batch of one, bmm", attention(bmm), lambda: (x(1),), sizes(B=1)),
    Spelling("a batch of one, sdpa", attention(lambda self, q, k, v: scaled_dot_product_attention(q, k, v)), lambda: (x(1),), sizes(B=1)),
    Spelling("one head", attention(lambda self, q, k, v: weighted(q, k, v), heads=1), lambda: (x(),), sizes(H=1, Hkv=1)),
    Spelling("no head axis", SingleHead, lambda: (x(),), sizes(H=1, Hkv=1)),
    Spelling("no head axis, a batch of one", SingleHead, lambda: (x(1),), sizes(B=1, H=1, Hkv=1)),
    Spelling("one query, self", attention(lambda self, q, k, v: weighted(q[:, :, -1:], k, v)), lambda: (x(),), sizes(Nq=1)),
    Spelling(
        "one query, sdpa", attention(lambda self, q, k, v: scaled_dot_product_attention(q[:, :, -1:], k, v)), lambda: (x(),), sizes(Nq=1)
    ),
    Spelling(
        "cross, sdpa",
        lambda: CrossAttention(lambda self, q, k, v: scaled_dot_product_attention(q, k, v)),
        lambda: (x(), x(tokens=M)),
        sizes(Nk=M),
        "cross",
    ),
    Spelling("cross", lambda: CrossAttention(lambda self, q, k, v: weighted(q, k, v)), lambda: (x(), x(tokens=M)), sizes(Nk=M), "cross"),
    Spelling(
        "cross, one query",
        lambda: CrossAttention(lambda self, q, k, v: weighted(q, k, v)),
        lambda: (x(tokens=1), x(tokens=M)),
        sizes(Nq=1, Nk=M),
        "cross",
    ),
    Spelling(
        "cross, one query, bmm",
        lambda: CrossAttention(bmm),
        lambda: (x(tokens=1), x(tokens=M)),
        sizes(Nq=1, Nk=M),
        "cross",
    ),
    Spelling(
        "queries of a parameter",
        lambda: CrossAttention(lambda self, q, k, v: weighted(self.bias[None, :, :, :1].expand(B, H, N, D), k, v)),
        lambda: (x(), x(tokens=M)),
        sizes(Nk=M),
        "cross",
    ),
    Spelling(
        "queries of a parameter, sdpa",
        lambda: CrossAttention(lambda self, q, k, v: scaled_dot_product_attention(self.bias[None, :, :, :1].expand(B, H, N, D), k, v)),
        lambda: (x(), x(tokens=M)),
        sizes(Nk=M),
        "cross",
    ),
    Spelling(
        "one query, one row, one head",
        lambda: CrossAttention(lambda self, q, k, v: weighted(q, k, v), heads=1),
        lambda: (x(1, 1), x(1, M)),
        sizes(B=1, H=1, Hkv=1, Nq=1, Nk=M),
        "cross",
    ),
)
