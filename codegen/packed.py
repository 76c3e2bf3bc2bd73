"""Packed sequences (variable length): several of any lengths one after the other in a row, each attending to itself.

The numbers of the sequences are data. Kernels walk, and the torch lowering visits, the blocks of keys of a block's own sequences
(`codegen.tile_masks`); other lengths run the same kernel, and nothing is asked of the device.
"""

from __future__ import annotations

from dataclasses import replace

import sympy
import torch

from rewrite.ir.expression import tensor
from rewrite.ir.operations import Attend

QUERY_SEGMENTS, KEY_SEGMENTS = "query_segments", "key_segments"


def packed(operation: Attend) -> Attend:
    """The operation with every query seeing only keys of its own sequence, beside what its mask says already.

    It reads two more tensors, query_segments [B, Nq] and key_segments [B, Nk], integers as `segment_ids` gives them; a batch axis of 1 is
    the same packing in every row. A causal mask or a window in positions of the row holds within each sequence, provided that queries and
    keys are packed alike.
    """
    return replace(operation, mask=sympy.And(operation.mask, sympy.Eq(tensor(QUERY_SEGMENTS, "bi"), tensor(KEY_SEGMENTS, "bj"))))


def segment_ids(cu_seqlens: torch.Tensor, length: int) -> torch.Tensor:
    """[1, length] int32: the number of the sequence that each token of a packed row belongs to.

    cu_seqlens [n + 1]: where each sequence begins and the last one ends, increasing from 0, as variable-length attention is given it
    elsewhere; empty sequences are allowed. Tokens behind the end count as one more sequence, n.
    """
    ends = cu_seqlens[1:].contiguous()
    positions = torch.arange(length, dtype=ends.dtype, device=ends.device)
    return torch.searchsorted(ends, positions, right=True, out_int32=True)[None]
