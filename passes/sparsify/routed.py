"""Bi-level routing attention: regions of the grid choose the regions that they attend to.

Zhu et al. 2023, "BiFormer: Vision Transformer with Bi-Level Routing Attention". The grid is cut into R equal regions. With q_r and k_s the
mean query of region r and the mean key of region s, over all channels of all heads,

    routes(r)  =  the topk regions s of the greatest  q_r . k_s                      one choice for all heads, without a gradient
    out[i]     =  sum_j softmax_j(score[i,j]) v[j]     over the tokens j of the regions in routes(region of i)
    out[i]    +=  DWC(v)[i]                            LePE, a depthwise 5 x 5 convolution, where it is asked for

The released code scales scores by the width of all heads together, "to be consistent with old models" (scale="all"); a site keeps its own
scale otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, Self

import sympy
import torch
from sympy.logic.boolalg import Boolean
from torch.nn import functional

from passes import layers as layers_
from passes.sparsify import grid_axis
from passes.sparsify.narrowing import attended, with_global_tokens
from rewrite.ir import (
    QK,
    Attend,
    AttentionInputs,
    B,
    BlockChoice,
    DepthwiseConv,
    Fits,
    I,
    J,
    Parameter,
    Pass,
    RegionRoutes,
    Site,
    Sum,
    parameter,
    read,
    register_pass,
)

ROUTES = "region_routes"

# side_dwconv of the published models.
KERNEL_SIZE = 5


@register_pass
@dataclass(frozen=True)
class Routed(Pass):
    """Queries attend to the tokens of the `topk` regions that their own region chose, on the whole grid of a non-causal site.

    Prefix tokens (CLS, registers) see all and are seen by all; the paper has none. The site's own mask holds as well, but has no say in the
    choice. lepe adds the paper's convolution of the values as parameters routed_lepe_weight [H*Dv, 1, 5, 5] and routed_lepe_bias [H*Dv],
    zero at first so that they change nothing until trained.
    """

    name = "routed"
    family = "sparsify"
    paper = "Zhu, Wang, Ke, Zhang, Lau: BiFormer: Vision Transformer with Bi-Level Routing Attention, CVPR 2023 (arXiv 2303.08810)"
    formula = "routes(r) = topk_s(mean_r(q) . mean_s(k)); out[i] = sum_j softmax_j(score[i,j]) v[j], j in routes(region(i)); + DWC(v)"
    fits = Fits(kinds=frozenset({"self"}), causal=False, grid=True, cached=False)

    regions: int | tuple[int, int] = parameter(7, "regions along each axis of the grid, one number or (rows, columns)")
    topk: int | Literal["all"] = parameter(4, 'regions that a region attends to; "all" changes nothing')
    scale: Literal["site", "all"] = parameter("site", 'scale of the scores; "all" divides the site\'s by the root of its number of heads')
    lepe: bool = parameter(False, "add the paper's depthwise convolution of the values as parameters, zero at first")
    layers: tuple[int, ...] | None = parameter(None, "the layers of each stack to work on; None is every layer")

    @property
    def _counts(self) -> tuple[int, int]:
        """Regions along the rows and along the columns."""
        return (self.regions, self.regions) if isinstance(self.regions, int) else self.regions

    def check(self) -> None:
        self.require(min(self._counts) >= 1, "regions", "at least 1 along each axis")
        most = math.prod(self._counts)
        self.require(self.topk == "all" or 1 <= self.topk <= most, "topk", f'from 1 to the number of regions, {most}, or "all"')
        self.require(layers_.are_layers(self.layers), "layers", layers_.RANGE)

    @classmethod
    def identity(cls) -> Self:
        return cls(topk="all")

    def adds_parameters(self) -> bool:
        return self.lepe

    def declines(self, site: Site) -> str | None:
        return next(self._reasons_against(site), None)

    def _reasons_against(self, site: Site) -> Iterator[str]:
        yield from grid_axis.reasons_against(site, self.layers)
        grid = site.layout.grid or ()
        for length, count, axis in zip(grid, self._counts, ("rows", "columns"), strict=True):
            if length % count:
                yield f"the {length} {axis} of its grid {'x'.join(map(str, grid))} cannot be cut into {count} equal regions"
        if site.attend.choice is not None:
            yield f"an earlier pass chooses its keys by {site.attend.choice.tensor}"
        rest = sympy.expand(site.attend.score) - site.scale * QK
        if self.scale == "all" and (not site.scale.is_number or rest.has(QK)):
            yield f'scale="all" is of a score that is a number times qk and a rest, and its score is {site.attend.score}'
        if self.lepe and site.dims["Hkv"] != site.dims["H"]:
            yield f"lepe=True convolves the values of each head, and its {site.dims['H']} heads share {site.dims['Hkv']} of them"

    def transform(self, site: Site) -> Site:
        grid, prefix, attend = site.layout.grid, site.layout.prefix, site.attend
        if grid is None:
            return site
        operations = list(site.body.operations)
        if self.scale == "all":
            wider = {QK: QK * float(site.dims["H"] ** -0.5)}
            operations = [replace(each, score=each.score.xreplace(wider)) if isinstance(each, Attend) else each for each in operations]
        if isinstance(self.topk, int) and self.topk < math.prod(self._counts):
            seen, choice = self.predicate(grid, prefix), BlockChoice(ROUTES, self.topk)
            operations = [
                replace(operation, mask=sympy.And(operation.mask, seen), choice=choice) if isinstance(operation, Attend) else operation
                for operation in operations
            ]
            operations.insert(0, RegionRoutes(ROUTES, attend.query, attend.key, (grid[0], grid[1]), self._counts, self.topk, prefix))
        if not self.lepe:
            return site.with_operations(*operations)
        channels = site.dims["H"] * site.dims["Dv"]
        weight = Parameter("routed_lepe_weight", (channels, 1, KERNEL_SIZE, KERNEL_SIZE))
        bias = Parameter("routed_lepe_bias", (channels,))
        return site.with_operations(
            *operations,
            DepthwiseConv("routed_lepe", attend.value, weight.name, bias.name, (grid[0], grid[1]), prefix),
            Sum("routed_output", (site.body.result, "routed_lepe")),
            parameters=(weight, bias),
        )

    def predicate(self, grid: tuple[int, ...], prefix: int) -> Boolean:
        """Which (i, j) attend: the region of j is among those of the region of i, on a grid behind `prefix` tokens."""
        axes = grid_axis.grid_axes(grid)

        def region(token: sympy.Expr) -> sympy.Expr:
            down, across = (
                sympy.floor(axis.coordinate(token) / (length // count))
                for axis, length, count in zip(axes, grid, self._counts, strict=True)
            )
            return down * self._counts[1] + across

        return with_global_tokens(sympy.Ne(read(ROUTES, B, region(I - prefix), region(J - prefix)), 0), prefix)

    def reference(self, attention: AttentionInputs) -> torch.Tensor:
        """Region by region, and the convolution written as a sum of shifted images."""
        site, (tokens, keys), grid = attention.site, attention.logits.shape[-2:], attention.site.layout.grid
        seen = torch.ones(attention.logits.shape[0], 1, tokens, keys, dtype=torch.bool)
        if isinstance(self.topk, int) and grid is not None:
            seen = self._seen(attention.query, attention.key, grid, site.layout.prefix)
        if self.scale == "all":
            own = float(site.scale) * attention.query @ attention.key.transpose(-2, -1)
            attention = replace(attention, logits=attention.logits - own + own / math.sqrt(site.dims["H"]))
        output = attended(attention, seen)
        if self.lepe and grid is not None:
            added, prefix = attention.parameters, site.layout.prefix
            shifted = _convolved(attention.value[:, :, prefix:], added["routed_lepe_weight"], added["routed_lepe_bias"], grid)
            output = torch.cat([output[:, :, :prefix], output[:, :, prefix:] + shifted], dim=2)
        return output

    def _seen(self, query: torch.Tensor, key: torch.Tensor, grid: tuple[int, ...], prefix: int) -> torch.Tensor:
        """[B, 1, N, N] bool: which tokens see which."""
        (height, width), (down, across) = grid, self._counts
        number = torch.arange(height * width).view(height, width) + prefix
        regions = [part.flatten() for rows in number.chunk(down, 0) for part in rows.chunk(across, 1)]
        seen = torch.zeros(query.shape[0], 1, query.shape[2], key.shape[2], dtype=torch.bool)
        seen[:, :, :prefix], seen[..., :prefix] = True, True
        for row in range(query.shape[0]):
            means = [torch.stack([tokens[row, :, region].mean(1).flatten() for region in regions]) for tokens in (query, key)]
            affinity = means[0] @ means[1].T
            for region, likes in zip(regions, affinity, strict=True):
                for other in likes.argsort(descending=True)[: self.topk].tolist():
                    seen[row, 0, region[:, None], regions[other]] = True
        return seen


def _convolved(value: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, grid: tuple[int, ...]) -> torch.Tensor:
    """[B, H, h*w, D]: a depthwise convolution with zero padding, one shifted image per entry of the kernel."""
    batch, heads, _, width = value.shape
    (height, breadth), edge = grid, KERNEL_SIZE // 2
    image = functional.pad(value.reshape(batch, heads, height, breadth, width), (0, 0, edge, edge, edge, edge))
    kernel, result = weight.reshape(heads, width, KERNEL_SIZE, KERNEL_SIZE), bias.reshape(heads, 1, 1, width)
    for row in range(KERNEL_SIZE):
        for column in range(KERNEL_SIZE):
            result = result + image[:, :, row : row + height, column : column + breadth] * kernel[:, :, row, column][:, None, None]
    return result.flatten(2, 3)
