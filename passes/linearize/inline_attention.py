"""InLine attention: linear attention that is injective, by subtraction instead of division, and sees its neighbourhood.

Han et al. 2024, "Bridging the Divide: Reconsidering Softmax and Linear Attention". With s the site's scale, n tokens, and phi the identity
or a feature map,

    w[i,j] = s / n phi(q_i) . phi(k_j) + (1 - s phi(q_i) . mean_j phi(k_j)) / n              sum_j w[i,j] = 1
    out[i] = sum_j w[i,j] v[j] + DWC(v)[i]

DWC is a depthwise 3 x 3 convolution whose kernel a small network makes of the mean of the attention's input, for each picture its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch.nn import functional

from passes import layers as layers_
from passes.linearize import dot_product
from passes.sparsify.grid_axis import not_the_whole_grid
from rewrite.ir import (
    NK,
    QK,
    AttentionInputs,
    DynamicConv,
    FeatureMap,
    Fits,
    MeanProduct,
    Operation,
    Parameter,
    Pass,
    Site,
    Sum,
    parameter,
    register_pass,
    tensor,
)

MEAN = "inline_mean"
TAPS = 9


@register_pass
@dataclass(frozen=True)
class InlineAttention(Pass):
    """Of unmasked sites. Weights sum to one and may be negative, so the model has to be trained with it.

    local=True adds the convolution, for tokens on a grid; with C channels and H heads: inline_down [C, C/H], inline_down_bias [C],
    inline_up [9 C, C/H], inline_up_bias [9 C], the published network's two layers, in H groups. The last layer is zero at first, so that
    the convolution adds nothing until trained; the first is random as there. Prefix tokens (CLS) are left out of the convolution and are
    part of the mean, as published. drop_bias=True drops what the score adds by position (Swin's relative positions), as the published
    models do. The published settings: DeiT in every layer; PVT without spatial reduction, and twice the heads; Swin and CSwin in their
    first stages, each with the whole stage as its window (see the stages, `stacks`).
    """

    name = "inline_attention"
    family = "linearize"
    paper = (
        "Han, Pu, Xia, Han, Pan, Li, Lu, Song, Huang: Bridging the Divide: Reconsidering Softmax and Linear Attention, NeurIPS 2024 "
        "(arXiv 2412.06590)"
    )
    formula = "out[i] = sum_j (s q_i . k_j / n + (1 - s q_i . mean(k)) / n) v[j] + DWC(v)[i]"
    training_free = False
    fits = Fits(kinds=frozenset({"self"}), causal=False, cached=False)

    kernel: Literal["identity", "relu", "leaky_relu", "exp"] = parameter("identity", "phi; exp is of 0.2 x")
    local: bool = parameter(False, "add the dynamic convolution of the values as parameters, without effect at first")
    drop_bias: bool = parameter(False, "drop what the score adds by position, such as relative positions")
    stacks: tuple[int, ...] | None = parameter(None, "the stacks (stages, towers) to work on, by number; None is every one")
    layers: tuple[int, ...] | None = parameter(None, "the layers of each stack to work on; None is every layer")

    def check(self) -> None:
        self.require(layers_.are_layers(self.stacks), "stacks", "stack numbers from 0, each once, or None for every stack")
        self.require(layers_.are_layers(self.layers), "layers", layers_.RANGE)

    def adds_parameters(self) -> bool:
        return self.local

    def declines(self, site: Site) -> str | None:
        return next(self._reasons_against(site), None)

    def _reasons_against(self, site: Site) -> Iterator[str]:
        if reason := layers_.reason_against_stack(self.stacks, site):
            yield reason
        yield from dot_product.reasons_against(site, self.layers, self.drop_bias)
        if site.attend.mask != True:  # noqa: E712  (sympy.true equals True and is not it)
            yield f"it is masked ({site.attend.mask}), and its weights sum to one over all keys"
        if self.local:
            yield from self._reasons_against_convolution(site)

    def _reasons_against_convolution(self, site: Site) -> Iterator[str]:
        dims, channels = site.dims, site.dims["H"] * site.dims["Dv"]
        if site.layout.grid is None or len(site.layout.grid) != 2:
            yield "local=True convolves its values, and its tokens lie on no grid that was found"
        elif reason := not_the_whole_grid(site):
            yield reason
        if dims["Hkv"] != dims["H"]:
            yield f"local=True convolves the values of each head, and its {dims['H']} heads share {dims['Hkv']} of them"
        if "input" not in site.operands:
            yield "local=True makes its kernel of what queries and keys are projected from, which was not found"
        elif dims["Cin"] != channels:
            yield f"local=True makes a kernel for {channels} channels of as many, and its input has {dims['Cin']}"

    def transform(self, site: Site) -> Site:
        attend = site.attend
        query, key = attend.query, attend.key
        operations: list[Operation] = []
        if self.kernel != "identity":
            operations += [FeatureMap(f"inline_{name}", name, self.kernel) for name in (query, key)]
            query, key = (operation.result for operation in operations)
        score = site.scale / NK * QK + (1 - site.scale * tensor(MEAN, "bhi")) / NK
        operations += [MeanProduct(MEAN, query, key), replace(attend, query=query, key=key, score=score, normaliser="none")]
        if not self.local or site.layout.grid is None:
            return site.with_operations(*operations)
        channels, group = site.dims["H"] * site.dims["Dv"], site.dims["Dv"]
        # The standard deviation that torch starts a layer of so many inputs with.
        start = ("normal", 1 / math.sqrt(3 * group))
        parameters = (
            Parameter("inline_down", (channels, group), start),
            Parameter("inline_down_bias", (channels,), start),
            Parameter("inline_up", (TAPS * channels, group)),
            Parameter("inline_up_bias", (TAPS * channels,)),
        )
        grid = (site.layout.grid[0], site.layout.grid[1])
        names = [each.name for each in parameters]
        convolved: tuple[Operation, ...] = (
            DynamicConv("inline_local", attend.value, "input", names[0], names[1], names[2], names[3], grid, site.layout.prefix),
            Sum("inline_sum", (attend.result, "inline_local")),
        )
        return site.with_operations(*operations, *convolved, parameters=parameters)

    def reference(self, attention: AttentionInputs) -> torch.Tensor:
        """The published order of contractions; the convolution picture by picture."""
        query, key, value, site = attention.query, attention.key, attention.value, attention.site
        if self.kernel == "exp":
            query, key = (0.2 * query).exp(), (0.2 * key).exp()
        elif self.kernel != "identity":
            slope = 0.01 if self.kernel == "leaky_relu" else 0.0
            query, key = (functional.leaky_relu(tokens, slope) for tokens in (query, key))
        scale, count = float(site.scale), key.shape[2]
        state = key.transpose(-2, -1) @ value * scale / count
        rest = 1 - scale * query @ key.mean(2, keepdim=True).transpose(-2, -1)
        output = query @ state + rest * value.mean(2, keepdim=True)
        if not self.local or site.layout.grid is None or attention.input is None:
            return output
        added, prefix, heads = attention.parameters, site.layout.prefix, site.dims["H"]
        mean = attention.input.mean(1)
        for row in range(mean.shape[0]):
            hidden = functional.gelu(_in_groups(mean[row], added["inline_down"], heads) + added["inline_down_bias"])
            kernel = _in_groups(hidden, added["inline_up"], heads) + added["inline_up_bias"]
            image = value[row, :, prefix:].transpose(-2, -1).reshape(-1, *site.layout.grid)
            local = functional.conv2d(image, kernel.reshape(-1, 1, 3, 3), padding=1, groups=image.shape[0])
            output[row, :, prefix:] += local.reshape(heads, -1, value.shape[2] - prefix).transpose(-2, -1)
        return output


def _in_groups(channels: torch.Tensor, weight: torch.Tensor, groups: int) -> torch.Tensor:
    """channels [C], weight [C', C/groups] -> [C']: each group of channels through its own rows."""
    parts = zip(channels.chunk(groups), weight.chunk(groups), strict=True)
    return torch.cat([rows @ part for part, rows in parts])
