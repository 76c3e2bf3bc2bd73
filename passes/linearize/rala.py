"""Rank-augmented linear attention: keys weighed by what they are to the mean query, and an output gated token by token.

Fan et al. 2025, "Breaking the Low-Rank Dilemma of Linear Attention" (RALA, RAVLT). On a grid of N tokens, with q and k after elu + 1, R the
rotation of a query or key by its row and column, and s the site's scale:

    k'_j   = k_j N softmax_j(s mean(q) . k_j)
    out[i] = sum_j (R q_i . R k'_j) v_j / (N (q_i . mean(k') + 1e-6))
    out    = (out + DWC(v)) * o                                             DWC 5 x 5 depthwise; o linear in the attention's input

The rotation is in the numerator alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch.nn import functional

from passes import layers as layers_
from passes.linearize import dot_product
from passes.sparsify.grid_axis import not_the_whole_grid
from rewrite.ir import (
    NK,
    QK,
    AttentionInputs,
    DepthwiseConv,
    EffectiveKeys,
    FeatureMap,
    Fits,
    Gate,
    GridRotation,
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

MEAN = "rala_mean"
KERNEL_SIZE = 5
# What the published code adds to what it divides by.
EPSILON = 1e-6


@register_pass
@dataclass(frozen=True)
class Rala(Pass):
    """Of unmasked sites on a grid. The model has to be trained with it.

    learnable=True adds the convolution and the gate, without effect at first: rala_lepe_weight [H*Dv, 1, 5, 5] and rala_lepe_bias [H*Dv]
    zero, rala_gate_weight [H*Dv, C] zero and rala_gate_bias [H*Dv] one. The published block has more that is no part of an attention and
    is not added: a convolution in front of it, and one inside the feed-forward network. Its last two stages keep softmax attention with the
    same rotation, convolution and gate. Prefix tokens (CLS), which it has none of, are not rotated and not convolved.
    """

    name = "rala"
    family = "linearize"
    paper = "Fan, Huang, He: Breaking the Low-Rank Dilemma of Linear Attention, CVPR 2025 (RALA, RAVLT, arXiv 2411.07635)"
    formula = "k' = k N softmax(s mean(q) . k); out[i] = (sum_j (R q_i . R k'_j) v_j / (N (q_i . mean(k') + 1e-6)) + DWC(v)) * o"
    training_free = False
    fits = Fits(kinds=frozenset({"self"}), causal=False, grid=True, cached=False)

    learnable: bool = parameter(False, "add the paper's convolution of the values and its gate as parameters, without effect at first")
    layers: tuple[int, ...] | None = parameter(None, "the layers of each stack to work on; None is every layer")

    def check(self) -> None:
        self.require(layers_.are_layers(self.layers), "layers", layers_.RANGE)

    def adds_parameters(self) -> bool:
        return self.learnable

    def declines(self, site: Site) -> str | None:
        return next(self._reasons_against(site), None)

    def _reasons_against(self, site: Site) -> Iterator[str]:
        yield from dot_product.reasons_against(site, self.layers)
        dims = site.dims
        if site.attend.mask != True:  # noqa: E712  (sympy.true equals True and is not it)
            yield f"it is masked ({site.attend.mask}), and its keys are weighed against all others"
        if dims["Nq"] != dims["Nk"]:
            yield f"it has {dims['Nq']} queries and {dims['Nk']} keys"
        if reason := not_the_whole_grid(site):
            yield reason
        if dims["Hkv"] != dims["H"]:
            yield f"its keys are weighed against the queries of their own head, and {dims['H']} heads share {dims['Hkv']} of them"
        if dims["D"] % 4:
            yield f"its head dim {dims['D']} cannot be cut into pairs for rows and as many for columns"
        if self.learnable and "input" not in site.operands:
            yield "learnable=True gates by what queries and keys are projected from, which was not found"

    def transform(self, site: Site) -> Site:
        attend, dims, prefix, grid = site.attend, site.dims, site.layout.prefix, site.layout.grid
        if grid is None:
            return site
        grid_ = (grid[0], grid[1])
        query, key = (FeatureMap(f"rala_{name}", name, "elu") for name in (attend.query, attend.key))
        effective = EffectiveKeys("rala_effective_key", key.result, query.result, float(site.scale))
        rotated = tuple(GridRotation(f"{each.result}_rotated", each.result, grid_, prefix) for each in (query, effective))
        score = QK / (NK * (tensor(MEAN, "bhi") + EPSILON))
        linear = replace(attend, query=rotated[0].result, key=rotated[1].result, score=score, normaliser="none")
        operations: tuple[Operation, ...] = (query, key, effective, *rotated, MeanProduct(MEAN, query.result, effective.result), linear)
        if not self.learnable:
            return site.with_operations(*operations)
        channels = dims["H"] * dims["Dv"]
        parameters = (
            Parameter("rala_lepe_weight", (channels, 1, KERNEL_SIZE, KERNEL_SIZE)),
            Parameter("rala_lepe_bias", (channels,)),
            Parameter("rala_gate_weight", (channels, dims["Cin"])),
            Parameter("rala_gate_bias", (channels,), "ones"),
        )
        names = [each.name for each in parameters]
        return site.with_operations(
            *operations,
            DepthwiseConv("rala_lepe", attend.value, names[0], names[1], grid_, prefix),
            Sum("rala_sum", (attend.result, "rala_lepe")),
            Gate("rala_gated", "rala_sum", "input", names[2], names[3]),
            parameters=parameters,
        )

    def reference(self, attention: AttentionInputs) -> torch.Tensor:
        """The map, with each query and key turned by complex numbers; the convolution as torch has it."""
        site, (query, key) = attention.site, (functional.elu(tokens) + 1 for tokens in (attention.query, attention.key))
        grid, prefix, count = site.layout.grid or (0, 0), site.layout.prefix, key.shape[2]
        shares = (float(site.scale) * (query.mean(2, keepdim=True) * key).sum(-1, keepdim=True)).softmax(2)
        key = key * shares * count
        products = _turned(query, grid, prefix) @ _turned(key, grid, prefix).transpose(-2, -1)
        output = products @ attention.value / (count * (query @ key.mean(2, keepdim=True).transpose(-2, -1) + EPSILON))
        if not self.learnable or attention.input is None:
            return output
        added = {name.removeprefix("rala_"): entry for name, entry in attention.parameters.items()}
        batch, heads, _, width = output.shape
        image = attention.value[:, :, prefix:].transpose(-2, -1).reshape(batch, heads * width, *grid)
        lepe = functional.conv2d(image, added["lepe_weight"], added["lepe_bias"], padding=2, groups=heads * width)
        lepe = lepe.reshape(batch, heads, width, -1).transpose(-2, -1)
        output = torch.cat([output[:, :, :prefix], output[:, :, prefix:] + lepe], dim=2)
        gates = attention.input @ added["gate_weight"].T + added["gate_bias"]
        return output * gates.reshape(batch, count, heads, width).transpose(1, 2)


def _turned(tokens: torch.Tensor, grid: tuple[int, ...], prefix: int) -> torch.Tensor:
    """[B, H, prefix + h*w, D], each pair of channels as a complex number times e^(i angle)."""
    half = tokens.shape[-1] // 4
    steps = 1 / 10000.0 ** torch.linspace(0, 1, half, dtype=torch.float64)
    angles = [
        torch.cat([row * steps, column * steps]) if token >= 0 else torch.zeros(2 * half, dtype=torch.float64)
        for token in range(-prefix, grid[0] * grid[1])
        for row, column in [divmod(token, grid[1])]
    ]
    turns = torch.polar(torch.ones(len(angles), 2 * half, dtype=torch.float64), torch.stack(angles))
    pairs = torch.view_as_complex(tokens.double().reshape(*tokens.shape[:-1], -1, 2).contiguous())
    return torch.view_as_real(pairs * turns).flatten(-2).to(tokens.dtype)
