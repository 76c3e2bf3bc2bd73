"""What linear attention asks of a site: plain softmax attention whose score is a number times the dot product."""

from __future__ import annotations

from collections.abc import Iterator

import sympy

from passes import layers as layers_
from rewrite.ir import QK, B, Site, tensors_in


def reasons_against(site: Site, layers: tuple[int, ...] | None, drop_bias: bool = False) -> Iterator[str]:
    """What speaks against replacing a site's softmax by a product of features, in words.

    drop_bias: what the score adds by position is going to be dropped, and is no reason; what it adds row by row of a batch may be padding,
    or windows of a grid, and is one all the same.
    """
    if reason := layers_.reason_against(layers, site):
        yield reason
    if not site.is_plain:
        yield f"an earlier pass changed it: it is made of {len(site.body.operations)} operations"
        return
    score, scale = site.attend.score, site.scale
    if drop_bias and not reads_rows(score - scale * QK):
        score = scale * QK
    if not scale.is_number or score != scale * QK or scale == 0:
        yield f"its score is {score}, not a number times qk: features of queries and keys have no place for the rest"


def reads_rows(rest: sympy.Expr) -> bool:
    """Whether what a score adds to the product of queries and keys depends on these, or on the row of the batch."""
    rest = sympy.expand(rest)
    return bool(rest.has(QK) or any(B in place.free_symbols for places in tensors_in(rest).values() for place in places))
