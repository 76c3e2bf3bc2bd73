"""Attention as training here computes it: with its map in bfloat16, which one core does in half the time of PyTorch's fused attention.

Measured on a CPU with AVX-512 BF16, forward and backward of 64 pictures of 197 tokens with 4 heads of 32: 75 ms against 132 ms.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def with_map(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None, **given: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """transformers' interface: query, key, value [B, H, N, D]; attention_mask [B, 1, N, N] is added to the scores, and without one all
    tokens see all. Result [B, N, H, D], and the map."""
    scaling = given.get("scaling")
    with torch.autocast("cpu", enabled=False):
        query, key = query.to(value.dtype), key.to(value.dtype)
        scores = (query * (query.shape[-1] ** -0.5 if scaling is None else scaling)) @ key.transpose(-1, -2)
        if attention_mask is not None:
            scores = scores + attention_mask.to(scores.dtype)
        attention_map = scores.softmax(-1)
        return (attention_map @ value).transpose(1, 2).contiguous(), attention_map


def use_map(*models: nn.Module) -> None:
    """Let transformers' models compute attention like that from now on."""
    from transformers import AttentionInterface

    AttentionInterface.register("with_map", with_map)
    for model in models:
        model.set_attn_implementation("with_map")
