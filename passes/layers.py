"""The parameters `layers` and `stacks` that passes share: which layers of each stack, and which stacks, a pass works on."""

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


def reason_against_stack(stacks: tuple[int, ...] | None, site: Site) -> str | None:
    """Why a site's stack was not asked for, in words, or None."""
    if stacks is None or site.stack in stacks:
        return None
    return f"it is in stack {site.stack}, and stacks={stacks!r} leaves that one out"
