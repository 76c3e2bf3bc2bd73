"""Token exit: from one layer on, a multimodal language model goes on without its visual tokens.

Wu et al. 2025, "Accelerating Multimodal Large Language Models via Dynamic Visual-Token Exit and the Empirical Findings" (DyVTE), finds
that text tokens have taken up what they need from the image well before the last layer. With the layer given this is its static form:

    layers 0 .. L-1 are unchanged;  layers L .. depth-1 run on  h[not visual]  with the positions those tokens had

The paper decides when with learned routers, prompt by prompt. With `router`, one of that width stands in front of each layer from `layer`
on, and L is the first layer at which it says so, with h what enters the layer, and t the text tokens behind the image but the last:

    leave > stay,   (stay, leave) = W_2 gelu(W_1 [mean_t h_t, h_last])

A router that was not trained never says so; `rewrite.fit_exit` trains them as the paper does.

With `relevance` the layer is found as the model runs, as in the second stage of ToDRE (Li et al. 2025), which removes all visual tokens
where their relevance to the task is low. That paper has no public code, and its abstract does not say how relevance is measured; here it is

    r_l = mean over heads of the attention that the last query of layer l gives to all visual tokens together

and L is the first layer, from `layer` on, with r_{L-1} < relevance. By either rule each prompt of a batch has an L of its own.

Kept tokens keep their position numbers and the KV caches of the later layers hold no visual keys, so on the kept tokens the result is
that of the unshortened model with the visual keys masked in layers L and later.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

import torch

from rewrite.ir import (
    CHANGES_NOTHING,
    AttentionInputs,
    Exit,
    Fits,
    Irrelevant,
    NotApplicableError,
    Pass,
    Program,
    Received,
    Routed,
    Site,
    parameter,
    register_pass,
)


@register_pass
@dataclass(frozen=True)
class TokenExit(Pass):
    """All visual tokens leave in front of layer `layer` of every stack that has them.

    The static form has no published layer: half the depth is this project's default, and layer 1 with `relevance` or `router`. There each
    layer that may be the one looks at a row of the attention before it, or asks a router; where no token leaves, that and copies of the
    stream are the cost, and no gain. Routers are 2048 wide in the paper. Raises `NotApplicableError` when applied to a stack with fewer
    than `layer` layers.
    """

    name = "token_exit"
    family = "prune"
    paper = "Wu, Lin, Zhou, Ye, Zeng, Sun, Ji: Dynamic Visual-Token Exit (DyVTE), NeurIPS 2025 (arXiv 2411.19628)"
    formula = "h_l = h_l[not visual] for layers l >= L"
    fits = Fits(kinds=frozenset({"self"}), visual=True, unusual=True, fixed=True)

    layer: int | Literal["never"] | None = parameter(
        None, 'the first layer without visual tokens, from 0; None is half the depth, "never" changes nothing'
    )
    relevance: float | None = parameter(
        None, "from `layer` on tokens leave where the last query gives them less attention than this; None: at `layer`"
    )
    router: int | None = parameter(None, "width of learned routers, from `layer` on, that say when tokens leave; None: there are none")

    def check(self) -> None:
        self.require(not isinstance(self.layer, int) or self.layer >= 0, "layer", 'at least 0, "never" or None')
        self.require(self.relevance is None or 0.0 < self.relevance <= 1.0, "relevance", "above 0 and at most 1, or None")
        self.require(self.router is None or (self.router > 0 and self.relevance is None), "router", "above 0, without relevance, or None")
        self.require(self.relevance is None or self.layer != 0, "layer", "at least 1 where relevance is given: the layer before is read")

    @classmethod
    def identity(cls) -> Self:
        return cls(layer="never")

    def adds_parameters(self) -> bool:
        return self.router is not None and self.layer != "never"

    def first_layer(self, depth: int) -> int:
        """The first layer without visual tokens in a stack of `depth` layers; `depth` where they never leave."""
        if self.layer is None:
            return depth // 2 if self.relevance is None and self.router is None else 1
        return depth if self.layer == "never" else self.layer

    def apply(self, program: Program) -> Program:
        for stack in sorted({site.stack for site in program.sites}):
            program = self._apply_to_stack(program, stack)
        return program

    def _apply_to_stack(self, program: Program, stack: int) -> Program:
        """One exit for the whole stack, or none: tokens cannot leave some of its later layers only."""
        sites = tuple(site for site in program.sites if site.stack == stack)
        against = {site.name: self.fits.reason_against(site) for site in sites}
        holders = tuple(site for site in sites if site.layout.visual and site.kind in self.fits.kinds)
        depth = max(site.depth for site in sites)
        layer = self.first_layer(depth)
        if holders and layer > depth:
            raise NotApplicableError(
                f"{self}: {holders[0].name} is in a stack of {depth} layers; the visual tokens can leave in front of 0 to {depth - 1}"
            )
        leaving = tuple(site for site in holders if site.layer >= layer)
        if leaving and (self.relevance is not None or self.router is not None):
            missing = set(range(layer - (self.router is None), depth)) - {site.layer for site in sites}
            if missing:
                against |= dict.fromkeys((site.name for site in leaving), f"layer {min(missing)} is in another graph of the call")
        blocking = next((site for site in leaving if against[site.name] is not None), None)
        if blocking is not None:
            otherwise = f"the visual tokens would have to leave {blocking.name} too, and there {against[blocking.name]}"
            leaving = ()
        elif layer < depth:
            otherwise = f"it comes before layer {layer}, where the visual tokens leave"
        else:
            otherwise = f"the visual tokens leave after its stack's {depth} layers, which {CHANGES_NOTHING}"
        for site in sites:
            if site not in leaving:
                program = program.with_declined(site, str(self), against[site.name] or otherwise)
        return program.with_exits(self._exits(sites, stack, layer), leaving) if leaving else program

    def _exits(self, sites: tuple[Site, ...], stack: int, first: int) -> tuple[Exit, ...]:
        """The exits of a stack: one, or one for each layer that may be it."""
        if self.router is not None:
            return tuple(Exit(stack, site.layer, str(self), Routed(self.router)) for site in sites if site.layer >= first)
        if self.relevance is None:
            return (Exit(stack, first, by=str(self)),)
        read = {site.layer + 1: Irrelevant(Received((site.name,), (-1, None)), self.relevance) for site in sites}
        return tuple(Exit(stack, layer, str(self), when) for layer, when in sorted(read.items()) if first <= layer < max(read))

    def reference(self, attention: AttentionInputs) -> torch.Tensor:
        """Attention with the visual keys masked, where they have left. Rows of queries that have left themselves mean nothing.

        With `relevance` or `router`, at a layer in front of which they left.
        """
        logits, site = attention.logits, attention.site
        if attention.visual is not None and site.layout.visual and site.layer >= self.first_layer(site.depth):
            logits = logits.masked_fill(_per_key(attention.visual), -torch.inf)
        return logits.softmax(-1).nan_to_num(0.0) @ attention.value


def _per_key(visual: torch.Tensor) -> torch.Tensor:
    """[B, Nk] -> [B, 1, 1, Nk]."""
    return visual[:, None, None, :]
