"""What every emitted `launch` function needs besides its kernel."""

from __future__ import annotations

import torch

from codegen.block_list import block_list
from codegen.split_keys import list_owners, partial_results, units_for
from codegen.tile_list import tile_list
from codegen.tiles import Tile, power_of_two, tile_for
from rewrite.ir.errors import RewriteError

__all__ = [
    "Tile",
    "block_list",
    "broadcast_strides",
    "capability",
    "check_launch",
    "dot_precision",
    "list_owners",
    "partial_results",
    "power_of_two",
    "tile_for",
    "tile_list",
    "units_for",
]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Where Triton interprets, on a CPU, any tile will do; this is the one that kernels are compiled for by default.
_INTERPRETED = 90


def capability(device: torch.device) -> int:
    """Of a CUDA device, 90 for sm_90 and so on."""
    if device.type != "cuda":
        return _INTERPRETED
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def broadcast_strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """The tensor's strides, 0 along every axis of size 1, so that it is read as if it had the full size there."""
    return tuple(0 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def dot_precision(dtype: torch.dtype) -> str:
    """How tl.dot multiplies float32: exactly, or in TF32 where torch was allowed to (`torch.set_float32_matmul_precision`)."""
    allowed = dtype != torch.float32 or torch.get_float32_matmul_precision() != "highest"
    return "tf32" if allowed else "ieee"


def check_launch(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor | None = None) -> None:
    """Raise `RewriteError` for operands a kernel cannot take: a dtype it has no arithmetic for, or head vectors that lie scattered."""
    given = {"query": query, "key": key} | ({} if value is None else {"value": value})
    dtypes = [operand.dtype for operand in given.values()]
    if query.dtype not in _DTYPES or len(set(dtypes)) > 1:
        *others, last = given
        raise RewriteError(
            f"an attention kernel takes {', '.join(others)} and {last} of one dtype out of float32, float16 and bfloat16, "
            f"not {', '.join(map(str, dtypes[:-1]))} and {dtypes[-1]}; cast them first"
        )
    for name, operand in given.items():
        if operand.shape[-1] != 1 and operand.stride(-1) != 1:
            raise RewriteError(f"the last axis of {name} must be contiguous for an attention kernel; call .contiguous() on it")
