"""Heads mixed into each other on one block of queries, and the gradient of that.

mixed[b,g,i,j] = sum_h matrix[g,h] x[b,h,i,j] + bias[g]
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from rewrite.ir.operations import HeadMix


def _by_head(matrix: torch.Tensor, terms: torch.Tensor) -> torch.Tensor:
    """matrix [G, H], terms [B, H, n, m] -> [B, G, n, m]: one matrix product, the pairs of a block side by side."""
    return (matrix @ terms.flatten(2)).view(terms.shape[0], matrix.shape[0], *terms.shape[2:])


def mix_heads(mix: HeadMix | None, terms: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """terms [B, H, n, m] mixed; unchanged for None."""
    if mix is None:
        return terms
    mixed = _by_head(tensors[mix.matrix].to(terms.dtype), terms)
    return mixed if mix.bias is None else mixed.add_(tensors[mix.bias].to(terms.dtype).view(-1, 1, 1))


def mix_gradients(
    mix: HeadMix, received: torch.Tensor, terms: torch.Tensor, tensors: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(gradient of terms [B, H, n, m], gradients of the matrix [H, H] and of the bias [H] by name); received: that of the mixed terms."""
    d_matrix = (received.flatten(2) @ terms.flatten(2).transpose(-2, -1)).sum(0)
    found = {mix.matrix: d_matrix} if mix.bias is None else {mix.matrix: d_matrix, mix.bias: received.sum((0, 2, 3))}
    return _by_head(tensors[mix.matrix].to(received.dtype).T, received), found
