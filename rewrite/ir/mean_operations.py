"""What the mean of all queries or keys says of each token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from rewrite.ir.plain_operations import Axes, PlainOperation


@dataclass(frozen=True)
class MeanProduct(PlainOperation):
    """The mean dot product of a query and the keys, without the map: query [B, H, Nq, D], key [B, Hkv, Nk, D] -> [B, H, Nq]."""

    operands: ClassVar[tuple[str, ...]] = ("query", "key")

    query: str
    key: str

    def compute(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        query, key = tensors["query"], tensors["key"]
        mean = key.mean(2, keepdim=True, dtype=torch.promote_types(key.dtype, torch.float32))
        mean = mean.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        return (query.to(mean.dtype) @ mean.transpose(-2, -1)).squeeze(-1)

    def axes(self, given: Mapping[str, Axes]) -> Axes:
        return given["query"]._replace(width=1)

    def cost(self, given: Mapping[str, Axes]) -> int:
        heads, tokens, width = given["query"]
        return heads * tokens * width


@dataclass(frozen=True)
class EffectiveKeys(PlainOperation):
    """Keys that count for what the mean query makes of them (RALA, Fan et al. 2025): key [B, H, N, D] -> likewise.

    key_j times  N softmax_j(scale * mean(query) . key_j),  the mean being over the queries query [B, H, N, D].
    """

    operands: ClassVar[tuple[str, ...]] = ("key", "query")

    key: str
    query: str
    scale: float

    def compute(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        query, key = tensors["query"], tensors["key"]
        mean = query.mean(2, keepdim=True, dtype=torch.promote_types(query.dtype, torch.float32))
        shares = (self.scale * (key.to(mean.dtype) @ mean.transpose(-2, -1))).softmax(2)
        return (key * shares * key.shape[2]).to(key.dtype)

    def axes(self, given: Mapping[str, Axes]) -> Axes:
        return given["key"]

    def cost(self, given: Mapping[str, Axes]) -> int:
        heads, tokens, width = given["key"]
        return heads * tokens * width
