"""What a rewritten model must compute, said without the compiler: the original model with its attention or its masks replaced by hand."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from rewrite import AttentionInputs, Pass, Site

Attention = Callable[..., torch.Tensor]


@contextlib.contextmanager
def attention_replaced_by(function: Attention) -> Iterator[None]:
    """Every `scaled_dot_product_attention` of models with fused attention is `function(query, key, value, logits, number)`."""
    original = functional.scaled_dot_product_attention
    count = 0

    def replaced(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        nonlocal count
        groups = query.shape[1] // key.shape[1]
        key, value = (entry.repeat_interleave(groups, dim=1) for entry in (key, value))
        logits = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
        if is_causal:
            rows, columns = logits.shape[-2:]
            logits = logits.masked_fill(~torch.ones(rows, columns, dtype=torch.bool).tril(), -math.inf)
        if attn_mask is not None:
            logits = logits.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else logits + attn_mask
        count += 1
        return function(query, key, value, logits, count - 1)

    functional.scaled_dot_product_attention = replaced
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = original


def plain(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, logits: torch.Tensor, number: int) -> torch.Tensor:
    """Softmax attention; rows that see nothing give zeros."""
    return torch.nan_to_num(logits.softmax(-1)) @ value


def by_reference(one: Pass, sites: list[Site], **known: Any) -> Attention:
    """Attention as a pass's own reference says, at the sites given in the order of their calls; plain where the entry is None."""

    def function(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, logits: torch.Tensor, number: int) -> torch.Tensor:
        site = sites[number % len(sites)]
        if site is None:
            return plain(query, key, value, logits, number)
        inputs = AttentionInputs(query=query, key=key, value=value, logits=logits, site=site, **{k: v(site) for k, v in known.items()})
        return one.reference(inputs)

    return function


@contextlib.contextmanager
def visual_masked_from(model: nn.Module, layer: int, visual: torch.Tensor) -> Iterator[None]:
    """The original language model in which layers `layer` and later do not see the visual tokens: the oracle of early exit.

    visual [B, N] bool covers the prompt; keys beyond it were generated and are seen. Works on both attention implementations by
    replacing each later layer's attention mask.
    """
    handles = []

    def hide(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden = arguments[0] if arguments else keywords["hidden_states"]
        mask = keywords.get("attention_mask")
        cache = keywords.get("past_key_values")
        new = hidden.shape[1]
        # The layer's own cache is updated later in its forward: what it holds now are the earlier tokens.
        past = cache.layers[module.self_attn.layer_idx].get_seq_length() if cache is not None else 0
        keys = new + past
        gone = functional.pad(visual, (0, max(0, keys - visual.shape[1])))[:, None, None, :keys]
        if mask is None:
            causal = torch.ones(new, keys, dtype=torch.bool).tril(keys - new)[None, None]
            mask = causal.expand(hidden.shape[0], 1, new, keys)
        boolean = mask.dtype == torch.bool
        mask = mask & ~gone if boolean else mask.masked_fill(gone, torch.finfo(mask.dtype).min)
        return arguments, {**keywords, "attention_mask": mask}

    layers = model.model.language_model.layers
    for block in layers[layer:]:
        handles.append(block.register_forward_pre_hook(hide, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
