"""Where tokens can be merged: what passes that merge ask of a stack of layers."""

from __future__ import annotations

import sympy

from passes.prune.choice import at_layer
from rewrite.ir import CHANGES_NOTHING, I, J, Program, Site

# Passes that score or weight the patches of the model: merged tokens are several of them.
EXCLUDED = ("evit", "cls_prune", "cls_ensemble", "dominant_contextual", "hired", "outlier_tokens")


def sites_merged(program: Program, stack: int, layers: tuple[int, ...] | None, first: int) -> list[Site] | str:
    """The sites of the layers of a stack where tokens are to be merged (None: all from the `first` on), or why they cannot be."""
    sites = [site for site in program.sites if site.stack == stack]
    asked = tuple(range(first, max(site.depth for site in sites))) if layers is None else tuple(sorted(layers))
    chosen = [at_layer(program, stack, layer) for layer in asked]
    missing = [layer for layer, site in zip(asked, chosen, strict=True) if site is None]
    read = [site for site in chosen if site is not None]
    if missing or not read:
        return f"its stack has no layer {missing[0] if missing else first} here, where tokens would be merged"
    blocking = next((site for site in sites if site.layer >= read[0].layer and _by_position(site)), None)
    if blocking is not None:
        return f"{blocking.name} {_by_position(blocking)}, and merged tokens have no one position"
    reduced = next((site for site in sites if site.layer >= read[0].layer and site.dims["Nk"] != site.dims["Nq"]), None)
    if reduced is not None:
        return f"{reduced.name} has {reduced.dims['Nk']} keys for its {reduced.dims['Nq']} tokens, of which some would be merged"
    if read[0].dims["Nk"] - read[0].layout.prefix - read[0].layout.suffix < 2:
        return f"it has fewer than two patches, so that merging {CHANGES_NOTHING}"
    return read


def _by_position(site: Site) -> str | None:
    """What a site's attention reads by the position of a token, in words that follow its name; None where it reads nothing so."""
    attends = site.body.attends()
    if any(attend.mask != sympy.true for attend in attends):
        return "is masked"
    read = [name for attend in attends for name, at in attend.tensors().items() if any({I, J} & index.free_symbols for index in at)]
    return f"reads {read[0]} by position" if read else None
