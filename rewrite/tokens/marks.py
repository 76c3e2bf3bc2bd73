"""Tokens that left a KV cache of fixed length, or pad one whose rows kept different numbers: a mark is in their places, and tells every
later call that nothing is there.

A cache says so itself, so that it is known whatever becomes of it between calls: rows moved for beams, places written again, copies. A mark
is a key that no model makes: numbers that every floating type holds, of alternating sign. It is found in the first head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rewrite.tokens.gather import scatter_tokens

# So many channels are looked at: what else would have to agree by chance is then some hundred bits.
_CHANNELS = 16


def with_marks(new: Tensor, positions: Tensor, length: int) -> Tensor:
    """[B, H, length, D] with the tokens of `new` [B, H, K, D] at `positions` [B, K], and marks in all other places.

    Tokens at position `length`, the padding of rows that keep fewer, are left out.
    """
    marks = _mark(new).expand(*new.shape[:2], length, new.shape[3])
    return scatter_tokens(new, positions, 2, length, fused=True, into=marks)


def marked_padding(entry: Tensor, present: Tensor) -> Tensor:
    """A cache entry [B, H, K, D] with marks in the places of tokens that are not `present` [B, K]: padding of rows that keep fewer."""
    return torch.where(present[:, None, :, None], entry, _mark(entry))


def unmarked(cache: Tensor) -> Tensor:
    """bool [B, M]: which places of a cache [B, H, M, D] hold no mark."""
    channels = min(cache.shape[3], _CHANNELS)
    return (cache[:, 0, :, :channels] != _mark(cache)[:channels]).any(-1)


def _mark(like: Tensor) -> Tensor:
    """[D]: 1/4, -1/2, 1, -2, 4, -1/4, ..."""
    channel = torch.arange(like.shape[3], device=like.device)
    return ((1 - 2 * (channel % 2)) * 2.0 ** (channel % 5 - 2)).to(like.dtype)
