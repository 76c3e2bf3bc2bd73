"""What linear attention needs around its attention: feature maps, and what a window contributes beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch.nn import functional

from rewrite.ir.attend import Attend
from rewrite.ir.evaluation import evaluate_expression
from rewrite.ir.plain_operations import Axes, PlainOperation

Feature = Literal["relu", "leaky_relu", "exp", "elu", "softmax"]

# How small a feature of "softmax" may become, so that no row of a sum of products is zero (LoLCATs, `FeatureMap`).
SMALLEST_FEATURE = 1e-12

_FEATURES: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": torch.relu,
    "leaky_relu": functional.leaky_relu,
    # Injective linear attention (Han et al. 2024) tempers its exponential so.
    "exp": lambda x: (0.2 * x).exp(),
    "elu": lambda x: functional.elu(x) + 1.0,
    "softmax": lambda x: torch.cat([x.softmax(-1), (-x).softmax(-1)], dim=-1).clamp(min=SMALLEST_FEATURE),
}


@dataclass(frozen=True)
class FeatureMap(PlainOperation):
    """A feature map of queries or keys: source [B, H, N, D] -> [B, H, N, F].

    kind: "relu", "leaky_relu" (slope 0.01), "exp" (of 0.2 x), "elu" (elu(x) + 1), all elementwise; "softmax":
    clamp(cat[softmax(x), softmax(-x)], 1e-12) over channels, which doubles the width. weight [H, D, F'] or None: x is source @ weight of
    each head. Computed in float32 where the source is of lower precision, and returned in the source's.
    """

    operands: ClassVar[tuple[str, ...]] = ("source", "weight")
    token_by_token: ClassVar[bool] = True

    source: str
    kind: Feature
    weight: str | None = None
    width: int = 0

    def compute(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        source = tensors["source"]
        x = source.to(torch.promote_types(source.dtype, torch.float32))
        if self.weight is not None:
            x = x @ tensors["weight"].to(x.dtype)
        return _FEATURES[self.kind](x).to(source.dtype)

    def axes(self, given: Mapping[str, Axes]) -> Axes:
        width = self.width or given["source"].width
        return given["source"]._replace(width=2 * width if self.kind == "softmax" else width)

    def cost(self, given: Mapping[str, Axes]) -> int:
        heads, tokens, width = given["source"]
        return 0 if self.weight is None else heads * tokens * width * self.width


@dataclass(frozen=True)
class Ones(PlainOperation):
    """A value of one for every key: like [B, H, N, D] -> [B, H, N, 1]. An attention of it sums up the weights."""

    operands: ClassVar[tuple[str, ...]] = ("like",)
    token_by_token: ClassVar[bool] = True

    like: str

    def compute(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return torch.ones_like(tensors["like"][..., :1])

    def axes(self, given: Mapping[str, Axes]) -> Axes:
        return given["like"]._replace(width=1)


@dataclass(frozen=True)
class WindowSum(PlainOperation):
    """The softmax's denominator over a causal window: sum_j exp(s[i,j] - max_j s[i,j]) for the keys j that `attend` lets i see, of the
    last `window` up to i.

    query [B, H, Nq, D], key [B, Hkv, Nk, D], tensors: those that the score and the mask of `attend` read. result [B, H, Nq, 1], in float32
    at least; 0 for a query that sees no key. It takes Nq * 2 window scores and not Nq * Nk.
    """

    operands: ClassVar[tuple[str, ...]] = ("query", "key")

    query: str
    key: str
    attend: Attend
    window: int

    def reads(self) -> dict[str, str]:
        return {**super().reads(), **{name: name for name in self.attend.tensors()}}

    def compute(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        query, key = (tensors[name] for name in ("query", "key"))
        (batch, heads, queries, width), (_, shared, keys, _) = query.shape, key.shape
        dtype, device = torch.promote_types(query.dtype, torch.float32), query.device
        # Blocks of `rows` queries, and the keys that any of them has in its window.
        rows = min(self.window, queries)
        blocks = -(-queries // rows)
        first = torch.arange(blocks, device=device)[:, None] * rows
        row = first + torch.arange(rows, device=device)
        column = first + keys - queries - self.window + 1 + torch.arange(rows + self.window - 1, device=device)
        inside = column.clamp(0, keys - 1)
        padded = functional.pad(query, (0, 0, 0, blocks * rows - queries)).to(dtype)
        grouped = padded.reshape(batch, shared, heads // shared, blocks, rows, width)
        dot = grouped @ key[:, :, inside].to(dtype).unsqueeze(2).transpose(-2, -1)
        i, j = row[:, :, None], column[:, None, :]
        places = {
            "b": torch.arange(batch, device=device).view(-1, 1, 1, 1, 1),
            "h": torch.arange(heads, device=device).view(-1, 1, 1, 1),
            "i": i.clamp(max=queries - 1),
            "j": inside[:, None, :],
            "Nq": queries,
            "Nk": keys,
        }
        known = {**places, "qk": dot.reshape(batch, heads, blocks, rows, -1)}
        for name, indices in self.attend.tensors().items():
            axes = zip(indices, tensors[name].shape, strict=True)
            at = [torch.as_tensor(evaluate_expression(index, places) if size > 1 else 0, device=device) for index, size in axes]
            known[name] = tensors[name][tuple(place.clamp(0, size - 1) for place, size in zip(at, tensors[name].shape, strict=True))]
        position = i + keys - queries
        seen = (j >= 0) & (j < keys) & (j > position - self.window) & (j <= position)
        seen = seen & torch.as_tensor(evaluate_expression(self.attend.mask, known), device=device)
        scores = torch.as_tensor(evaluate_expression(self.attend.score, known)).masked_fill(~seen, -torch.inf)
        peak = scores.amax(-1, keepdim=True)
        total = (scores - peak.masked_fill(peak == -torch.inf, 0.0)).exp().sum(-1)
        return total.reshape(batch, heads, blocks * rows, 1)[:, :, :queries]

    def axes(self, given: Mapping[str, Axes]) -> Axes:
        return given["query"]._replace(width=1)

    def cost(self, given: Mapping[str, Axes]) -> int:
        heads, tokens, width = given["query"]
        rows = min(self.window, tokens)
        return heads * math.ceil(tokens / rows) * rows * (rows + self.window - 1) * width


@dataclass(frozen=True)
class SharedNormaliser(PlainOperation):
    """Two attentions over different keys, each normalised by itself, as one: their denominators are added (LoLCATs, Zhang et al. 2025).

    first, second [B, H, N, D]; first_total, second_total [B, H, N, 1]: what each was divided by; factor [H]. With g = sigmoid(factor) of
    each head and g' = 1 - g where `affine`, else 1:

        result = (g first_total first + g' second_total second) / (g first_total + g' second_total)          zero where that is 0 / 0
    """

    operands: ClassVar[tuple[str, ...]] = ("first", "first_total", "second", "second_total", "factor")

    first: str
    first_total: str
    second: str
    second_total: str
    factor: str
    affine: bool = False

    def compute(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        first, second = tensors["first"], tensors["second"]
        dtype = torch.promote_types(first.dtype, torch.float32)
        factor = tensors["factor"].to(dtype).sigmoid().view(-1, 1, 1)
        mass = factor * tensors["first_total"].to(dtype)
        other = (1.0 - factor if self.affine else 1.0) * tensors["second_total"].to(dtype)
        total = mass + other
        joined = (mass * first.to(dtype) + other * second.to(dtype)) / total.masked_fill(total == 0, 1.0)
        return joined.to(first.dtype)

    def axes(self, given: Mapping[str, Axes]) -> Axes:
        return given["first"]
