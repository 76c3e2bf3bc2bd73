"""Whether the operands of an operator fit the operation that it is given."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from rewrite.ir.errors import RewriteError
from rewrite.ir.expression import Indices, letters
from rewrite.ir.operations import HeadMix


def require_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    """`RewriteError` unless the three are [B, H, Nq, D], [B, Hkv, Nk, D] and [B, Hkv, Nk, Dv] of one dtype, with H a multiple of Hkv."""
    if not query.dtype == key.dtype == value.dtype:
        raise RewriteError(f"query, key and value are {query.dtype}, {key.dtype} and {value.dtype}; cast them to one dtype")
    if (
        query.shape[1] % key.shape[1]
        or key.shape[:3] != value.shape[:3]
        or query.shape[3] != key.shape[3]
        or query.shape[0] != key.shape[0]
    ):
        raise RewriteError(
            f"query {list(query.shape)}, key {list(key.shape)} and value {list(value.shape)} are no [B, H, Nq, D], [B, Hkv, Nk, D] and "
            f"[B, Hkv, Nk, Dv] with H a multiple of Hkv"
        )


def named_operands(
    indices_of: Mapping[str, Indices],
    mixes: Iterable[HeadMix],
    operands: tuple[torch.Tensor, torch.Tensor],
    tensors: Sequence[torch.Tensor],
) -> dict[str, torch.Tensor]:
    """The tensors by name. operands: query and key. Raises `RewriteError` where a tensor is missing or not of the axes it is read at."""
    query, key = operands
    sizes = {"b": query.shape[0], "h": query.shape[1], "i": query.shape[2], "j": key.shape[2]}
    if len(tensors) != len(indices_of):
        raise RewriteError(f"the operation reads {len(indices_of)} tensors ({', '.join(indices_of)}), and {len(tensors)} were given")
    mixing = {name for mix in mixes for name in (mix.matrix, mix.bias)}
    for (name, indices), operand in zip(indices_of.items(), tensors, strict=True):
        if name in mixing:
            wanted, fits = [f"heads={query.shape[1]}"] * len(indices), operand.shape == (query.shape[1],) * len(indices)
        elif (axes := letters(indices)) is not None:
            wanted = [f"{axis}={sizes[axis]}" for axis in axes]
            fits = operand.dim() == len(axes) and all(size in (1, sizes[axis]) for axis, size in zip(axes, operand.shape, strict=True))
        else:
            wanted, fits = [f"any, read at {index}" for index in indices], operand.dim() == len(indices) and 0 not in operand.shape
        if not fits:
            every = "" if name in mixing else ", each of that size or 1"
            raise RewriteError(f"{name} is {list(operand.shape)}; its axes are [{', '.join(wanted)}]{every}")
    return dict(zip(indices_of, tensors, strict=True))
