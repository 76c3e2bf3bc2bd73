"""What every emitted backward `launch` function needs besides its kernels."""

from __future__ import annotations

import torch

from codegen.backward_sums import GradientSums
from codegen.block_list import block_list, transposed_block_list
from codegen.launching import broadcast_strides, capability, check_launch, dot_precision
from codegen.tile_list import tile_list, transposed_tile_list
from codegen.tiles import BackwardTiles, backward_tiles, power_of_two
from rewrite.ir.errors import RewriteError

__all__ = [
    "BackwardTiles",
    "GradientSums",
    "backward_tiles",
    "block_list",
    "broadcast_strides",
    "capability",
    "check_gradients",
    "check_launch",
    "dot_precision",
    "power_of_two",
    "tile_list",
    "transposed_block_list",
    "transposed_tile_list",
]


def check_gradients(out: torch.Tensor, d_out: torch.Tensor, given: tuple[torch.Tensor, ...]) -> None:
    """Raise `RewriteError` for a gradient that lies as the kernels do not address it; given: the gradients they write."""
    for name, operand in (("out", out), ("its gradient", d_out)):
        if operand.shape[-1] != 1 and operand.stride(-1) != 1:
            raise RewriteError(f"the last axis of {name} must be contiguous for an attention kernel; call .contiguous() on it")
    if not all(gradient.is_contiguous() for gradient in given):
        raise RewriteError("the gradients of query, key and value must be contiguous for the kernels that write them")
