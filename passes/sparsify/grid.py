"""MaxViT's two sparse attentions on the token grid: within blocks, and within grids that span all of it.

Tu et al. 2022, "MaxViT: Multi-Axis Vision Transformer". On a grid of H x W tokens and with size s, the tokens at (r, c) and (r', c')
attend to each other where

    block:  r // s = r' // s  and  c // s = c' // s                           (H / s) * (W / s) windows of s x s neighbours
    grid:   r mod (H / s) = r' mod (H / s)  and  c mod (W / s) = c' mod (W / s)         s x s tokens, H / s and W / s apart

A MaxViT block has one of each, block attention first; "alternate" deals them out to the layers in this order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Self

import sympy
import torch
from sympy.logic.boolalg import Boolean

from passes import layers as layers_
from passes.sparsify.grid_axis import grid_axes, reasons_against
from passes.sparsify.narrowing import attended, narrowed, with_global_tokens
from rewrite.ir import AttentionInputs, Fits, I, J, Pass, Site, parameter, register_pass

Kind = Literal["block", "grid"]


@register_pass
@dataclass(frozen=True)
class Grid(Pass):
    """Block or grid attention on the whole grid of a non-causal site, whose sides must be multiples of `size`.

    Prefix tokens (CLS, registers) are seen by all and see all. The paper's relative position bias is not added: a pretrained model has its
    own positions. The site's own mask holds as well.
    """

    name = "grid"
    family = "sparsify"
    paper = "Tu, Talebi, Zhang, Yang, Milanfar, Bovik, Li: MaxViT: Multi-Axis Vision Transformer, ECCV 2022 (arXiv 2204.01697)"
    formula = "out[i] = sum_{j in P(i)} softmax_{j in P(i)}(score[i,j]) v[j], P(i) = the part of the partition of the grid that i is in"
    fits = Fits(kinds=frozenset({"self"}), causal=False, grid=True)

    size: int | Literal["all"] = parameter(7, 'tokens along a side of a part; "all" is one part, which changes nothing')
    kind: Literal["block", "grid", "alternate"] = parameter(
        "alternate", "neighbours, tokens spread over the grid, or both in turn by layer"
    )
    layers: tuple[int, ...] | None = parameter(None, "the layers of each stack to work on; None is every layer")

    def check(self) -> None:
        self.require(self.size == "all" or self.size >= 1, "size", 'at least 1, or "all"')
        self.require(layers_.are_layers(self.layers), "layers", layers_.RANGE)

    @classmethod
    def identity(cls) -> Self:
        return cls(size="all")

    def declines(self, site: Site) -> str | None:
        return next(self._reasons_against(site), None)

    def _reasons_against(self, site: Site) -> Iterator[str]:
        yield from reasons_against(site, self.layers)
        grid = site.layout.grid or ()
        if self.size != "all" and any(length % self.size for length in grid):
            yield f"its grid of {'x'.join(map(str, grid))} tokens cannot be cut into parts of {self.size}x{self.size}"

    def kind_at(self, site: Site) -> Kind:
        """Which of the two this layer gets: MaxViT begins with blocks."""
        if self.kind == "alternate":
            return "grid" if site.layer % 2 else "block"
        return self.kind

    def transform(self, site: Site) -> Site:
        grid = site.layout.grid
        if self.size == "all" or grid is None or set(grid) == {self.size}:
            return site
        return narrowed(site, self.predicate(self.size, self.kind_at(site), grid, site.layout.prefix))

    def predicate(self, size: int, kind: Kind, grid: tuple[int, ...], prefix: int) -> Boolean:
        """Which (i, j) are in one part, on a grid behind `prefix` tokens."""
        same: list[Boolean] = []
        for axis in grid_axes(grid):
            query, key = axis.coordinate(I - prefix), axis.coordinate(J - prefix)
            if kind == "block":
                same.append(sympy.Eq(sympy.floor(query / size), sympy.floor(key / size)))
            else:
                same.append(sympy.Eq(sympy.Mod(query, axis.length // size), sympy.Mod(key, axis.length // size)))
        return with_global_tokens(sympy.And(*same), prefix)

    def reference(self, attention: AttentionInputs) -> torch.Tensor:
        """Token numbers partitioned as the published code partitions features."""
        (height, width), prefix, keys = attention.site.layout.grid or (), attention.site.layout.prefix, attention.logits.shape[-1]
        if self.size == "all":
            return attended(attention, torch.ones(keys, keys, dtype=torch.bool))
        number = torch.arange(height * width) + prefix
        if self.kind_at(attention.site) == "block":
            parts = number.view(height // self.size, self.size, width // self.size, self.size).permute(0, 2, 1, 3)
        else:
            parts = number.view(self.size, height // self.size, self.size, width // self.size).permute(1, 3, 0, 2)
        seen = torch.zeros(keys, keys, dtype=torch.bool)
        for part in parts.reshape(-1, self.size**2):
            seen[part[:, None], part] = True
        seen[:prefix], seen[:, :prefix] = True, True
        return attended(attention, seen)
