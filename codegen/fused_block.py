"""torch's fused attention on one block of queries: softmax(scale * qk + rest), with what the IR asks of it beside."""

from __future__ import annotations

import sympy
import torch

from codegen.score_block import ScoreBlock
from codegen.visits import Visit


def fused_block(
    block: ScoreBlock, operands: tuple[torch.Tensor, torch.Tensor, torch.Tensor], scale: float, rest: sympy.Expr
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [B, H, rows, D], lse [B, H, rows]) of the block's own query [B, H, rows, D], key and value [B, Hkv, columns, D]."""
    query = operands[0]
    key, value = (_every_head(operand, query.shape[1]) for operand in operands[1:])
    bias, causal = _bias(block, rest, query.dtype), isinstance(block.visit, Visit) and block.visit.causal
    out, lse = fused_attention((query, key, value), bias, causal, scale)
    if block.attend.sink is not None:
        out, lse = _with_sink(out, lse, block.filled(block.attend.sink, lse[..., None])[..., 0])
    return out, lse


def fused_attention(
    operands: tuple[torch.Tensor, torch.Tensor, torch.Tensor], bias: torch.Tensor | None, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [B, H, n, D], lse [B, H, n]) of query [B, H, n, D], key and value [B, H, m, D]; bias [1 or B, 1 or H, 1 or n, 1 or m].

    A row that sees no key gives zeros and -inf. Where causal, the bias is the same for all queries.
    """
    query, key, value = operands
    spread = None if bias is None else bias.expand(*bias.shape[:2], query.shape[2], key.shape[2])
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, attn_mask=spread, is_causal=causal, scale=scale
    )
    # Rows that see no key come back with whatever log-sum-exp the operator likes; only then is the bias looked through.
    if spread is not None and bool(((lse == 0) | ~lse.isfinite()).any()):
        # Under a causal mask the bias hides every key up to the query's own.
        empty = (spread[:, :, 0] > -torch.inf).cumsum(-1) == 0 if causal else spread.amax(-1) == -torch.inf
        out, lse = out.masked_fill(empty[..., None], 0.0), lse.masked_fill(empty, -torch.inf)
    return out, lse


def _every_head(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """[B, Hkv, n, D] -> [B, H, n, D], each key head repeated for the query heads that share it."""
    return tensor if tensor.shape[1] == heads else tensor.repeat_interleave(heads // tensor.shape[1], dim=1)


def _bias(block: ScoreBlock, rest: sympy.Expr, dtype: torch.dtype) -> torch.Tensor | None:
    """What is added to the scaled dot product, [1 or B, 1 or H, 1 or rows, 1 or columns]; None for nothing."""
    bias, hidden = None, block.hidden()
    if rest != 0:
        bias = torch.as_tensor(block.evaluate(rest), dtype=dtype, device=block.values["i"].device)
        bias = bias.view((1,) * (4 - bias.dim()) + bias.shape)
    if hidden is None:
        return bias
    hidden = hidden.view((1,) * (4 - hidden.dim()) + hidden.shape)
    none = torch.zeros((), dtype=dtype, device=hidden.device)
    return torch.where(hidden, -torch.inf, none if bias is None else bias)


def _with_sink(out: torch.Tensor, lse: torch.Tensor, sink: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A softmax without a sink, as the one with: out [B, H, n, Dv] shrinks by what the logit sink [B, H, n] adds to the normaliser."""
    total = torch.logaddexp(lse, sink).masked_fill(lse == -torch.inf, -torch.inf)
    share = (lse - total).exp().masked_fill(lse == -torch.inf, 0.0)
    return (out * share[..., None]).to(out.dtype), total
