"""Which tokens stay: scores to positions, at run time, row by row.

Scores and streams have the tokens that are there when the choice is made, and places are places among these. The number that stays is fixed
by the shapes, so nothing depends on data but the places themselves.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from rewrite.ir.errors import ModelCallError
from rewrite.ir.selection import Count, Rounding
from rewrite.ir.site_operations import spread_out
from rewrite.tokens.gather import gather_tokens


def visual_per_row(stream: Tensor, features: Tensor) -> int:
    """How many visual tokens each row holds: stream [B, N, C], features [..., C] of all rows together."""
    batch, _, width = stream.shape
    visual = features.numel() // width
    if visual % batch:
        raise ModelCallError(
            f"{visual} visual tokens cannot be shared evenly by {batch} rows; where tokens leave, every row of a batch must hold the same "
            "number of them"
        )
    return int(visual // batch)


def number_kept(present: int, every: int, keep: float | int, rounding: Rounding, of_all: bool) -> int:
    """How many of `present` candidates stay; see `Count`."""
    return Count(keep, rounding, "all" if of_all else "present").number(present, every)


def attention_received(received: Sequence[Tensor], tokens: int) -> Tensor:
    """[B, tokens]: what the last `tokens` keys receive, from sums [B, H, Nk] per head: the mean over heads, summed over the sites."""
    return torch.stack([one[..., one.shape[-1] - tokens :].mean(1) for one in received]).sum(0)


def drawn(tokens: Tensor, seed: int) -> Tensor:
    """[B, N]: a random score for each of the `tokens` [B, N, ...], the same for the same seed and shape."""
    return torch.rand(tokens.shape[:2], generator=torch.Generator().manual_seed(seed)).to(tokens.device)


def received_as_one_head(query: Tensor, key: Tensor, start: int, stop: int | None) -> Tensor:
    """[B, 1, Nk]: what keys receive from the queries `start` to `stop`, all heads as one; query [B, H, Nq, D], key [B, Hkv, Nk, D]."""
    read = query[:, :, start:stop]
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = torch.einsum("bhid,bhjd->bij", read, key) * (query.shape[1] * query.shape[3]) ** -0.5
    received: Tensor = scores.softmax(-1).sum(1, keepdim=True)
    return received


def chosen_patches(score: Tensor, prefix: int, kept: int, suffix: int) -> Tensor:
    """Places [B, prefix + kept + suffix] (int64, ascending): the first `prefix` tokens, the last `suffix`, and of those between the ones of
    the greatest `score` [B, N]."""
    tokens = score.shape[1]
    best = score[:, prefix : tokens - suffix].topk(kept, dim=1).indices.sort(dim=1).values + prefix
    first, last = (torch.arange(*ends, device=score.device).expand(len(score), -1) for ends in ((0, prefix), (tokens - suffix, tokens)))
    return torch.cat([first, best, last], 1)


def patches_of_mass(
    score: Tensor, present: Tensor | None, ends: tuple[int, int], most: int, share: tuple[float, Rounding] | None, mass: float, padded: bool
) -> tuple[Tensor, Tensor]:
    """Places [B, prefix + K + suffix] (int64, ascending) as of `chosen_patches`, and which of these are no padding, bool.

    Each row keeps the fewest patches whose `score` [B, N], the greatest first, sum up to `mass` of the sum; one at least, and at most
    `most`, or the `share` of its own. present: bool [B, N], which tokens are no padding already. ends: prefix, suffix. K is what the row
    that keeps most keeps, or `most`, `padded`.
    """
    tokens, (prefix, suffix) = score.shape[1], ends
    patches = score.detach()[:, prefix : tokens - suffix]
    patches = patches.to(torch.promote_types(patches.dtype, torch.float32))
    if present is not None:
        patches = patches.masked_fill(~present[:, prefix : tokens - suffix], -1.0)
    ranked = patches.sort(dim=1, descending=True, stable=True)
    there = ranked.values >= 0
    reached = ranked.values.clamp(min=0).cumsum(1)
    stays = there & (functional.pad(reached, (1, 0))[:, :-1] < mass * reached[:, -1:])
    if share is not None:
        part = share[0] * there.sum(1, keepdim=True).double()
        part = {"ceil": part.ceil, "floor": part.floor, "round": (part + 0.5).floor}[share[1]]()
        stays &= torch.arange(there.shape[1], device=part.device) < part
    stays[:, 0] = True
    number = most if padded else min(most, int(stays.sum(1).max()))
    best, order = (ranked.indices[:, :number] + prefix).sort(dim=1)
    chosen = stays[:, :number].gather(1, order)
    around = [torch.arange(*span, device=score.device).expand(len(score), -1) for span in ((0, prefix), (tokens - suffix, tokens))]
    first, last = (torch.ones_like(places, dtype=torch.bool) for places in around)
    return torch.cat([around[0], best, around[1]], 1), torch.cat([first, chosen, last], 1)


def every_token_present(stream: Tensor) -> Tensor:
    """bool [B, N] of the tokens of `stream` [B, N, C] where none is padding."""
    return torch.ones(stream.shape[:2], dtype=torch.bool, device=stream.device)


def fused_of_mass(stream: Tensor, positions: Tensor, present: Tensor, score: Tensor, suffix: int) -> Tensor:
    """As `fused_tokens`, where only those of `positions` [B, K] stay that are `present` [B, K]; the score of padding in `stream` is 0."""
    kept = gather_tokens(stream, positions, 1)
    stays = torch.zeros_like(score, dtype=torch.bool).scatter(1, positions, present)
    weights = score.masked_fill(stays, 0.0)
    return _in_front_of_last(kept, weights[:, None, :].to(stream.dtype) @ stream, suffix)


def present_with_fused(present: Tensor, before: Tensor | None, tokens: int, suffix: int) -> Tensor:
    """`present` [B, K] with the fused token of each row, which is padding where nothing left; before: [B, N], which of `tokens` were."""
    were = tokens if before is None else before.sum(1, keepdim=True)
    return _in_front_of_last(present, present.sum(1, keepdim=True) < were, suffix)


def fused_tokens(stream: Tensor, positions: Tensor, score: Tensor, suffix: int) -> Tensor:
    """The tokens of `stream` [B, N, C] at `positions` [B, K], and in front of the last `suffix` the sum of all others, each times its score
    [B, N]."""
    if positions.shape[1] == stream.shape[1]:
        raise ModelCallError(f"none of {stream.shape[1]} tokens leaves, so none can be fused; keep fewer or do not fuse")
    kept = gather_tokens(stream, positions, 1)
    weights = score.scatter(1, positions, 0.0)
    return _in_front_of_last(kept, weights[:, None, :].to(stream.dtype) @ stream, suffix)


def composed_positions(before: Tensor | None, chosen: Tensor) -> Tensor:
    """Positions in the stream's full length of what was `chosen` [B, K] of the tokens at `before` [B, N]; None: every token was there."""
    return chosen if before is None else before.gather(1, chosen)


