"""Which keys of a site are no padding, where rows of its batch keep different numbers of tokens: an operand of its attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, fx

from rewrite.ir.errors import ModelCallError
from rewrite.lower.lowering import traced
from rewrite.lower.stand_ins import StandIns
from rewrite.recognise.operators import hinted_shape, value_of
from rewrite.recognise.sites import Found
from rewrite.tokens import choose
from rewrite.tokens.marks import unmarked
from rewrite.tokens.placement import Selection


def every_place(cache: Tensor) -> Tensor:
    """bool [B, L] of a KV cache entry [B, H, L, D] in which no token is padding."""
    return cache.new_ones(cache.shape[0], cache.shape[2], dtype=torch.bool)


class PresentKeys:
    """The operand `present` of every site of a graph that has it.

    noted: whether the note of an input says that tokens left it. taken: which tokens of such an input are no padding, as a node. new: of
    the tokens of this call, what stands in for that. operands: by name of a site. cached: bool [B, L] of caches that tokens left, by input;
    they have the tokens that are left, as their notes say.
    """

    def __init__(self, graph: fx.Graph, noted: Callable[[fx.Node], bool], taken: Callable[[fx.Node], fx.Node]) -> None:
        self.graph, self.noted, self.taken = graph, noted, taken
        self.new = StandIns(graph, choose.every_token_present)
        self.operands: dict[str, fx.Node] = {}
        self.cached: dict[fx.Node, fx.Node] = {}

    def of(self, entry: Found) -> fx.Node:
        """bool [B, Nk], at the place where the site's keys are known."""
        fixed = entry.site.fixed and entry.site.cached
        self.operands[entry.site.name] = self._unmarked(entry) if fixed else self.joined(entry, self.new.stand_in(entry))
        return self.operands[entry.site.name]

    def joined(self, entry: Found, new: fx.Node) -> fx.Node:
        """bool [B, Nk] of a site's cached keys and those of the `new` tokens [B, N]."""
        if not entry.cache:
            return new
        before = entry.cache[0]
        if self.noted(before) and before not in self.cached:
            self.cached[before] = self.taken(before)
            self.cached[before].meta["example_value"] = every_place(value_of(before))
        with self.graph.inserting_after(new):
            there = self.cached.get(before) or traced(self.graph.call_function(every_place, (before,)))
        with self.graph.inserting_after(max(new, there)):
            return traced(self.graph.call_function(torch.cat, ([there, new], 1)))

    def seeds(self, short: Mapping[fx.Node, Mapping[int, Selection]]) -> dict[fx.Node, dict[int, Selection]]:
        """What is read off caches that tokens left, as seeds; short: those caches as such."""
        return {present: {1: short[cache][2]} for cache, present in self.cached.items()}

    def _unmarked(self, entry: Found) -> fx.Node:
        """[B, M] bool: in which places of a site's KV cache of fixed length there is no token that left."""
        write = entry.writes[0]
        if len(entry.writes) > 1 or hinted_shape(write.node)[2] != entry.region.sizes["Nk"]:
            raise ModelCallError(
                f"{entry.site.name} reads a part of a KV cache of fixed length that visual tokens left, which is not followed: use a cache "
                "that grows with the tokens"
            )
        with self.graph.inserting_after(write.node):
            return traced(self.graph.call_function(unmarked, (write.node,)))
