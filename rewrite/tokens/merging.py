"""Tokens that are alike merged into one (Bolya et al. 2023, token merging): the match, the weighted mean, and sizes, at run time.

Of N tokens r are merged away. A match is three tensors of int64: `stays` [B, N - r], the places of the tokens that stay, in the order that
they have afterwards; `merged` [B, r], the places of the others; and `target` [B, r], which of those that stay each of these goes into.
Sizes [B, N] say of how many tokens of the model's own each one is the mean.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from rewrite.tokens.gather import gather_tokens

Match = tuple[Tensor, Tensor, Tensor]


@torch.no_grad()
def matched(key: Tensor, prefix: int, suffix: int, count: int) -> Match:
    """The match of at most `count` tokens by their keys [B, H, N, D], even places with odd ones; none of the first `prefix` and the last
    `suffix`."""
    metric = functional.normalize(key.to(_wide(key)).mean(1), dim=-1)
    batch, tokens, _ = metric.shape
    number = max(0, min(count, (tokens - prefix - suffix) // 2))
    even, odd = metric[:, ::2], metric[:, 1::2]
    scores = even @ odd.mT
    protect(scores, tokens, prefix, suffix)
    closest, best = scores.max(-1)
    order = closest.argsort(dim=1, descending=True, stable=True)
    gone, left = order[:, :number], order[:, number:].sort(dim=1).values
    # The first and the last tokens stay at the ends. Each are the first and the last of the even and of the odd ones, and none goes into an
    # odd one of them, so that all others lie as they would without.
    end, even_first, odd_first = tokens - suffix, (prefix + 1) // 2, prefix // 2
    even_left = left.shape[1] - (tokens + 1) // 2 + (end + 1) // 2
    places = torch.arange(tokens, device=key.device).expand(batch, -1)
    stays = torch.cat([places[:, :prefix], 2 * left[:, even_first:even_left], places[:, 2 * odd_first + 1 : end : 2], places[:, end:]], 1)
    return stays, 2 * gone, best.gather(1, gone) + even_left


def protect(scores: Tensor, tokens: int, prefix: int, suffix: int) -> None:
    """Let none of the first `prefix` and last `suffix` of `tokens` match: scores [B, even, odd], in place."""
    end = tokens - suffix
    scores[:, : (prefix + 1) // 2] = scores[:, (end + 1) // 2 :] = -torch.inf
    scores[:, :, : prefix // 2] = scores[:, :, end // 2 :] = -torch.inf


def with_ends_in_place(stays: Tensor, merged: Tensor, target: Tensor, prefix: int, suffix: int) -> Match:
    """A match whose tokens that stay begin with the first `prefix` and end with the last `suffix`, known by that in later layers."""
    end = stays.shape[1] + merged.shape[1] - suffix
    order = ((stays >= prefix).to(torch.uint8) + (stays >= end)).argsort(dim=1, stable=True)
    return stays.gather(1, order), merged, order.argsort(dim=1).gather(1, target)


def ones_each(stream: Tensor) -> Tensor:
    """The sizes of tokens of which none was merged: stream [B, N, C] -> [B, N]."""
    return torch.ones(stream.shape[:2], dtype=_wide(stream), device=stream.device)


def merged_sizes(sizes: Tensor, stays: Tensor, merged: Tensor, target: Tensor) -> Tensor:
    """The sizes [B, N - r] of the tokens that a match leaves, from sizes [B, N]."""
    return sizes.gather(1, stays).scatter_add(1, target, sizes.gather(1, merged))


def merged_tokens(stream: Tensor, sizes: Tensor, after: Tensor, stays: Tensor, merged: Tensor, target: Tensor) -> Tensor:
    """The tokens [B, N - r, C] that a match leaves: the mean, weighted by size, of each with those that go into it.

    stream [B, N, C]. sizes [B, N]. after: what `merged_sizes` makes of these. It is x_t + sum_m (x_m - x_t) s_m / after_t over the m that
    go into t, so that only these are weighted. Whole tokens are added, which is faster than entry by entry.
    """
    kept, moved = (gather_tokens(stream, places, 1).to(sizes.dtype) for places in (stays, merged))
    shares = sizes.gather(1, merged) / after.gather(1, target)
    change = (moved - gather_tokens(kept, target, 1)) * shares[..., None]
    batch, left, width = kept.shape
    rows = target + torch.arange(batch, device=target.device)[:, None] * left
    return kept.view(-1, width).index_add(0, rows.flatten(), change.view(-1, width)).view(batch, left, width).to(stream.dtype)


def composed_holders(before: Tensor | None, stays: Tensor, merged: Tensor, target: Tensor) -> Tensor:
    """[B, length]: which of the tokens that a match leaves holds each token of the model's own; `before`: which of those it was given."""
    batch, left = stays.shape
    into = stays.new_zeros((batch, left + merged.shape[1]))
    into = into.scatter(1, stays, torch.arange(left, device=stays.device).expand(batch, -1)).scatter(1, merged, target)
    return into if before is None else into.gather(1, before)


def no_log_size(stream: Tensor) -> Tensor:
    """[B, N]: log of the sizes of tokens of which none was merged."""
    return ones_each(stream).log()


def log_size(sizes: Tensor) -> Tensor:
    """log of sizes [B, N]."""
    return sizes.log()


def _wide(tensor: Tensor) -> torch.dtype:
    """float32 at least: sizes of hundreds weight tokens, and their sums are divided again."""
    return torch.promote_types(tensor.dtype, torch.float32)
