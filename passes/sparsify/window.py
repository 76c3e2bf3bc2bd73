"""Sliding window attention with tokens that everyone sees.

Beltagy et al. 2020, "Longformer", and Xiao et al. 2024, "Efficient Streaming Language Models with Attention Sinks" (StreamingLLM), whose
finding is that a sliding window alone fails in a language model, because attention sinks into the first tokens; with these kept in sight
the model goes on. Along the sequence of tokens, with query i, key j and the first `sinks` tokens global:

    causal site:  i sees j  if  i - window < j <= i   or  j < sinks
    any other:    i sees j  if  |i - j| <= window // 2  or  j < sinks  or  i < sinks
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Self

import sympy
import torch
from sympy.logic.boolalg import Boolean

from passes import layers as layers_
from passes.sparsify.narrowing import QUERY_POSITION, attended, narrowed, reasons_against, with_global_tokens
from rewrite.ir import AttentionInputs, Fits, J, Pass, Site, parameter, register_pass
from rewrite.ir.passes import is_causal


@register_pass
@dataclass(frozen=True)
class Window(Pass):
    """A window along the sequence: the last `window` keys up to the query in a causal site, half of them on either side in any other.

    A window is cut where it would leave the sequence. A site with a grid is taken in raster order. Outside causal sites global tokens see
    all as well, as Longformer has it; a site's prefix tokens (CLS, registers) are global in any case, and `sinks` counts them. Tokens keep
    their positions and the KV cache its keys: StreamingLLM's eviction, and its positions inside the cache, are not part of this. The
    site's own mask holds as well, so that a padded row has its padding among its first tokens.
    """

    name = "window"
    family = "sparsify"
    paper = (
        "Beltagy, Peters, Cohan: Longformer, 2020 (arXiv 2004.05150); Xiao, Tian, Chen, Han, Lewis: Efficient Streaming Language Models "
        "with Attention Sinks, ICLR 2024 (arXiv 2309.17453)"
    )
    formula = "out[i] = sum_{j near i or j < sinks} softmax_{j near i or j < sinks}(score[i,j]) v[j]; causal: i - window < j <= i"
    fits = Fits(kinds=frozenset({"self"}))

    window: int | Literal["all"] = parameter(512, 'keys of a causal window, twice the reach of any other; "all" changes nothing')
    sinks: int = parameter(4, "first tokens that all queries see")
    layers: tuple[int, ...] | None = parameter(None, "the layers of each stack to work on; None is every layer")

    def check(self) -> None:
        self.require(self.window == "all" or self.window >= 1, "window", 'at least 1, or "all"')
        self.require(self.sinks >= 0, "sinks", "at least 0")
        self.require(layers_.are_layers(self.layers), "layers", layers_.RANGE)

    @classmethod
    def identity(cls) -> Self:
        return cls(window="all")

    def declines(self, site: Site) -> str | None:
        return next(self._reasons_against(site), None)

    def _reasons_against(self, site: Site) -> Iterator[str]:
        yield from reasons_against(site, self.layers)
        # Tokens behind a grid go on with its sequence.
        if site.layout.partial is not None and (site.layout.window is not None or not site.layout.raster):
            yield site.layout.partial

    def transform(self, site: Site) -> Site:
        return site if self.window == "all" else narrowed(site, self.predicate(site, self.window))

    def predicate(self, site: Site, window: int) -> Boolean:
        """Which (i, j) a window of that many keys leaves."""
        if is_causal(site):
            near = sympy.Gt(J, QUERY_POSITION - window)
        else:
            near = sympy.And(sympy.Ge(J, QUERY_POSITION - window // 2), sympy.Le(J, QUERY_POSITION + window // 2))
        return with_global_tokens(near, self._global(site), QUERY_POSITION)

    def _global(self, site: Site) -> int:
        return max(self.sinks, site.layout.prefix)

    def reference(self, attention: AttentionInputs) -> torch.Tensor:
        """A band of the map, with the first rows and columns."""
        queries, keys = attention.logits.shape[-2:]
        seen = torch.ones(keys, keys, dtype=torch.bool)
        if self.window != "all":
            behind, ahead = (self.window - 1, 0) if is_causal(attention.site) else (self.window // 2, self.window // 2)
            seen = seen.tril(ahead).triu(-behind)
            seen[: self._global(attention.site)], seen[:, : self._global(attention.site)] = True, True
        return attended(attention, seen[keys - queries :])
