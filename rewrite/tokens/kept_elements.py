"""Masks of the elements of a tensor, bool and of its very shape: True where an element is of a token that stays.

What moves the elements of the tensor moves those of the mask. Which axis holds the channels is not asked until the tensor enters a text.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from rewrite.ir.errors import ModelCallError


def elements_like(mask: Tensor, tensor: Tensor) -> Tensor:
    """The mask for `tensor`, in memory as that is, so that views of the one are views of the other. mask: broadcast to its shape."""
    return torch.empty_like(tensor, dtype=torch.bool).copy_(mask)


def elements_of_patches(stay: Tensor, patches: Tensor) -> Tensor:
    """The mask for patches [..., P, C] of which those stay that `stay` [..., P] says."""
    return elements_like(stay[..., None], patches)


def elements_by_token(mask: Tensor, tensor: Tensor) -> Tensor:
    """The mask for `tensor` [..., C'], which was computed token by token from one with the `mask` [..., C]."""
    return elements_like(tokens_that_stay(mask)[..., None], tensor)


def elements_beside(tensor: Tensor) -> Tensor:
    """The mask for tokens that are no patches: they stay."""
    return torch.ones_like(tensor, dtype=torch.bool)


def elements_padded(mask: Tensor, amounts: list[int]) -> Tensor:
    """The mask for a tensor that was padded by `amounts`, as `torch.nn.functional.pad` says; padding is no patch."""
    return functional.pad(mask, amounts, value=True)


def tokens_that_stay(mask: Tensor) -> Tensor:
    """bool [...]: which tokens stay, from the mask [..., C] of a tensor with the channels on its last axis.

    Raises:
        ModelCallError: a token has channels of one patch that stays and of another that leaves.
    """
    stay = mask.all(-1)
    if not torch.equal(stay, mask.any(-1)):
        raise ModelCallError(
            "the visual tokens of this text are no single patches: one of them has channels of a patch that a pass keeps and of one that "
            "leaves; use a pass that looks at the language model alone"
        )
    return stay


def all_tokens_that_stay(mask: Tensor) -> Tensor:
    """bool [n]: which of the tokens [..., C] stay, one after the other, from the mask of their elements."""
    return tokens_that_stay(mask).flatten()


def stay_at_places(visual: Tensor, stay: Tensor) -> Tensor:
    """`stay`, bool [n] of all features in order, for which there are as many places in the text; visual: bool [B, N].

    Raises:
        ModelCallError: there are more features than places for them, or fewer.
    """
    places = int(visual.sum())
    if places != stay.numel():
        raise ModelCallError(f"there are {stay.numel()} features of pictures and {places} places for them in the text; give as many")
    return stay
