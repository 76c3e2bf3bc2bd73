"""Sparse attention as a mask: the pairs that a pass leaves, besides those that the site hides already."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import sympy
import torch
from sympy.logic.boolalg import Boolean

from passes import layers as layers_
from rewrite.ir import NK, NQ, Attend, AttentionInputs, I, J, Site
from rewrite.ir.passes import is_causal

# Where query i lies among the keys: queries are aligned with the last keys, those before them being in a KV cache.
QUERY_POSITION = I + NK - NQ


def narrowed(site: Site, seen: Boolean) -> Site:
    """The site with the pairs (i, j) of `seen` left of those that it had."""
    operations = (
        replace(operation, mask=sympy.And(operation.mask, seen)) if isinstance(operation, Attend) else operation
        for operation in site.body.operations
    )
    return site.with_operations(*operations)


def with_global_tokens(near: Boolean, number: int, query: sympy.Expr = I) -> Boolean:
    """`near`, and the first `number` tokens (CLS, registers, sinks) see all and are seen by all."""
    return sympy.Or(sympy.Lt(query, number), sympy.Lt(J, number), near) if number else near


def reasons_against_layer(site: Site, layers: tuple[int, ...] | None) -> Iterator[str]:
    """What speaks against changing a site's mask at all, in words: a layer that was not asked for, or several attentions."""
    if reason := layers_.reason_against(layers, site):
        yield reason
    if len(site.body.attends()) != 1:
        yield f"an earlier pass made {len(site.body.attends())} attentions of it"


def reasons_against(site: Site, layers: tuple[int, ...] | None) -> Iterator[str]:
    """What speaks against narrowing by positions, in words: the above, and queries whose positions are not known."""
    yield from reasons_against_layer(site, layers)
    if is_causal(site):
        return
    queries, keys = site.dims["Nq"], site.dims["Nk"]
    if site.cached:
        yield f"it reads a KV cache of {keys} keys and its mask was not found to be causal"
    if queries != keys:
        yield f"it has {queries} queries and {keys} keys, and windows need one position per token"


def attended(attention: AttentionInputs, seen: torch.Tensor) -> torch.Tensor:
    """[B, H, Nq, Dv]: the site's attention with the pairs `seen` [..., Nq, Nk] alone; rows that see nothing give zeros. For references."""
    logits = attention.logits.masked_fill(~seen.to(attention.logits.device), -torch.inf)
    return logits.softmax(-1).nan_to_num(0.0) @ attention.value
