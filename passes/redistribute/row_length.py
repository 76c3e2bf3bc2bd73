"""The number of keys that a query's position admits: what methods scale scores by that call it the length of a row.

    row_len(i) = i + Nk - Nq + 1   in a causal site, where queries are aligned with the last keys, those before them being in a KV cache
                 Nk                in any other

Positions alone count: padding, and keys that a window hides, are in it. A decoding step has the row length that the same query has in a
forward over the whole sequence.
"""

from __future__ import annotations

import sympy
import torch

from rewrite.ir import NK, NQ, I, Site
from rewrite.ir.passes import is_causal


def row_length(site: Site) -> sympy.Expr:
    """row_len(i), in a site that `reason_against` has nothing against."""
    return I + NK - NQ + 1 if is_causal(site) else NK


def reason_against(site: Site) -> str | None:
    """Why a site's row lengths are not known, in words, or None."""
    if site.cached and not is_causal(site):
        return f"it reads a KV cache of {site.dims['Nk']} keys and its mask was not found to be causal: row lengths are unknown"
    return None


def row_lengths(site: Site, logits: torch.Tensor) -> torch.Tensor:
    """[Nq, 1], in the dtype of the logits [B, H, Nq, Nk]: what `row_length` means, counted out."""
    queries, keys = logits.shape[-2:]
    seen = torch.ones(queries, keys, dtype=logits.dtype, device=logits.device)
    return (seen.tril(keys - queries) if is_causal(site) else seen).sum(-1, keepdim=True)
