"""Patches of a picture that are gathered into few of them (VisionZip, Yang et al. 2025), at run time.

Of P patches, D stay for their score. Of the other M = P - D, T evenly spaced ones are `targets`; the rest go into these.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from rewrite.tokens.gather import gather_tokens


def divided(score: Tensor, prefix: int, dominant: int, contextual: int) -> tuple[Tensor, Tensor]:
    """Places [pictures, T] and [pictures, M - T], ascending, of the targets and of the rest among prefix + P tokens.

    score [pictures, prefix + P]. The targets are every (M // T)-th of the M patches that are not of the `dominant` greatest scores.
    """
    patches = score[:, prefix:]
    others = patches.topk(patches.shape[1] - dominant, dim=1, largest=False).indices.sort(dim=1).values + prefix
    spaced = range(0, others.shape[1], max(1, others.shape[1] // contextual))[:contextual]
    left = [place for place in range(others.shape[1]) if place not in spaced]
    return others[:, list(spaced)], others[:, left]


def patches_that_stay(score: Tensor, rest: Tensor, prefix: int) -> Tensor:
    """bool [pictures, P]: all patches but those at the places `rest`; score [pictures, prefix + P]."""
    return torch.ones_like(score, dtype=torch.bool).scatter(1, rest, False)[:, prefix:]


def contextual_tokens(features: Tensor, key: Tensor, targets: Tensor, rest: Tensor, summed: bool) -> Tensor:
    """features [pictures, N, C] in which every target is the mean of itself and of those of the `rest` that are most like it.

    Likeness is the cosine of the keys [pictures, H, N, D], averaged over heads. summed: a target is itself plus the mean of the others.
    """
    wide = torch.promote_types(features.dtype, torch.float32)
    metric = functional.normalize(key.detach().to(wide).mean(1), dim=-1)
    best = (gather_tokens(metric, rest, 1) @ gather_tokens(metric, targets, 1).mT).argmax(-1)
    into = functional.one_hot(best, targets.shape[1]).to(wide)
    number = into.sum(1)[..., None]
    own, added = gather_tokens(features, targets, 1).to(wide), into.mT @ gather_tokens(features, rest, 1).to(wide)
    made = own + added / number.clamp(min=1) if summed else (own + added) / (1 + number)
    return features.scatter(1, targets[..., None].expand_as(made), made.to(features.dtype))
