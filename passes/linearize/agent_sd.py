"""AgentSD: agent attention for diffusion models without training, its agents merged from tokens that are alike.

Han et al. 2024, "Agent Attention", section on Stable Diffusion, on top of ToMe for Stable Diffusion (Bolya and Hoffman 2023). On the grid
of a self-attention, x being what enters its layer, with one destination in each cell of stride x stride tokens:

    match   each other token with the destination of the greatest cosine of x; the closest matches come first
    q, k, v the first ratio * N matches averaged into their destinations                  A = q with the first agent_ratio * N so averaged
    out     = softmax_p(s^power q A^T) softmax_j(s A k^T) v + shortcut * v                merged tokens then get what their destination has

s is the site's scale. Queries, keys and values are averaged where the published code averages the tokens that they are projected from,
which is the same for linear projections; it is not where the model normalises or rotates queries and keys behind them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch.nn import functional

from passes import layers as layers_
from passes.linearize import dot_product
from passes.sparsify.grid_axis import not_the_whole_grid
from rewrite.ir import (
    QK,
    Attend,
    AttentionInputs,
    Fits,
    MergeTokens,
    Operation,
    Pass,
    Program,
    Shortcut,
    Site,
    TokenMatch,
    UnmergeTokens,
    parameter,
    register_pass,
)

MATCH = "agent_match"


@register_pass
@dataclass(frozen=True)
class AgentSd(Pass):
    """The defaults are the published code's; its README has ratio=0.4, stride=4, agent_ratio=0.95 for the first 20 of 50 steps, and
    ratio=0.4, stride=2, agent_ratio=0.5 from there on: two rewritten models, one for each part of the schedule.

    Where there would be half as many agents as merged tokens or more, attention is the site's own among the merged tokens, as published.
    max_downsample: sites whose grid is coarser than the model's finest by more than this factor are left alone. Destinations are drawn
    from `seed`, another draw in each layer and the same ones in every call; the published code draws anew in each step. Prefix tokens
    (CLS), which diffusion models have none of, are not merged and are no agents. Only self-attention is merged, the published default.
    """

    name = "agent_sd"
    family = "linearize"
    paper = (
        "Han, Ye, Han, Xia, Pan, Wan, Song, Huang: Agent Attention, ECCV 2024 (arXiv 2312.08874); Bolya, Hoffman: Token Merging for Fast "
        "Stable Diffusion, CVPR workshops 2023 (arXiv 2303.17604)"
    )
    formula = "A = merge(q); out = softmax(s^0.3 q A^T) softmax(s A k^T) v + 0.075 v, of merged q, k, v; unmerged"
    fits = Fits(kinds=frozenset({"self"}), causal=False, grid=True, hidden=True, cached=False)

    ratio: float = parameter(0.5, "share of the tokens that are merged away; 0 changes nothing")
    agent_ratio: float = parameter(0.8, "share of the tokens that are merged away where agents are made")
    stride: int | tuple[int, int] = parameter(2, "tokens along each axis of a cell that has one destination, one number or (rows, columns)")
    power: float = parameter(0.3, "power of the scale that queries meet agents with")
    shortcut: float = parameter(0.075, "share of its own value that each token keeps")
    seed: int | None = parameter(0, "what destinations are drawn from; None puts them at the top left of their cells")
    max_downsample: int = parameter(1, "how much coarser than the model's finest grid a site's may be, along an axis")
    layers: tuple[int, ...] | None = parameter(None, "the layers of each stack to work on; None is every layer")

    @property
    def _stride(self) -> tuple[int, int]:
        return (self.stride, self.stride) if isinstance(self.stride, int) else self.stride

    def check(self) -> None:
        for name in ("ratio", "agent_ratio"):
            self.require(0.0 <= getattr(self, name) < 1.0, name, "at least 0 and below 1")
        self.require(min(self._stride) >= 1 and max(self._stride) > 1, "stride", "at least 1 along each axis, and more along one")
        for name in ("power", "shortcut"):
            self.require(math.isfinite(getattr(self, name)), name, "finite")
        self.require(self.max_downsample >= 1, "max_downsample", "at least 1")
        self.require(layers_.are_layers(self.layers), "layers", layers_.RANGE)

    @classmethod
    def identity(cls) -> Self:
        return cls(ratio=0.0)

    def apply(self, program: Program) -> Program:
        """Sites of coarser grids than `max_downsample` allows are declined; which grid is the finest only the program knows."""
        finest = max((math.prod(site.layout.grid) for site in program.sites if site.layout.grid), default=0)
        coarse = []
        for site in program.sites:
            factor = math.ceil(math.sqrt(finest // math.prod(site.layout.grid))) if site.layout.grid else 1
            if factor > self.max_downsample and self.fits.reason_against(site) is None:
                coarse.append(site.name)
                reason = f"its grid is {factor} times coarser than the model's finest, and max_downsample={self.max_downsample}"
                program = program.with_declined(site, str(self), reason)
        rest = super().apply(replace(program, sites=tuple(site for site in program.sites if site.name not in coarse)))
        changed = {site.name: site for site in rest.sites}
        return replace(rest, sites=tuple(changed.get(site.name, site) for site in program.sites))

    def declines(self, site: Site) -> str | None:
        return next(self._reasons_against(site), None)

    def _reasons_against(self, site: Site) -> Iterator[str]:
        yield from dot_product.reasons_against(site, self.layers)
        grid = site.layout.grid or ()
        if site.attend.mask != True:  # noqa: E712  (sympy.true equals True and is not it)
            yield f"it is masked ({site.attend.mask}), and merged tokens have no one position that a mask could hold for"
        if reason := not_the_whole_grid(site):
            yield reason
        if any(length < stride for length, stride in zip(grid, self._stride, strict=True)):
            yield f"no cell of {'x'.join(map(str, self._stride))} fits on its grid {'x'.join(map(str, grid))}"

    def _removed(self, grid: tuple[int, ...], ratio: float) -> int:
        """Tokens that merging takes away, of those that are no destinations."""
        count = math.prod(grid)
        return min(count - math.prod(length // stride for length, stride in zip(grid, self._stride, strict=True)), int(count * ratio))

    def transform(self, site: Site) -> Site:
        attend, prefix, grid = site.attend, site.layout.prefix, site.layout.grid
        removed = 0 if grid is None else self._removed(grid, self.ratio)
        if grid is None or not removed:
            return site
        seed = None if self.seed is None else self.seed + site.layer
        match = TokenMatch(MATCH, "hidden", (grid[0], grid[1]), self._stride, seed, prefix)
        facts = (match.result, removed, match.destinations, prefix)
        query, key, value = (MergeTokens(f"merged_{name}", name, *facts) for name in (attend.query, attend.key, attend.value))
        operations: list[Operation] = [match, query, key, value]
        gone = self._removed(grid, self.agent_ratio)
        if (math.prod(grid) - gone) * 2 < prefix + math.prod(grid) - removed:
            agents = MergeTokens("agent_tokens", attend.query, match.result, gone, match.destinations, prefix, keeps_prefix=False)
            softer = float(site.scale) ** self.power * QK
            operations += [
                agents,
                Attend("agent_values", agents.result, key.result, value.result, score=attend.score),
                Attend("agent_output", query.result, agents.result, "agent_values", score=softer),
                Shortcut("agent_shortcut", "agent_output", value.result, self.shortcut),
            ]
        else:
            operations.append(replace(attend, query=query.result, key=key.result, value=value.result, result="merged_output"))
        return site.with_operations(*operations, UnmergeTokens("unmerged_output", operations[-1].result, *facts))

    def reference(self, attention: AttentionInputs) -> torch.Tensor:
        """Row by row, merging one source after the other."""
        site, grid, prefix, scale = attention.site, attention.site.layout.grid, attention.site.layout.prefix, float(attention.site.scale)
        removed = 0 if grid is None else self._removed(grid, self.ratio)
        if grid is None or not removed or attention.hidden is None:
            return attention.logits.softmax(-1) @ attention.value
        count, gone = math.prod(grid), self._removed(grid, self.agent_ratio)
        seed = None if self.seed is None else self.seed + site.layer
        batch = attention.hidden.shape[0]
        targets = TokenMatch("", "", (grid[0], grid[1]), self._stride, seed).places(batch)
        rows = []
        for row in range(batch):
            tokens = attention.hidden[row, prefix:].detach()
            edges = []
            for token in range(count):
                if token not in targets:
                    cosines = functional.cosine_similarity(tokens[token], tokens[targets], dim=-1)
                    edges.append((-float(cosines.max()), token, targets[int(cosines.argmax())]))
            edges.sort()
            groups = [self._groups(edges[:number], count) for number in (removed, gone)]
            query, key, value = (
                torch.cat([each[row, :, :prefix], _averaged(each[row, :, prefix:], groups[0])], dim=1)
                for each in (attention.query, attention.key, attention.value)
            )
            if (count - gone) * 2 < prefix + count - removed:
                agents = _averaged(attention.query[row, :, prefix:], groups[1])
                values = (scale * agents @ key.transpose(-2, -1)).softmax(-1) @ value
                output = (scale**self.power * query @ agents.transpose(-2, -1)).softmax(-1) @ values + self.shortcut * value
            else:
                output = (scale * query @ key.transpose(-2, -1)).softmax(-1) @ value
            whole = output.new_empty(output.shape[0], prefix + count, output.shape[2])
            whole[:, :prefix] = output[:, :prefix]
            for number, group in enumerate(groups[0]):
                whole[:, [prefix + token for token in group]] = output[:, prefix + number, None]
            rows.append(whole)
        return torch.stack(rows)

    @staticmethod
    def _groups(merged: list[tuple[float, int, int]], count: int) -> list[list[int]]:
        """The tokens of each merged token."""
        into = {source: target for _, source, target in merged}
        return [[token, *(s for s, target in into.items() if target == token)] for token in range(count) if token not in into]


def _averaged(tokens: torch.Tensor, groups: list[list[int]]) -> torch.Tensor:
    """[H, N, D] -> [H, groups, D]."""
    return torch.stack([tokens[:, group].mean(1) for group in groups], dim=1)
