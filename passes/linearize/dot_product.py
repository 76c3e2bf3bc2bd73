"""What linear attention asks of a site: plain softmax attention whose score is a number times the dot product."""

from __future__ import annotations

from collections.abc import Iterator

from passes import layers as layers_
from rewrite.ir import QK, Site


def reasons_against(site: Site, layers: tuple[int, ...] | None) -> Iterator[str]:
    """What speaks against replacing a site's softmax by a product of features, in words."""
    if reason := layers_.reason_against(layers, site):
        yield reason
    if not site.is_plain:
        yield f"an earlier pass changed it: it is made of {len(site.body.operations)} operations"
        return
    score, scale = site.attend.score, site.scale
    if not scale.is_number or score != scale * QK or scale == 0:
        yield f"its score is {score}, not a number times qk: features of queries and keys have no place for the rest"
