"""The patches that stay, shared out among a thumbnail and the crops of one image (HiRED, Arif et al. 2025), at run time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from rewrite.ir.errors import ModelCallError


def patches_by_crop(
    early: Tensor,
    late: Tensor,
    prefix: int,
    patches: Sequence[int],
    crops: Sequence[int],
    thumbnail: int,
    others: int,
    busy: int,
    bands: bool,
) -> Tensor:
    """bool [images * (1 + R * C), P]: which patches stay; of each image the thumbnail comes first, then its crops, row by row.

    early, late: [pictures, prefix + P], what the patches receive from CLS in an early and in a late layer. patches: rows and columns of the
    grid of patches, crops: (R, C). thumbnail, others: how many patches of the thumbnail stay, and of all crops together, by `late`. Each
    crop gets of these what it has of the `busy` patches of the thumbnail that have the greatest `early`: those that lie where the crop is,
    or, with bands, in as many consecutive patches; the parts that are no whole patch go to the crops with the largest of them.
    """
    count, number = math.prod(patches), math.prod(crops)
    early, late = early[:, prefix:], late[:, prefix:].reshape(_images(len(late), number + 1), number + 1, count)
    marked = early[:: number + 1].topk(busy, dim=1).indices
    cell = torch.tensor(_cells(patches, crops, bands), device=early.device)
    share = functional.one_hot(cell[marked], number).sum(1).to(torch.float64)
    owed = others * share / share.sum(1, keepdim=True).clamp(min=1)
    # The n-th patch of a crop is owed what is left of its share behind the n - 1 before: whole ones come first, then the largest parts.
    units = (owed[..., None] - torch.arange(count, device=early.device)).flatten(1)
    given = functional.one_hot(units.argsort(dim=1, descending=True, stable=True)[:, :others] // count, number).sum(1)
    budget = torch.cat([given.new_full((len(given), 1), thumbnail), given], 1)
    rank = late.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return (rank < budget[..., None]).flatten(0, 1)


def _images(pictures: int, each: int) -> int:
    if pictures % each:
        raise ModelCallError(
            f"{pictures} pictures are no whole images of {each}, a thumbnail and its crops; give all pictures of each image"
        )
    return pictures // each


def _cells(patches: Sequence[int], crops: Sequence[int], bands: bool) -> list[int]:
    """Which crop each patch of the thumbnail belongs to."""
    (height, width), (down, across) = patches, crops
    if bands:
        return [place * down * across // (height * width) for place in range(height * width)]
    return [row * down // height * across + column * across // width for row in range(height) for column in range(width)]