def positions_with_fused(positions: Tensor, length: int, suffix: int) -> Tensor:
    """`positions` [B, K] with one more, `length`, in front of the last `suffix`: a token that is none of the stream's own."""
    return _in_front_of_last(positions, positions.new_full((len(positions), 1), length), suffix)


def _in_front_of_last(tokens: Tensor, one: Tensor, suffix: int) -> Tensor:
    ahead = tokens.shape[1] - suffix
    return torch.cat([tokens[:, :ahead], one, tokens[:, ahead:]], 1)


def visual_leaving(visual: Tensor, score: Tensor, kept: int | Tensor) -> Tensor:
    """bool [B, N]: the visual tokens that leave, all but the `kept` of the greatest `score` [B, N] in each row, of equal ones the first.

    visual [B, N] bool. kept: of every row, or int64 [B].
    """
    order = score.masked_fill(~visual, -torch.inf).argsort(dim=1, descending=True, stable=True)
    place = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return visual & (torch.empty_like(order).scatter(1, order, place) >= _of_rows(kept))


def best_of_pictures(score: Tensor, prefix: int, kept: int) -> Tensor:
    """bool [pictures, P]: the `kept` patches of each picture of the greatest score [pictures, prefix + P]."""
    patches = score[:, prefix:]
    return torch.zeros_like(patches, dtype=torch.bool).scatter(1, patches.topk(kept, dim=1).indices, True)


def all_handed(stay: Sequence[Tensor]) -> Tensor:
    """bool [pictures * P]: the patches of all pictures that stay, from those of some of them each."""
    return torch.cat([one.flatten() for one in stay])


def all_made(features: Sequence[Tensor]) -> Tensor:
    """[pictures * P, C]: likewise, what pictures [..., P, C] are to be."""
    return torch.cat([one.flatten(0, -2) for one in features])


def visual_leaving_by_picture(visual: Tensor, stay: Tensor) -> Tensor:
    """bool [B, N]: the visual tokens that leave, where they are the patches of pictures, in order; stay bool, of all patches.

    visual [B, N] bool.
    """
    return torch.zeros_like(visual).masked_scatter(visual, ~stay)


def visual_leaving_spread(visual: Tensor, stream: Tensor, kept: int | Tensor, present: int | None = None) -> Tensor:
    """bool [B, N]: the visual tokens that leave; `kept` of each row stay, those far apart. stream [B, N, C].

    kept: of every row, or int64 [B]. present: how many visual tokens each row holds; None: rows differ, and the data are asked.
    """
    most = int(visual.sum(1).max()) if present is None else present
    number = int(kept.max()) if isinstance(kept, Tensor) else kept
    if not number:
        return visual
    places = visual.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
    chosen = spread_out(gather_tokens(stream, places, 1), number, visual.gather(1, places) if present is None else None)
    among = torch.arange(chosen.shape[1], device=chosen.device) < _of_rows(kept)
    stay = torch.where(among, places.gather(1, chosen), visual.shape[1])
    stays = functional.pad(torch.zeros_like(visual), (0, 1)).scatter(1, stay, True)
    return visual & ~stays[:, :-1]


def _of_rows(number: int | Tensor) -> int | Tensor:
    return number[:, None] if isinstance(number, Tensor) else number


def routed_features(visual: Tensor, stream: Tensor) -> Tensor:
    """[B, 2C]: the mean of the tokens of `stream` [B, N, C] behind the last visual one, but the last (if there are any), and the last."""
    place = torch.arange(visual.shape[1], device=visual.device)
    behind = (place > torch.where(visual, place, -1).amax(1, keepdim=True)) & (place < len(place) - 1)
    last = stream[:, -1]
    total = (stream * behind[..., None]).sum(1)
    count = behind.sum(1, keepdim=True)
    return torch.cat([torch.where(count > 0, total / count.clamp(min=1), last), last], -1)


def routed_to_leave(features: Tensor, up: Tensor, down: Tensor, margin: Tensor) -> Tensor:
    """bool [B]: of which rows a router (`Routed`) says that their visual tokens leave; features [B, 2C]."""
    stay, leave = functional.linear(functional.gelu(functional.linear(features, up)), down).unbind(-1)
    return leave + margin > stay
