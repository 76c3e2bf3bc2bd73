"""What composite attention calls are made of, as plain torch code that runs on tensors and, traced, on the nodes of a graph.

A form is given the call's arguments by name and which of its results are read, and returns those results by place. It asks shapes and
types of `traced`, so that sizes that are symbolic stay so, and raises `UncoveredError` for what it does not cover.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from rewrite.recognise.operators import value_of

Form = Callable[[Mapping[str, Any], Collection[int]], dict[int, Any]]


class UncoveredError(Exception):
    """A composite call with options that its form does not cover; the message names them."""


def traced(value: Any) -> Tensor:
    """The tensor itself, or the traced value of the node that stands for it."""
    found = value_of(value.node) if isinstance(value, fx.Proxy) else value
    assert isinstance(found, Tensor)
    return found


def multi_head_attention(given: Mapping[str, Any], read: Collection[int]) -> dict[int, Any]:
    """`torch.nn.functional.multi_head_attention_forward`: [L, B, E] or [L, E], results (attended, weights)."""
    heads = given["num_heads"]
    query, key, value = given["query"], given["key"], given["value"]
    batched = traced(query).dim() == 3
    padding, masked, causal = given["key_padding_mask"], given["attn_mask"], False
    if given["is_causal"] and padding is None and not given["need_weights"]:
        # The mask is only a hint then, and is not read.
        masked, causal = None, True
    if not batched:
        same = {id(each): each.unsqueeze(1) for each in (query, key, value)}
        query, key, value = (same[id(each)] for each in (query, key, value))
        padding = None if padding is None else padding[None]
    query, key, value = _projected(given, query, key, value)
    width = given["embed_dim_to_check"] // heads
    if given["bias_k"] is not None:
        batch = traced(key).shape[1] if isinstance(traced(key).shape[1], int) else key.size(1)
        key, value = (torch.cat([each, given[name].expand(-1, batch, -1)]) for each, name in ((key, "bias_k"), (value, "bias_v")))
    query, key, value = (each.unflatten(-1, (heads, width)).permute(1, 2, 0, 3) for each in (query, key, value))
    key = key if given["static_k"] is None else given["static_k"].unflatten(0, (-1, heads))
    value = value if given["static_v"] is None else given["static_v"].unflatten(0, (-1, heads))
    if given["add_zero_attn"]:
        key, value = (functional.pad(each, (0, 0, 0, 1)) for each in (key, value))
    # Keys that were put behind are seen by every query.
    behind = (given["bias_k"] is not None) + bool(given["add_zero_attn"])
    masks = []
    if masked is not None:
        masks.append(masked.unflatten(0, (-1, heads)) if traced(masked).dim() == 3 else masked)
    if padding is not None:
        masks.append(padding[:, None, None])
    masks = [functional.pad(mask, (0, behind)) if behind else mask for mask in masks]
    dropout = given["dropout_p"] if given["training"] else 0.0
    out, weights = _attention(query, key, value, masks, causal, dropout, given["need_weights"] and 1 in read)
    out = functional.linear(out.permute(2, 0, 1, 3).flatten(2), given["out_proj_weight"], given["out_proj_bias"])
    results = {0: out if batched else out.squeeze(1)}
    if weights is not None:
        weights = weights.mean(dim=1) if given["average_attn_weights"] else weights
        results[1] = weights if batched else weights.squeeze(0)
    return results


def native_multi_head_attention(given: Mapping[str, Any], read: Collection[int]) -> dict[int, Any]:
    """`torch._native_multi_head_attention`: [B, L, E], results (attended, weights)."""
    weights_read = bool(given["need_weights"]) and 1 in read
    out, weights = _native(
        given, given["query"], given["key"], given["value"], given["num_head"], given["mask"], given["mask_type"], weights_read
    )
    if weights is None:
        return {0: out}
    return {0: out, 1: weights.mean(dim=1) if given["average_attn_weights"] else weights}


def transformer_encoder_layer(given: Mapping[str, Any], read: Collection[int]) -> dict[int, Any]:
    """`torch._transformer_encoder_layer_fwd`: [B, L, E], one result."""
    shape, eps = (given["embed_dim"],), given["eps"]

    def norm(x: Any, which: int) -> Any:
        return functional.layer_norm(x, shape, given[f"norm_weight_{which}"], given[f"norm_bias_{which}"], eps)

    def attend(x: Any) -> Any:
        return _native(given, x, x, x, given["num_heads"], given["mask"], given["mask_type"], False)[0]

    def feed_forward(x: Any) -> Any:
        hidden = functional.linear(x, given["ffn_weight_1"], given["ffn_bias_1"])
        hidden = functional.gelu(hidden) if given["use_gelu"] else functional.relu(hidden)
        return functional.linear(hidden, given["ffn_weight_2"], given["ffn_bias_2"])

    x = given["src"]
    if given["norm_first"]:
        x = x + attend(norm(x, 1))
        return {0: x + feed_forward(norm(x, 2))}
    x = norm(x + attend(x), 1)
    return {0: norm(x + feed_forward(x), 2)}


def _native(
    given: Mapping[str, Any], query: Any, key: Any, value: Any, heads: int, mask: Any, kind: int | None, weights_read: bool
) -> tuple[Any, Any]:
    """The attention of PyTorch's fast paths. Masks are True where they hide; kind: 0 [L, L], 1 [B, L], 2 [B, H, L, L]."""
    masks = []
    if mask is not None:
        if kind not in (0, 1, 2):
            raise UncoveredError(f"its mask is of a kind that is not known ({kind})")
        if traced(mask).dtype != torch.bool:
            if traced(mask).device.type != "cpu":
                # There the kernel that is chosen decides whether such a mask is added or hides wherever it is not zero.
                raise UncoveredError("its mask holds numbers that are not known to be zero and minus infinity")
            mask = mask.to(torch.bool)
        masks.append(mask[:, None, None] if kind == 1 else mask)
    query, key, value = _packed(query, key, value, given["qkv_weight"], given["qkv_bias"])
    width = given["embed_dim"] // heads
    query, key, value = (each.unflatten(-1, (heads, width)).transpose(1, 2) for each in (query, key, value))
    out, weights = _attention(query, key, value, masks, False, 0.0, weights_read)
    return functional.linear(out.transpose(1, 2).flatten(2), given["proj_weight"], given["proj_bias"]), weights


