"""The `layers` parameter that per-layer passes share: which layers of each stack a pass works on."""

from __future__ import annotations

from rewrite.ir import Site

RANGE = "layer numbers from 0, each once, or None for every layer"


def are_layers(layers: tuple[int, ...] | None) -> bool:
    """True for None and for distinct numbers from 0."""
    return layers is None or (len(layers) > 0 and min(layers) >= 0 and len(set(layers)) == len(layers))


def reason_against(layers: tuple[int, ...] | None, site: Site) -> str | None:
    """Why a site's layer was not asked for, in words, or None."""
    if layers is None or site.layer in layers:
        return None
    return f"it is layer {site.layer}, and layers={layers!r} leaves that one out"
