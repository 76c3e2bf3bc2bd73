"""HaloNet attention: blocks of the token grid, each with a halo of keys around it.

Vaswani et al. 2021, "Scaling Local Self-Attention for Parameter Efficient Visual Backbones". The grid is cut into blocks of b x b tokens;
with query i at (r, c), every query of its block sees the same keys,

    rows     b * (r // b) - h  <=  row     <  b * (r // b) + b + h
    columns  b * (c // b) - h  <=  column  <  b * (c // b) + b + h

as far as the grid goes. The common unofficial implementation has its padding mask inverted; this follows the paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

import sympy
import torch
from sympy.logic.boolalg import Boolean

from passes import layers as layers_
from passes.sparsify.grid_axis import grid_axes, reasons_against
from passes.sparsify.narrowing import attended, narrowed, with_global_tokens
from rewrite.ir import AttentionInputs, Fits, I, J, Pass, Site, parameter, register_pass


@register_pass
@dataclass(frozen=True)
class Halo(Pass):
    """Blocks with a halo, on the whole grid of a non-causal site. Blocks and halos are cut at the grid's borders.

    Prefix tokens (CLS, registers) are seen by all and see all. The paper's relative position logits are not added: a pretrained model has
    its own positions. The site's own mask holds as well.
    """

    name = "halo"
    family = "sparsify"
    paper = (
        "Vaswani, Ramachandran, Srinivas, Parmar, Hechtman, Shlens: Scaling Local Self-Attention (HaloNet), CVPR 2021 (arXiv 2103.12731)"
    )
    formula = "out[i] = sum_{j in N(i)} softmax_{j in N(i)}(score[i,j]) v[j], N(i) = the block of i and the tokens within halo of it"
    fits = Fits(kinds=frozenset({"self"}), causal=False, grid=True)

    block: int | Literal["all"] = parameter(8, 'tokens along a side of a block; "all" is one block, which changes nothing')
    halo: int = parameter(4, "tokens around a block that its queries see too")
    layers: tuple[int, ...] | None = parameter(None, "the layers of each stack to work on; None is every layer")

    def check(self) -> None:
        self.require(self.block == "all" or self.block >= 1, "block", 'at least 1, or "all"')
        self.require(self.halo >= 0, "halo", "at least 0")
        self.require(layers_.are_layers(self.layers), "layers", layers_.RANGE)

    @classmethod
    def identity(cls) -> Self:
        return cls(block="all")

    def declines(self, site: Site) -> str | None:
        return next(reasons_against(site, self.layers), None)

    def transform(self, site: Site) -> Site:
        grid = site.layout.grid
        if self.block == "all" or grid is None or self.block >= max(grid):
            return site
        return narrowed(site, self.predicate(self.block, grid, site.layout.prefix))

    def predicate(self, block: int, grid: tuple[int, ...], prefix: int) -> Boolean:
        """Which (i, j) lie in one block and its halo, on a grid behind `prefix` tokens."""
        near = []
        for axis in grid_axes(grid):
            first = block * sympy.floor(axis.coordinate(I - prefix) / block)
            near.append(axis.between(J - prefix, sympy.Max(first - self.halo, 0), sympy.Min(first + block + self.halo, axis.length)))
        return with_global_tokens(sympy.And(*near), prefix)

    def reference(self, attention: AttentionInputs) -> torch.Tensor:
        """Block by block."""
        grid, prefix, keys = attention.site.layout.grid or (), attention.site.layout.prefix, attention.logits.shape[-1]
        if self.block == "all":
            return attended(attention, torch.ones(keys, keys, dtype=torch.bool))
        height, width = grid
        seen = torch.zeros(keys, keys, dtype=torch.bool)
        number = torch.arange(height * width).view(height, width) + prefix
        for top in range(0, height, self.block):
            for left in range(0, width, self.block):
                queries = number[top : top + self.block, left : left + self.block].flatten()
                rows = slice(max(0, top - self.halo), top + self.block + self.halo)
                columns = slice(max(0, left - self.halo), left + self.block + self.halo)
                seen[queries[:, None], number[rows, columns].flatten()] = True
        seen[:prefix], seen[:, :prefix] = True, True
        return attended(attention, seen)
