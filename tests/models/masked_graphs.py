"""The original model with tokens masked or merged, whatever its code looks like: its captured graphs, run node by node.

The attention of one stack of layers is computed from its IR with the dropped tokens masked, and nothing is added to these any more;
everything else is the model's own operators. Where tokens merge, every one of them goes on holding the merged value: attention then counts
it as often as it stands for tokens. Where what leaves is fused into one token more, the first of those that left has its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
import torch
from torch import fx, nn

from rewrite import Site
from rewrite.compiled import WHOLE_GRAPHS
from rewrite.engine import copy_graph
from rewrite.ir.expression import B, J, read
from rewrite.ir.semantics import attention_weights
from rewrite.lower.residual import behind_attention, behind_layer
from rewrite.recognise.region import viewed
from rewrite.recognise.sites import Found, recognise
from rewrite.runner import CAPTURE_ERRORS
from tests.models.oracles import Rule, groups_of

ALIVE = "alive"


@dataclass
class Masked:
    """A Dynamo backend. of: whether a site is in the stack. before, behind: see `Survivors`; layers count from 0 over the whole call, or,
    with `begin`, in each stack of a graph: that is called with the first site of each, where no token has left.

    joined: (tokens in front of the stack's, all of them) in attention behind it to these and others; None: there is no such attention.
    merges: by layer, how many tokens its keys merge away, of which the first `prefix` and the last `suffix` stay; fuses: likewise of
    MCTF, by the map of the layer. fused: what leaves behind a layer is fused, weighed by the attention of CLS, at the places `spare` [B].
    seen_by: what each layer saw. weights, operands: of every attention that is not of the stack, by name. entered: the stream in front of
    the last layer that was. remade: by the name of a site and where in its layer ("behind", "patches"), what becomes of the tokens there.
    """

    of: Callable[[Site], bool]
    before: dict[int, Rule] = field(default_factory=dict)
    behind: dict[int, Rule] = field(default_factory=dict)
    merges: dict[int, int] = field(default_factory=dict)
    fuses: dict[int, int] = field(default_factory=dict)
    fused: bool = False
    remade: dict[tuple[str, str], Callable[[torch.Tensor], torch.Tensor]] = field(default_factory=dict)
    prefix: int = 0
    suffix: int = 0
    alive: torch.Tensor | None = None
    seen: torch.Tensor | None = None
    seen_by: dict[int, torch.Tensor] = field(default_factory=dict)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    operands: dict[str, Mapping[str, torch.Tensor]] = field(default_factory=dict)
    entered: torch.Tensor | None = None
    spare: torch.Tensor | None = None
    fusing: tuple[torch.Tensor, torch.Tensor] | None = None
    layer: int = -1
    groups: list[list[list[int]]] | None = None
    begin: Callable[[Masked, Site], None] | None = None
    joined: tuple[int, int] | None = None
    stack: tuple[int, int] | None = None

    def run(self, model: nn.Module, inputs: Mapping[str, Any]) -> Any:
        """The model's result, captured as `rewrite()` captures it."""
        torch._dynamo.reset()
        with torch.no_grad():
            model(**inputs)  # what a model sets up at its first call would cut the capture
            for settings in (WHOLE_GRAPHS, {}):
                self.alive, self.groups, self.layer, self.stack, self.spare = None, None, -1, None, None
                self.weights.clear()
                self.operands.clear()
                try:
                    with torch._dynamo.config.patch(settings):
                        return torch.compile(model, backend=self)(**inputs)
                except CAPTURE_ERRORS:
                    if not settings:
                        raise
                torch._dynamo.reset()
        return None

    def __call__(self, module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        own = copy_graph(module)
        given = [node for node in own.graph.nodes if node.op == "placeholder"]
        found = recognise(own.graph, dict(zip(given, inputs, strict=True))).found
        own.recompile()
        return lambda *values: _Run(own, found, self).run(*values)

    def enter(self, graph: fx.Graph, site: Site) -> None:
        """Begin with every token where an earlier attention of the graph was of another stack."""
        here = id(graph), site.stack
        if self.begin is not None and (self.stack is None or (self.stack[0] == here[0] and self.stack != here)):
            self.alive, self.groups, self.layer, self.spare = None, None, -1, None
            self.begin(self, site)
        self.stack = here

    def attended(
        self, entry: Found, values: Mapping[str, torch.Tensor], value_of: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor | None:
        """What an attention of the stack gives, [B, H, Nq, Dv]; None where the model's own result stands.

        value_of: what its value would be, were its layer entered by another stream; that is then what all that follows sees.
        """
        attend = entry.site.attend
        if not self.of(entry.site):
            self.weights[entry.site.name], self.operands[entry.site.name] = attention_weights(attend, dict(values)), values
            return self.pooled(entry.site, values)
        self.enter(entry.region.output.graph, entry.site)
        self.layer += 1
        self.fusing = None
        batch, tokens = values["key"].shape[0], values["key"].shape[2]
        if self.alive is None:
            self.alive = torch.ones(batch, tokens, dtype=torch.bool)
        seen = replace(attend, mask=sympy.And(attend.mask, sympy.Ne(read(ALIVE, B, J), 0)))
        weights = attention_weights(seen, {**values, ALIVE: self.alive.float()})
        if self.layer in self.before:
            self.alive = self.before[self.layer](weights, self.alive)
            weights = attention_weights(seen, {**values, ALIVE: self.alive.float()})
        self.seen = self.seen_by[self.layer] = self.alive
        if self.layer in self.behind:
            self.alive = self.behind[self.layer](weights, self.alive)
            if self.fused:
                leaving = self.seen & ~self.alive
                self.spare = leaving.long().argmax(1)
                self.fusing = self.spare, weights[:, :, 0].mean(1) * leaving
                self.alive = self.alive.scatter(1, self.spare[:, None], True)
        if self.layer in self.fuses:
            return self.fused_ahead(weights, value_of)
        return weights @ values["value"].repeat_interleave(weights.shape[1] // values["value"].shape[1], dim=1)

    def pooled(self, site: Site, values: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """Attention of a few queries to what is left of the stack."""
        keys = values["key"].shape[2]
        beside = None if self.alive is None else self.behind_all(self.alive)
        if beside is not None and keys == beside.shape[1]:
            return self.hidden(site, values, beside)
        if (
            self.merges
            or self.fuses
            or self.alive is None
            or site.kind != "cross"
            or keys not in (self.alive.shape[1], self.alive.shape[1] - self.prefix)
        ):
            return None
        return self.hidden(site, values, self.alive[:, -keys:])

    def behind_all(self, alive: torch.Tensor) -> torch.Tensor | None:
        """Likewise, of the tokens that the stack's were joined to."""
        if self.joined is None:
            return None
        first, every = self.joined
        return nn.functional.pad(alive, (first, every - first - alive.shape[1]), value=True)

    @staticmethod
    def hidden(site: Site, values: Mapping[str, torch.Tensor], alive: torch.Tensor) -> torch.Tensor:
        """Attention to the keys that are left [B, Nk]."""
        seen = replace(site.attend, mask=sympy.And(site.attend.mask, sympy.Ne(read(ALIVE, B, J), 0)))
        return attention_weights(seen, {**values, ALIVE: alive.float()}) @ values["value"]

    def frozen(self, entry: Found, later: Found | None) -> Iterator[tuple[fx.Node, fx.Node, torch.Tensor]]:
        """The residual stream behind a layer's attention, behind the layer, and in front of the next, each with what it was before and what
        it changes of."""
        ahead, following = entry.stream, later.stream if later is not None else None
        assert self.seen is not None
        assert self.alive is not None
        if ahead is not None:
            behind = ((behind_attention(entry, ahead), self.seen), (behind_layer(entry), self.alive), (following, self.alive))
            for node, alive in behind:
                # Where attention and MLP are added at once, the next sum is the next layer's.
                if node is not None and node > ahead and (following is None or node <= following):
                    yield node, ahead, alive
                    ahead = node

    def fused_ahead(self, weights: torch.Tensor, value_of: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Every token that fuses with others in front of a layer holds what they become; the layer's map, fused too, times their values."""
        assert self.entered is not None
        stream = self.entered
        if self.groups is None:
            self.groups = [[[place] for place in range(stream.shape[1])] for _ in stream]
        made, averages = stream.clone(), []
        for row, groups in enumerate(self.groups):
            first = [group[0] for group in groups]
            sizes = torch.tensor([float(len(group)) for group in groups])
            received = torch.stack([weights[row][..., group].sum(-1) for group in groups], -1)[:, first].mean((0, 1))
            together = groups_of(stream[row, first], received, sizes, self.fuses[self.layer], self.prefix, self.suffix)
            self.groups[row] = [[place for one in ids for place in groups[one]] for ids in together]
            share = torch.zeros(stream.shape[1])
            share[first] = received * sizes
            averages.append([share / share[group].sum() for group in self.groups[row]])
            for group, average in zip(self.groups[row], averages[row], strict=True):
                made[row, group] = average[group] @ stream[row, group]
        value = value_of(made)
        result = weights @ value.repeat_interleave(weights.shape[1] // value.shape[1], dim=1)
        fused = result.clone()
        for row, groups in enumerate(self.groups):
            for group, average in zip(groups, averages[row], strict=True):
                fused[row][:, group] = (average[group, None] * result[row][:, group]).sum(1, keepdim=True)
        return fused

    def merged(self, stream: torch.Tensor, key: torch.Tensor, count: int) -> torch.Tensor:
        """Every token of [B, N, C] that merges with others holds their mean afterwards; `key` [B, H, N, D] says which are alike."""
        if self.groups is None:
            self.groups = [[[place] for place in range(stream.shape[1])] for _ in stream]
        result = stream.clone()
        for row, groups in enumerate(self.groups):
            metric = nn.functional.normalize(key[row].mean(0), dim=-1)
            alike = metric @ metric.T
            pairs = []
            end = len(groups) - self.suffix
            for even in range(0, len(groups), 2):
                odds = [odd for odd in range(1, len(groups), 2) if self.prefix <= odd < end]
                if self.prefix <= even < end:
                    pairs.append((*max((float(alike[groups[even][0], groups[odd][0]]), -odd) for odd in odds), even))
            pairs = sorted(pairs, key=lambda pair: (-pair[0], pair[2]))[: min(count, (end - self.prefix) // 2)]
            into = {even: -odd for _, odd, even in pairs}
            for even, odd in into.items():
                groups[odd] = groups[odd] + groups[even]
            self.groups[row] = [g for place, g in enumerate(groups) if place % 2 == 0 and place not in into] + groups[1::2]
            for group in self.groups[row]:
                result[row, group] = stream[row, group].mean(0)
        return result


class _Run(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, found: list[Found], masked: Masked) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.masked = masked
        self.sites = {entry.region.output: entry for entry in found}
        self.residuals: dict[fx.Node, tuple[Found, int]] = {}
        self.fusing: dict[fx.Node, tuple[torch.Tensor, torch.Tensor]] = {}
        self.remade = {node: made for entry in found for node, made in self.made_anew(entry)}
        self.frozen: dict[fx.Node, tuple[fx.Node, torch.Tensor]] = {}
        self.unfused: dict[fx.Node, torch.Tensor] = {}
        self.inside = self.nodes_inside([entry for entry in found if (masked.fused or masked.fuses) and masked.of(entry.site)])
        self.pools = any(entry.site.kind == "cross" for entry in found)

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        entry = self.sites.get(n)
        if entry is not None:
            region = entry.region
            values = {name: operand.layout.apply(self.env[operand.node]) for name, operand in region.operands().items()}
            self.masked.entered = None if entry.stream is None else self.env[entry.stream]
            made = self.masked.attended(entry, values, lambda stream: self.value_of(entry, stream))
            if made is not None:
                if not self.masked.merges and not self.masked.fuses and self.masked.of(entry.site):
                    later = next(
                        (one for one in self.sites.values() if one.site.layer > entry.site.layer and self.masked.of(one.site)), None
                    )
                    self.frozen.update({node: (ahead, alive) for node, ahead, alive in self.masked.frozen(entry, later)})
                    residual = None if entry.stream is None else behind_attention(entry, entry.stream)
                    if residual is not None and self.masked.fusing is not None:
                        self.fusing[residual] = self.masked.fusing
                if self.masked.layer in self.masked.merges and entry.stream is not None:
                    residual = behind_attention(entry, entry.stream)
                    if residual is not None:
                        self.residuals[residual] = (entry, self.masked.layer)
                permuted = made.permute(region.output_order)
                result = permuted if region.output_shape is None else viewed(permuted, region.output_shape)
        if n in self.remade:
            result = self.remade[n](result)
        if n in self.fusing:
            self.unfused[n] = result
            spare, share = self.fusing[n]
            result = result.scatter(1, spare[:, None, None].expand(-1, 1, result.shape[2]), share[:, None] @ result)
        if n in self.frozen:
            ahead, alive = self.frozen[n]
            result = torch.where(alive[..., None], result, self.env[ahead])
            if ahead in self.unfused and self.masked.spare is not None:
                place = self.masked.spare[:, None, None].expand(-1, 1, result.shape[2])
                self.unfused[n] = result.scatter(1, place, self.unfused[ahead].gather(1, place))
        if n in self.residuals:
            entry, layer = self.residuals[n]
            key = entry.region.key.layout.apply(self.env[entry.region.key.node])
            result = self.masked.merged(result, key, self.masked.merges[layer])
        return result

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[Any, Any]:
        """What reads the stream from outside its layers is given the model's own tokens, but attention that pools."""
        if n in self.inside or self.pools:
            return super().fetch_args_kwargs_from_env(n)
        return fx.map_arg((n.args, n.kwargs), lambda source: self.unfused.get(source, self.env[source]))  # type: ignore[no-any-return]

    @staticmethod
    def nodes_inside(stack: list[Found]) -> set[fx.Node]:
        """All that the layers of a stack are made of."""
        streams = [(entry.stream, entry.region.output, behind_layer(entry)) for entry in stack]
        found, left = set[fx.Node](), [node for each in streams for node in each if node is not None]
        while left:
            node = left.pop()
            if node not in found:
                found.add(node)
                left += node.all_input_nodes
        return found

    def made_anew(self, entry: Found) -> Iterator[tuple[fx.Node, Callable[[torch.Tensor], torch.Tensor]]]:
        places = {"behind": behind_layer(entry), "patches": entry.patches}
        for (name, place), made in self.masked.remade.items():
            node = places[place]
            if name.endswith(entry.site.name):  # behind a break paths are shorter
                assert node is not None
                yield node, made

    def value_of(self, entry: Found, stream: torch.Tensor) -> torch.Tensor:
        assert entry.stream is not None
        region, changed = entry.region, {entry.stream: stream}
        node = entry.stream.next
        while node is not region.output:
            if any(source in changed for source in node.all_input_nodes):
                given = fx.map_arg((node.args, node.kwargs), lambda source: changed.get(source, self.env.get(source)))
                changed[node] = getattr(self, node.op)(node.target, *given)
            node = node.next
        self.unfused[entry.stream] = self.env[entry.stream]
        self.env.update(changed)
        return region.value.layout.apply(changed[region.value.node])
