"""torch's fused attention on one block of queries: softmax(scale * qk + rest), with what the IR asks of it beside."""

from __future__ import annotations

import sympy
import torch

from codegen.score_block import ScoreBlock


def fused_block(
    block: ScoreBlock, operands: tuple[torch.Tensor, torch.Tensor, torch.Tensor], scale: float, rest: sympy.Expr
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [B, H, rows, D], lse [B, H, rows]) of the block's own query [B, H, rows, D], key and value [B, Hkv, columns, D]."""
    query = operands[0]
    key, value = (_every_head(operand, query.shape[1]) for operand in operands[1:])
    bias = _bias(block, rest, query.dtype)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, attn_mask=bias, scale=scale)
    # Rows that see no key come back with whatever log-sum-exp the operator likes; only then is the bias looked through.
    if bias is not None and bool(((lse == 0) | ~lse.isfinite()).any()):
        empty = bias.amax(-1) == -torch.inf
        out, lse = out.masked_fill(empty[..., None], 0.0), lse.masked_fill(empty, -torch.inf)
    if block.attend.sink is not None:
        out, lse = _with_sink(out, lse, block.filled(block.attend.sink, lse[..., None])[..., 0])
    return out, lse


def _every_head(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """[B, Hkv, n, D] -> [B, H, n, D], each key head repeated for the query heads that share it."""
    batch, key_heads, n, width = tensor.shape
    shared = tensor[:, :, None].expand(batch, key_heads, heads // key_heads, n, width)
    return tensor if key_heads == heads else shared.reshape(batch, heads, n, width)


def _bias(block: ScoreBlock, rest: sympy.Expr, dtype: torch.dtype) -> torch.Tensor | None:
    """What is added to the scaled dot product, [1 or B, 1 or H, rows, columns]; None for nothing."""
    size = (block.values["i"].shape[2], block.values["j"].shape[3])
    bias = None
    if rest != 0:
        bias = torch.as_tensor(block.evaluate(rest), dtype=dtype, device=block.values["i"].device)
        bias = bias.view((1,) * (4 - bias.dim()) + bias.shape)
        bias = bias.expand(*bias.shape[:2], *size)
    hidden = block.hidden()
    if hidden is None:
        return bias
    hidden = hidden.view((1,) * (4 - hidden.dim()) + hidden.shape)
    if bias is None:
        return torch.zeros(*hidden.shape[:2], *size, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)
    return bias.masked_fill(hidden, -torch.inf)


def _with_sink(out: torch.Tensor, lse: torch.Tensor, sink: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A softmax without a sink, as the one with: out [B, H, n, Dv] shrinks by what the logit sink [B, H, n] adds to the normaliser."""
    total = torch.logaddexp(lse, sink).masked_fill(lse == -torch.inf, -torch.inf)
    share = (lse - total).exp().masked_fill(lse == -torch.inf, 0.0)
    return (out * share[..., None]).to(out.dtype), total
