"""Agent attention: a few agent tokens gather the values, then hand them to the queries.

Han et al. 2024, "Agent Attention: On the Integration of Softmax and Linear Attention", ECCV 2024. With s the site's scale and
P agent tokens A, pooled from the queries, attention over N tokens costs N * P twice instead of N * N:

    A   = AdaptiveAvgPool(q)                        [B, H, P, D]     over the grid, prefix tokens left out
    AV  = softmax_j(s A k^T + B1) v                 [B, H, P, Dv]    agent aggregation
    out = softmax_p(s q A^T + B2) AV + DWC(v)       [B, H, N, Dv]    agent broadcast, and diversity restored from the values

B1, B2 and the depthwise 3x3 convolution DWC are learned; without them (the default) the method has no parameter, and the accuracy of a
pretrained model is not kept until it has been trained.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import sympy
import torch
from torch.nn import functional

from passes import layers as layers_
from passes.linearize import dot_product
from rewrite.ir import (
    QK,
    Attend,
    AttentionInputs,
    DepthwiseConv,
    Fits,
    Fitting,
    GridBias,
    GridResize,
    Parameter,
    Pass,
    Pool,
    Site,
    Sum,
    parameter,
    register_pass,
    tensor,
    tensors_in,
)

# The paper learns the biases on a 7x7 grid, whatever the tokens' grid is, and convolves 3x3.
BIAS_SIZE = 7
KERNEL_SIZE = 3


@register_pass
@dataclass(frozen=True)
class Agent(Pass):
    """`tokens` agents: sqrt(tokens) x sqrt(tokens) on a grid, so a square number there; any number along a sequence.

    The published models: DeiT-T and -S with tokens=49; DeiT-B with tokens=81, layers=(0, 1, 2, 3); PVT, built without spatial reduction,
    Swin and CSwin with tokens=(9, 16, 49, 49), one entry for each stage, which is a stack. Swin and CSwin are built such that in stages
    with agents the window (or stripe) is the whole stage, and drop_bias=True drops the relative positions there, in whose place the
    learned biases stand; stacks=(0, 1, 2) are those of Swin-T, stacks=(0, 1) those of Swin-S and of CSwin. The third stage of Swin-B has
    agents in its first two blocks: stacks=(0, 1, 2), layers=(0, 1). A site that attends in windows of its grid is declined: which tokens a
    window has is decided outside of the attention.

    learnable adds the paper's parameters, all zero at first so that they change nothing until trained. On a grid h x w with `prefix`
    tokens in front: agent_an_bias, agent_na_bias [H, P, 7, 7]; agent_ah_bias, agent_ha_bias [1, H, P, h, 1]; agent_aw_bias,
    agent_wa_bias [1, H, P, 1, w]; with a prefix agent_ac_bias, agent_ca_bias [1, H, P, prefix]; agent_dwc_weight [H*Dv, 1, 3, 3] and
    agent_dwc_bias [H*Dv]. The paper's code keeps ha, wa and ca with P last: permute when loading its weights. Where
    keys are spatially reduced to a grid of their own (PVT's other form), ah and aw have its size, and values are resized to the queries'
    grid before they are convolved.
    """

    name = "agent"
    family = "linearize"
    paper = "Han, Ye, Han, Xia, Pan, Wan, Song, Huang: Agent Attention, ECCV 2024 (arXiv 2312.08874)"
    formula = "A = pool(q); out = softmax(s q A^T + B2) softmax(s A k^T + B1) v + DWC(v)"
    training_free = False
    fits = Fits(kinds=frozenset({"self"}), causal=False, cached=False)
    # Biases of logits are of order one and start at zero.
    fitting = Fitting(learning_rate=3e-2)

    tokens: int | tuple[int, ...] = parameter(
        49, "number of agent tokens, a square number where tokens lie on a grid; a tuple has one for each stack (stage, tower)"
    )
    learnable: bool = parameter(False, "add the paper's biases and depthwise convolution as parameters, zero at first")
    drop_bias: bool = parameter(False, "drop what the score adds by position, such as relative positions")
    stacks: tuple[int, ...] | None = parameter(None, "the stacks (stages, towers) to work on, by number; None is every one")
    layers: tuple[int, ...] | None = parameter(None, "the layers of each stack to work on; None is every layer")

    def check(self) -> None:
        self.require(min(self._counts, default=0) >= 1, "tokens", "at least 1")
        self.require(layers_.are_layers(self.stacks), "stacks", "stack numbers from 0, each once, or None for every stack")
        self.require(layers_.are_layers(self.layers), "layers", layers_.RANGE)

    @property
    def _counts(self) -> tuple[int, ...]:
        return (self.tokens,) if isinstance(self.tokens, int) else self.tokens

    def _agents(self, site: Site) -> int:
        """The number of agents of a site."""
        return self.tokens if isinstance(self.tokens, int) else self.tokens[site.stack]

    def _score(self, site: Site) -> sympy.Expr:
        """The site's score without what is dropped of it."""
        dropped = self.drop_bias and not dot_product.reads_rows(site.attend.score - site.scale * QK)
        return site.scale * QK if dropped else site.attend.score

    def adds_parameters(self) -> bool:
        return self.learnable

    def declines(self, site: Site) -> str | None:
        return next(self._reasons_against(site), None)

    def _reasons_against(self, site: Site) -> Iterator[str]:
        if reason := layers_.reason_against_stack(self.stacks, site) or layers_.reason_against(self.layers, site):
            yield reason
            return
        if len(self._counts) <= site.stack and not isinstance(self.tokens, int):
            yield f"it is in stack {site.stack}, and tokens has entries for {len(self._counts)} stacks"
            return
        if not site.is_plain:
            yield f"an earlier pass changed it: it is made of {len(site.body.operations)} operations"
            return
        if site.layout.partial is not None:
            yield site.layout.partial
            return
        queries, keys, grid, score, agents = site.dims["Nq"], site.dims["Nk"], site.layout.grid, self._score(site), self._agents(site)
        extra = list(tensors_in(score))
        if site.attend.mask != True:  # noqa: E712  (sympy.true equals True and is not it)
            yield f"it is masked ({site.attend.mask}), and agents have no positions that a mask could hold for"
        if extra:
            yield f"its score reads {', '.join(extra)} at each pair of tokens, and agents are no such tokens"
        if not site.scale.is_number or score != site.scale * QK or site.scale == 0:
            yield f"its score is {score}, not a number times qk"
        if queries != keys and site.layout.key_grid is None:
            yield f"it has {queries} queries and {keys} keys"
        if agents > queries - site.layout.prefix:
            yield f"{agents} agents are more than its {queries - site.layout.prefix} tokens"
        if grid is not None:
            yield from self._reasons_against_grid(site, grid)
        elif self.learnable:
            yield "learnable=True needs a grid for its biases and its convolution, and no grid was found"

    def _reasons_against_grid(self, site: Site, grid: tuple[int, ...]) -> Iterator[str]:
        agents, key_grid, prefix = self._agents(site), site.layout.key_grid or grid, site.layout.prefix
        side, text = math.isqrt(agents), "x".join(map(str, grid))
        laid = math.prod(key_grid) + prefix
        if len(grid) != 2:
            yield f"its grid {text} has {len(grid)} axes, and agents are pooled over 2"
        if laid != site.dims["Nk"]:
            keys = "x".join(map(str, key_grid))
            yield f"{prefix} prefix tokens and the grid {keys} make {laid} tokens, it has {site.dims['Nk']}"
        if side * side != agents:
            yield f"{agents} agents form no square on its grid {text}; {side * side} or {(side + 1) ** 2} would"
        if side > min(grid):
            yield f"{side}x{side} agents do not fit on its grid {text}"
        if self.learnable and site.dims["Hkv"] != site.dims["H"]:
            yield f"learnable=True convolves the values of each head, and its {site.dims['H']} heads share {site.dims['Hkv']} of them"

    def transform(self, site: Site) -> Site:
        attend, prefix, grid, score, agents = site.attend, site.layout.prefix, site.layout.grid, self._score(site), self._agents(site)
        side = math.isqrt(agents)
        pool = (
            Pool("agent_tokens", attend.query, grid, (side, side), prefix)
            if grid is not None
            else Pool("agent_tokens", attend.query, (site.dims["Nq"] - prefix,), (agents,), prefix)
        )
        gather = Attend("agent_values", "agent_tokens", attend.key, attend.value, score=score)
        spread = Attend("agent_output", attend.query, "agent_tokens", "agent_values", score=score)
        if not self.learnable or grid is None:
            return site.with_operations(pool, gather, spread)
        grid_, key_grid = (grid[0], grid[1]), _key_grid(site)
        ac, ca = ("agent_ac_bias", "agent_ca_bias") if prefix else (None, None)
        # Values of reduced keys are brought to the grid of the queries before they are convolved.
        values, resized = attend.value, []
        if key_grid != grid_:
            resized = [GridResize("agent_resized_value", attend.value, key_grid, grid_)]
            values = "agent_resized_value"
        return site.with_operations(
            pool,
            GridBias("agent_to_key_bias", "agent_an_bias", "agent_ah_bias", "agent_aw_bias", ac, key_grid),
            GridBias("query_to_agent_bias", "agent_na_bias", "agent_ha_bias", "agent_wa_bias", ca, grid_, transposed=True),
            Attend(gather.result, gather.query, gather.key, gather.value, score + tensor("agent_to_key_bias", "bhij")),
            Attend(spread.result, spread.query, spread.key, spread.value, score + tensor("query_to_agent_bias", "bhij")),
            *resized,
            DepthwiseConv("agent_diversity", values, "agent_dwc_weight", "agent_dwc_bias", grid_, prefix),
            Sum("agent_sum", (spread.result, "agent_diversity")),
            parameters=self._parameters(site, grid_),
        )

    def _parameters(self, site: Site, grid: tuple[int, int]) -> tuple[Parameter, ...]:
        heads, agents, prefix, channels = site.dims["H"], self._agents(site), site.layout.prefix, site.dims["H"] * site.dims["Dv"]
        shapes: tuple[tuple[str, tuple[int, ...]], ...] = (
            ("agent_an_bias", (heads, agents, BIAS_SIZE, BIAS_SIZE)),
            ("agent_na_bias", (heads, agents, BIAS_SIZE, BIAS_SIZE)),
            ("agent_ah_bias", (1, heads, agents, _key_grid(site)[0], 1)),
            ("agent_aw_bias", (1, heads, agents, 1, _key_grid(site)[1])),
            ("agent_ha_bias", (1, heads, agents, grid[0], 1)),
            ("agent_wa_bias", (1, heads, agents, 1, grid[1])),
            ("agent_ac_bias", (1, heads, agents, prefix)),
            ("agent_ca_bias", (1, heads, agents, prefix)),
            ("agent_dwc_weight", (channels, 1, KERNEL_SIZE, KERNEL_SIZE)),
            ("agent_dwc_bias", (channels,)),
        )
        return tuple(Parameter(name, shape) for name, shape in shapes if 0 not in shape)

    def reference(self, attention: AttentionInputs) -> torch.Tensor:
        """Agents pooled cell by cell, and the convolution written as a sum of shifted images."""
        query, key, value, site = attention.query, attention.key, attention.value, attention.site
        scale, prefix, grid = float(site.scale), site.layout.prefix, site.layout.grid
        agents = _pooled(query[:, :, prefix:], grid or (query.shape[2] - prefix,), self._agents(site))
        gather, spread = scale * agents @ key.transpose(-2, -1), scale * query @ agents.transpose(-2, -1)
        if not self.learnable or grid is None:
            return spread.softmax(-1) @ (gather.softmax(-1) @ value)
        learned = {name.removeprefix("agent_"): entry for name, entry in attention.parameters.items()}
        gather = gather + _bias(learned["an_bias"], learned["ah_bias"], learned["aw_bias"], learned.get("ac_bias"), _key_grid(site))
        to_agents = _bias(learned["na_bias"], learned["ha_bias"], learned["wa_bias"], learned.get("ca_bias"), grid)
        spread = spread + to_agents.transpose(-2, -1)
        output = spread.softmax(-1) @ (gather.softmax(-1) @ value)
        if site.layout.key_grid is not None:
            images = value.transpose(-2, -1).reshape(*value.shape[:2], value.shape[3], *site.layout.key_grid)
            images = torch.stack([functional.interpolate(row, size=grid, mode="bilinear") for row in images])
            value = images.flatten(-2).transpose(-2, -1)
        output[:, :, prefix:] += _convolved(value[:, :, prefix:], learned["dwc_weight"], learned["dwc_bias"], grid)
        return output


def _key_grid(site: Site) -> tuple[int, int]:
    """The grid of a site's keys, in a site whose queries have one of two axes."""
    height, width = site.layout.key_grid or site.layout.grid or (0, 0)
    return height, width


def _pooled(query: torch.Tensor, grid: tuple[int, ...], agents: int) -> torch.Tensor:
    """[B, H, P, D]: the mean of each agent's cell; cells of an axis of L tokens in n are [floor(a L / n), ceil((a + 1) L / n))."""

    def cells(length: int, count: int) -> list[range]:
        return [range(cell * length // count, -(-(cell + 1) * length // count)) for cell in range(count)]

    if len(grid) == 1:
        chosen = [list(cell) for cell in cells(grid[0], agents)]
    else:
        rows, columns = (cells(length, math.isqrt(agents)) for length in grid)
        chosen = [[row * grid[1] + column for row in down for column in across] for down in rows for across in columns]
    return torch.stack([query[:, :, tokens].mean(2) for tokens in chosen], dim=2)


def _bias(
    table: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, prefix: torch.Tensor | None, grid: tuple[int, ...]
) -> torch.Tensor:
    """[1, H, P, prefix + h*w]."""
    resized = functional.interpolate(table, size=grid, mode="bilinear", align_corners=False)
    bias = (resized[None] + rows + columns).flatten(-2)
    return bias if prefix is None else torch.cat([prefix, bias], dim=-1)


def _convolved(value: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, grid: tuple[int, ...]) -> torch.Tensor:
    """[B, H, h*w, D]: a depthwise convolution with zero padding, one shifted image per entry of the kernel."""
    batch, heads, _, width = value.shape
    height, breadth = grid
    image = functional.pad(value.reshape(batch, heads, height, breadth, width), (0, 0, 1, 1, 1, 1))
    kernel, result = weight.reshape(heads, width, KERNEL_SIZE, KERNEL_SIZE), bias.reshape(heads, 1, 1, width)
    for down in range(KERNEL_SIZE):
        for right in range(KERNEL_SIZE):
            shifted = image[:, :, down : down + height, right : right + breadth]
            result = result + shifted * kernel[:, :, down, right][:, None, None]
    return result.flatten(2, 3)
