"""Tokens fused by several criteria, in both directions (MCTF, Lee et al. 2024), at run time. A match is as in `rewrite.tokens.merging`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from rewrite.ir.selection import Criteria
from rewrite.tokens.merging import Match, merged_tokens, protect, with_ends_in_place


def attended(received: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """What each token receives [B, N], from sums [B, H, N] over queries: the mean over heads; and its weight when fused."""
    mean = received.mean(1)
    weights = (mean * sizes / sizes.amax(1, keepdim=True)).to(sizes.dtype)
    return mean, weights.clamp(min=torch.finfo(sizes.dtype).tiny)


@torch.no_grad()
def fused_match(
    stream: Tensor, received: Tensor, sizes: Tensor, prefix: int, suffix: int, count: float, criteria: tuple[float, float, float]
) -> Match:
    """The match of at most `count` tokens of `stream` [B, N, C], a number or a share of those behind CLS.

    None of the first `prefix` and the last `suffix` go into others or take others in.

    Half of them are tokens at even places that go into ones at odd places, the others are of these, and go into even ones that are left:
    each to that of the greatest product of `pair_scores`. received, sizes: [B, N].
    """
    batch, tokens, _ = stream.shape
    number = Criteria(*criteria).number(count, tokens, prefix + suffix)
    scores = pair_scores(stream, received, sizes, *criteria)
    protect(scores, tokens, prefix, suffix)
    forth, back = number // 2, number - number // 2
    closest, odd = scores.max(2)
    order = closest.argsort(dim=1, descending=True, stable=True)
    gone_even, left_even = order[:, :forth], order[:, forth:].sort(dim=1).values
    again, even = scores.gather(1, left_even[..., None].expand(-1, -1, scores.shape[2])).max(1)
    order = again.argsort(dim=1, descending=True, stable=True)
    gone_odd, left_odd = order[:, :back], order[:, back:].sort(dim=1).values
    # Where each odd token is in the end: among the even ones left, or behind them. Even ones that went into it went along.
    place = torch.zeros(scores.shape[::2], dtype=torch.int64, device=stream.device)
    behind = torch.arange(left_odd.shape[1], device=stream.device) + left_even.shape[1]
    place = place.scatter(1, left_odd, behind.expand(batch, -1)).scatter(1, gone_odd, even.gather(1, gone_odd))
    stays = torch.cat([2 * left_even, 2 * left_odd + 1], 1)
    target = torch.cat([place.gather(1, odd.gather(1, gone_even)), even.gather(1, gone_odd)], 1)
    return with_ends_in_place(stays, torch.cat([2 * gone_even, 2 * gone_odd + 1], 1), target, prefix, suffix)


def pair_scores(stream: Tensor, received: Tensor, sizes: Tensor, similar: float, informative: float, sized: float) -> Tensor:
    """[B, even, odd]: how well each two tokens go together.

    The product of ((1 + cos) / 2) ** (1 / similar), of ((1 / a) / max(1 / a)) ** (1 / informative) for the `received` a of both, and of
    ((1 / s) / max(1 / s)) ** (1 / sized) for the sizes s of both: alike, little looked at, and small.
    """
    unit = functional.normalize(stream.to(sizes.dtype), dim=-1)
    alike = ((1 + unit[:, ::2] @ unit[:, 1::2].mT) / 2).clamp(min=0) ** (1 / similar)
    each = _inverse(received.to(sizes.dtype)) ** (1 / informative) * _inverse(sizes) ** (1 / sized)
    return alike * each[:, ::2, None] * each[:, None, 1::2]


def _inverse(entries: Tensor) -> Tensor:
    """1 / entries over its greatest, [B, N]; what no query looks at is as good as what is looked at least."""
    least = torch.finfo(entries.dtype).tiny
    return entries.amin(1, keepdim=True).clamp(min=least) / entries.clamp(min=least)


def spread_values(value: Tensor, into: Tensor) -> Tensor:
    """[B, H, N, D]: at each token's place the value [B, H, N - r, D] of what it went `into` [B, N]."""
    return value.gather(2, into[:, None, :, None].expand(-1, value.shape[1], -1, value.shape[3]))


def fused_rows(output: Tensor, weights: Tensor, after: Tensor, stays: Tensor, merged: Tensor, target: Tensor) -> Tensor:
    """[B, H, N - r, D]: the mean of the rows of output [B, H, N, D] of tokens that are fused, weighted as these.

    weights [B, N]; after [B, N - r]: those of what is fused.
    """
    batch, heads, tokens, width = output.shape
    rows = merged_tokens(output.transpose(1, 2).reshape(batch, tokens, heads * width), weights, after, stays, merged, target)
    return rows.reshape(batch, -1, heads, width).transpose(1, 2)