def _projected(given: Mapping[str, Any], query: Any, key: Any, value: Any) -> tuple[Any, Any, Any]:
    bias = given["in_proj_bias"]
    if not given["use_separate_proj_weight"]:
        return _packed(query, key, value, given["in_proj_weight"], bias)
    biases = (None, None, None) if bias is None else bias.chunk(3)
    weights = (given["q_proj_weight"], given["k_proj_weight"], given["v_proj_weight"])
    q, k, v = (functional.linear(each, weights[place], biases[place]) for place, each in enumerate((query, key, value)))
    return q, k, v


def _packed(query: Any, key: Any, value: Any, weight: Any, bias: Any) -> tuple[Any, Any, Any]:
    """Projections whose weights lie in one tensor [3 * E, E]; equal inputs are projected together, as PyTorch does."""
    if key is value and query is key:
        together = functional.linear(query, weight, bias).chunk(3, dim=-1)
        return together[0], together[1], together[2]
    width = traced(weight).shape[1]
    if key is value:
        parts = weight.split((width, 2 * width))
        halves = (None, None) if bias is None else bias.split((width, 2 * width))
        both = functional.linear(key, parts[1], halves[1]).chunk(2, dim=-1)
        return functional.linear(query, parts[0], halves[0]), both[0], both[1]
    weights = weight.chunk(3)
    biases = (None, None, None) if bias is None else bias.chunk(3)
    q, k, v = (functional.linear(each, weights[place], biases[place]) for place, each in enumerate((query, key, value)))
    return q, k, v


def _attention(
    query: Any, key: Any, value: Any, masks: list[Any], causal: bool, dropout: float, weights_read: bool
) -> tuple[Any, Any | None]:
    """Attended values, and the weights [B, H, L, S] where they are read. Bool masks are True where they hide, others are added."""
    hidden, added = None, None
    for mask in masks:
        if traced(mask).dtype == torch.bool:
            hidden = mask if hidden is None else torch.logical_or(hidden, mask)
        else:
            added = mask if added is None else added + mask
    if weights_read:
        if causal:
            raise UncoveredError("its weights are read and its mask is a hint only")
        scores = torch.matmul(query * math.sqrt(1.0 / traced(query).shape[-1]), key.transpose(-2, -1))
        scores = scores if added is None else scores + added
        scores = scores if hidden is None else scores.masked_fill(hidden, -math.inf)
        weights = functional.softmax(scores, dim=-1)
        # A rate that is a node is a symbolic number, which is not zero.
        weights = functional.dropout(weights, p=dropout) if isinstance(dropout, fx.Proxy) or dropout else weights
        return torch.matmul(weights, value), weights
    if added is not None and hidden is not None:
        mask = added.masked_fill(hidden, -math.inf)
    else:
        mask = added if hidden is None else torch.logical_not(hidden)
    out = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=causal)
    return out, None
