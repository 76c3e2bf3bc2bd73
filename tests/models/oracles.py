"""What a rewritten model must compute, said without the compiler: the original model with its attention or its masks replaced by hand."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from passes import Calibrate
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


class PassesByLayer:
    """Attention of a language model and its vision tower as passes say, each where it fits: in a forward, and in `generate()`, where the
    model's own cache holds the keys of the prompt.

    sites: in call order; decoding calls the language's alone. At most one pass fits a site. visual [B, N]: of the prompt. layers: of the
    language model, whose inputs some passes read.
    """

    def __init__(self, passes: list[Pass], sites: list[Site], visual: torch.Tensor, layers: nn.ModuleList) -> None:
        self.sites, self.visual = sites, visual
        self.language = [site for site in sites if site.layout.visual]
        fitting = {s.name: [one for one in passes if one.fits.reason_against(s) is None and one.declines(s) is None] for s in sites}
        assert all(len(found) <= 1 for found in fitting.values())
        self.chosen = {name: found[0] for name, found in fitting.items() if found}
        self.hidden: dict[int, torch.Tensor] = {}
        self.sinks: dict[int, torch.Tensor] = {}
        for layer in layers:
            layer.register_forward_pre_hook(self._keep, with_kwargs=True)

    def _keep(self, module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        states = arguments[0] if arguments else keywords["hidden_states"]
        if states.shape[1] > 1:
            self.hidden[module.self_attn.layer_idx] = states

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, logits: torch.Tensor, number: int) -> torch.Tensor:
        decoding = number >= len(self.sites)
        site = self.language[(number - len(self.sites)) % len(self.language)] if decoding else self.sites[number]
        one = self.chosen.get(site.name)
        if one is None:
            return plain(query, key, value, logits, number)
        # A decoding step has one query, of which transformers lays the heads that share a key head on the axis of queries.
        shape = logits.shape[:3]
        if decoding:
            key, value = (operand.repeat_interleave(shape[2], dim=1) for operand in (key, value))
            query, logits = (operand.flatten(1, 2).unsqueeze(2) for operand in (query, logits))
        if isinstance(one, Calibrate):
            return self._calibrated(one, site, logits, value).reshape(*shape, -1)
        ahead = logits.shape[-1] - self.visual.shape[1]
        visual = functional.pad(self.visual, (0, ahead))  # what is generated is text, and no sink
        hidden = functional.pad(self.hidden[site.layer], (0, 0, 0, ahead)) if site.layout.visual else None
        return one.reference(AttentionInputs(query, key, value, logits, site, hidden, visual)).reshape(*shape, -1)

    def _calibrated(self, setting: Calibrate, site: Site, logits: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """With the sinks that the prompt's tokens have among themselves: the pass's reference knows no cache."""
        weights, prompt = logits.softmax(-1).nan_to_num(0.0), self.visual.shape[1]
        if logits.shape[-2] == prompt:
            received = weights.tril().sum(2) / torch.arange(prompt, 0, -1)
            sinks = received > setting.threshold
            self.sinks[site.layer] = sinks & (sinks.cumsum(-1) > 1)
        sinks = functional.pad(self.sinks[site.layer], (0, logits.shape[-1] - prompt))[:, :, None]
        taken = (1 - setting.beta) * (weights * sinks).sum(-1, keepdim=True)
        others = weights * ~sinks
        return (others * (1 + taken / others.sum(-1, keepdim=True).clamp(min=1e-20)) + setting.beta * weights * sinks) @ value


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
        # transformers gives a layer its cache under different names.
        cache = next((value for value in keywords.values() if hasattr(value, "get_seq_length")), None)
        new = hidden.shape[1]
        # The layer's own cache is updated later in its forward: what it holds now are the earlier tokens.
        past = cache.layers[module.self_attn.layer_idx].get_seq_length() if cache is not None else 0
        # A cache of fixed length has a mask for all its places.
        keys = new + past if mask is None else mask.shape[-1]
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


Rule = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass
class Survivors:
    """Attention of the original model in which tokens that a rule dropped are masked out of every later one: the oracle of selections.

    sites: the numbers of the stack's attentions in the first call; a call without pictures goes through these alone. before, behind: the
    rule that drops tokens in front of a layer, or behind its attention: (weights [B, H, Nq, Nk], alive [B, Nk]) -> what is left. Keys
    behind the first call's were generated, and are seen. seen: what each layer saw of the first call. weights: of all other sites, by
    number.
    """

    sites: tuple[int, ...]
    before: dict[int, Rule] = field(default_factory=dict)
    behind: dict[int, Rule] = field(default_factory=dict)
    alive: torch.Tensor | None = None
    seen: dict[int, torch.Tensor] = field(default_factory=dict)
    weights: dict[int, torch.Tensor] = field(default_factory=dict)

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, logits: torch.Tensor, number: int) -> torch.Tensor:
        if number < self.sites[0]:
            self.weights[number] = logits.softmax(-1)
            return plain(query, key, value, logits, number)
        first, layer = number <= self.sites[-1], (number - self.sites[0]) % len(self.sites)
        if self.alive is None:
            self.alive = torch.ones(logits.shape[0], logits.shape[-1], dtype=torch.bool)
        if first and layer in self.before:
            self.alive = self.before[layer](_weights(logits, self.alive), self.alive)
        if first:
            self.seen[layer] = self.alive
        weights = _weights(logits, self.seen[layer])
        if first and layer in self.behind:
            self.alive = self.behind[layer](weights, self.alive)
        return weights @ value


def _weights(logits: torch.Tensor, alive: torch.Tensor) -> torch.Tensor:
    alive = functional.pad(alive, (0, logits.shape[-1] - alive.shape[1]), value=True)
    return torch.nan_to_num(logits.masked_fill(~alive[:, None, None], -math.inf).softmax(-1))


def best(score: torch.Tensor, candidates: torch.Tensor, count: int) -> torch.Tensor:
    """bool [B, N]: the `count` candidates [B, N] of the greatest score [B, N] in each row, one row and one token at a time."""
    chosen = torch.zeros_like(candidates)
    score = score.detach()
    for row in range(len(score)):
        ranked = sorted((float(-score[row, at]), at) for at in candidates[row].nonzero().flatten().tolist())
        chosen[row, [at for _, at in ranked[:count]]] = True
    return chosen


def groups_of(x: torch.Tensor, a: torch.Tensor, sizes: torch.Tensor, r: int, prefix: int, suffix: int = 0) -> list[list[int]]:
    """Which tokens MCTF fuses, in the order that they have afterwards: those in front, even ones, odd ones, those behind."""
    count = len(x)
    i, u = (1 / a) / (1 / a).max(), (1 / sizes) / (1 / sizes).max()
    alike = (torch.nn.functional.cosine_similarity(x[:, None], x[None], dim=-1) + 1) / 2
    scores = alike * (i[:, None] * i) ** (1 / 20) * (u[:, None] * u) ** (1 / 40)
    even, odd = ([t for t in range(start, count - suffix, 2) if t >= prefix] for start in (0, 1))
    number = min(r, (count - prefix - suffix) // 2, count - 10)
    best = {t: max(odd, key=lambda other, t=t: float(scores[t, other])) for t in even}
    gone = sorted(even, key=lambda t: -float(scores[t, best[t]]))[: number // 2]
    left = [t for t in even if t not in gone]
    back = {t: max(left, key=lambda other, t=t: float(scores[other, t])) for t in odd}
    away = sorted(odd, key=lambda t: -float(scores[back[t], t]))[: number - number // 2]
    members = {t: [t] for t in range(count)}
    for t in gone:
        members[best[t]] += members.pop(t)
    for t in away:
        members[back[t]] += members.pop(t)
    order = list(range(prefix)) + left + [t for t in odd if t not in away] + list(range(count - suffix, count))
    return [members[t] for t in order]


def cls_row(keep: float, prefix: int, suffix: int = 0) -> Rule:
    """EViT's rule without fusing."""

    def rule(weights: torch.Tensor, alive: torch.Tensor) -> torch.Tensor:
        around = torch.ones_like(alive)
        around[:, prefix : alive.shape[1] - suffix] = False
        patches = alive & ~around
        return around | best(weights[:, :, 0].mean(1), patches, math.ceil(keep * int(patches[0].sum())))

    return rule
