"""The token operations that a rewritten graph calls at run time: take, put back, and where the kept tokens are.

With positions p[b, k] (int64, ascending in k) of the tokens that are left, along one token axis of length N:

    gather_tokens:   y[b, k] = x[b, p[b, k]]                       [B, N, ...] -> [B, K, ...]
    scatter_tokens:  x[b, p[b, k]] = y[b, k], zero elsewhere       [B, K, ...] -> [B, N, ...]

Both are differentiable, and each is the other's transpose. Every function here is plain torch, or a registered operator with a fake
implementation, so that Dynamo, AOTAutograd and Inductor trace through without a graph break.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from rewrite.ir.errors import ModelCallError


def gather_tokens(tensor: Tensor, positions: Tensor, axis: int, *, batch_axis: int | None = 0, rows: int = 1) -> Tensor:
    """The tokens at `positions` [B, K] along `axis` of `tensor`; the axis has length K afterwards.

    `batch_axis` says which axis of `tensor` is the batch. It has size B * rows, the batch running slowest, or size 1, which is
    broadcast first. Where it is `axis` itself, the tensor has no batch axis and gets one in front: [N, D] -> [B, K, D]. `None` says that
    the batch size is one and the tensor has no such axis: the first row of `positions` is used.
    """
    axis = axis % tensor.dim()
    if batch_axis is None:
        return tensor.index_select(axis, positions[0])
    batch_axis = batch_axis % tensor.dim()
    if batch_axis == axis:
        tensor, axis, batch_axis = tensor.unsqueeze(0), axis + 1, 0
    index = positions.repeat_interleave(rows, 0) if rows > 1 else positions
    shape = list(tensor.shape)
    shape[batch_axis] = index.shape[0]
    tensor = tensor.expand(shape)
    if (batch_axis, axis) == (0, 1) and tensor.dim() > 2:
        # Whole tokens are copied, up to ten times as fast as entry by entry.
        starts = torch.arange(index.shape[0], device=index.device, dtype=index.dtype) * shape[1]
        return tensor.flatten(0, 1).index_select(0, (index + starts[:, None]).flatten()).view(*index.shape, *shape[2:])
    shape[axis] = index.shape[1]
    return tensor.gather(axis, _aligned(index, tensor.dim(), axis, batch_axis).expand(shape))


def scatter_tokens(
    tensor: Tensor,
    positions: Tensor,
    axis: int,
    length: int,
    *,
    batch_axis: int | None = 0,
    rows: int = 1,
    fused: bool = False,
    into: Tensor | None = None,
) -> Tensor:
    """Zeros of length `length` along `axis`, with the K tokens of `tensor` at `positions` [B, K]; the inverse of `gather_tokens`.

    fused: tokens at position `length` are none of the axis, or padding, and are left out. into: what stands at all other places, instead of
    zeros.
    """
    axis = axis % tensor.dim()
    shape = list(tensor.shape)
    shape[axis] = length + int(fused)
    if into is None:
        full = tensor.new_zeros(shape)
    else:
        full = functional.pad(into, (0, 0) * (tensor.dim() - 1 - axis) + (0, 1)) if fused else into
        full = full.to(tensor.dtype)
    if batch_axis is None:
        full = full.index_copy(axis, positions[0], tensor)
    else:
        index = positions.repeat_interleave(rows, 0) if rows > 1 else positions
        index = _aligned(index, tensor.dim(), axis, batch_axis % tensor.dim()).expand(tensor.shape)
        full = full.scatter(axis, index, tensor)
    return full.narrow(axis, 0, length) if fused else full


def join_positions(positions: Sequence[Tensor | None], lengths: Sequence[int]) -> Tensor:
    """Positions [B, sum K_i] in a concatenation along the token axis of parts of `lengths` tokens, of which `positions[i]` are left.

    A part of which every token is left has `None`; at least one part has positions.
    """
    known = next(part for part in positions if part is not None)
    joined: list[Tensor] = []
    start: int = 0
    for part, length in zip(positions, lengths, strict=True):
        every = torch.arange(length, device=known.device, dtype=known.dtype).expand(known.shape[0], -1) if part is None else part
        joined.append(every + start)
        start = start + length
    return torch.cat(joined, 1)


def positions_between(positions: Tensor, first: int, last: int) -> Tensor:
    """Positions [B, K - first - last] in the axis without its `first` first and `last` last tokens, which all are at the first and the last
    places of `positions` [B, K]."""
    return positions[:, first : positions.shape[1] - last] - first


def present_between(present: Tensor, first: int, last: int) -> Tensor:
    """bool [B, K - first - last], likewise, of `present` [B, K]."""
    return present[:, first : present.shape[1] - last]


def places_of_present(positions: Tensor, present: Tensor, length: int) -> Tensor:
    """`positions` [B, K] of the tokens that are `present` [B, K], and `length` for padding."""
    return torch.where(present, positions, length)


def flatten_positions(positions: Tensor, length: int) -> Tensor:
    """Positions [1, B * K] in the axis of length B * N that batch and tokens are merged to, from `positions` [B, K] of N = `length`."""
    starts = torch.arange(positions.shape[0], device=positions.device, dtype=positions.dtype) * length
    return (positions + starts[:, None]).reshape(1, -1)


def kept_positions(visual_mask: Tensor, kept: int) -> Tensor:
    """Positions [B, kept] (int64, ascending) of the tokens that stay, from `visual_mask` [B, N] bool: the visual ones that leave.

    Every row must hold exactly N - kept of these. That is checked when it runs, compiled or not.

    Raises:
        ModelCallError: a row holds another number of visual tokens; the message gives the numbers found.
    """
    return torch.ops.rewrite.kept_positions(visual_mask, kept)  # type: ignore[no-any-return]


# The check and the positions are one operator: its result is used, so no compiler may drop or postpone the check.
@torch.library.custom_op("rewrite::kept_positions", mutates_args=())
def _kept_positions(visual_mask: Tensor, kept: int) -> Tensor:
    if visual_mask.dim() != 2 or visual_mask.dtype != torch.bool:
        raise ModelCallError(f"the mask of visual tokens must be bool [B, N], not {visual_mask.dtype} {list(visual_mask.shape)}")
    counts = visual_mask.sum(1).tolist()
    wanted = visual_mask.shape[1] - kept
    if any(count != wanted for count in counts):
        raise ModelCallError(
            "every row of a batch must hold the same number of visual tokens where these leave, and the number it was compiled for: "
            f"expected {wanted} of {visual_mask.shape[1]} tokens in each row, found {counts}; "
            "batch samples with equal numbers of image tokens together, run them one by one, or use backend='eager', where rows may differ"
        )
    return visual_mask.to(torch.uint8).argsort(dim=1, stable=True)[:, :kept].contiguous()


@_kept_positions.register_fake
def _(visual_mask: Tensor, kept: int) -> Tensor:
    return visual_mask.new_empty((visual_mask.shape[0], kept), dtype=torch.int64)


def _aligned(index: Tensor, dim: int, axis: int, batch_axis: int) -> Tensor:
    """`index` [B, K] with B on `batch_axis` and K on `axis` of a tensor of `dim` axes, ones elsewhere."""
    if batch_axis > axis:
        index = index.transpose(0, 1)
    shape = [1] * dim
    shape[min(axis, batch_axis)], shape[max(axis, batch_axis)] = index.shape
    return index.reshape(shape)
