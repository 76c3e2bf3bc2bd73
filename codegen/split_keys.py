"""Keys cut into equal pieces, so that a few queries keep a whole device busy.

Sanovar et al. 2024, "LeanAttention", and flash decoding: each program walks over one piece of the keys of its tile, and the associative
rule of the online softmax puts the partial results together,

    lse = log(sum_p exp(lse_p)),    out = sum_p exp(lse_p - lse) out_p.

LeanAttention cuts the blocks of all tiles into one equal run for each multiprocessor, across tiles; here every tile is cut into the same
number of pieces, which is as even wherever tiles have equally many keys.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from rewrite.ir.operations import Attend

# Fewer blocks of keys than this are not worth a program and a partial result of their own.
LEAST_BLOCKS = 4


def reason_against_split(attend: Attend) -> str | None:
    """Why the keys of a tile stay with one program, in words, or None."""
    if attend.normaliser != "softmax":
        return "partial results are joined by their log-sum-exp, which only a softmax has"
    if attend.groups is not None:
        return "the weights of groups depend on masses that are known after all keys"
    if attend.sink is not None:
        return "a sink is no part of any piece"
    return None


@lru_cache(maxsize=16)
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def pieces_for(programs: int, key_blocks: int, device: torch.device) -> int:
    """Pieces per tile of queries: as many as fill the device's multiprocessors, one where the tiles alone do."""
    return max(1, min(_multiprocessors(device) // max(1, programs), key_blocks // LEAST_BLOCKS))


def partial_results(out: torch.Tensor, lse: torch.Tensor, pieces: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What the programs write to: [pieces, B, H, Nq, Dv], [pieces, B, H, Nq], float32; for one piece the results themselves."""
    if pieces == 1:
        return out[None], lse[None]
    return out.new_empty(pieces, *out.shape, dtype=torch.float32), lse.new_empty(pieces, *lse.shape)


def join(parts: torch.Tensor, part_lse: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> None:
    """Write out and lse from what `partial_results` made; a query that sees no key in any piece gets zeros and -inf."""
    if len(parts) == 1:
        return
    torch.logsumexp(part_lse, 0, out=lse)
    shares = (part_lse - lse.masked_fill(lse == -torch.inf, 0.0)).exp()
    out.copy_((shares[..., None] * parts).sum(0))
