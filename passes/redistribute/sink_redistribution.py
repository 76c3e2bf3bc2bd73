"""Visual attention redistribution (VAR): attention that sinks into a few tokens goes to the image instead.

Kang et al. 2025, "See What You Are Told: Visual Attention Sink in Large Multimodal Models", ICLR 2025. A token is a sink where
a channel of its hidden state is massive; sinks among the visual tokens draw attention without meaning. In a head that looks at the
image but not mainly at its sinks, for a query after the image, with m_g the softmax mass of the keys of group g:

    selected = m_visual_sink <= rho * sum_{j in image} (a[j] + 1e-6)   and   m_visual + m_visual_sink >= summ
    a'[sink] = p * a[sink]                                             visual sinks and text sinks
    a'[visual] = (1 + (1 - p) * (m_visual_sink + m_text_sink) / m_visual) * a[visual]

Everything else is unchanged, and rows still sum to one: four masses per (head, query) decide, and no attention map is needed. The 1e-6
per image token is the published code's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Self

import sympy
import torch

from rewrite.ir import AttentionInputs, Fits, Groups, NotApplicableError, Pass, SinkGroups, Site, mass, parameter, register_pass, tensor

# In the order of the codes that SinkGroups gives.
GROUPS = ("text", "visual", "visual_sink", "text_sink")

# Added by the published code to each image token's weight in the denominator of the sinks' portion.
PORTION_EPSILON = 1e-6

# Keeps the unselected branch of the visual factor finite: a selected one has a mass well above it.
LEAST_MASS = 1e-20


@register_pass
@dataclass(frozen=True)
class SinkRedistribution(Pass):
    """Takes the share 1 - p of the attention on sinks, in the selected heads, and gives it to the other visual tokens.

    dims are the channels that become massive in the model at hand; the paper's are (2533, 1415) for LLaMA-2-7B and (2100, 4743) for
    LLaMA-2-13B. Empty takes the greatest of all channels, which needs no knowledge of the model and finds sinks of other channels too.
    Raises `NotApplicableError` when applied to hidden states without one of the channels.
    """

    name = "sink_redistribution"
    family = "redistribute"
    paper = "Kang, Kim, Kim, Hwang: See What You Are Told: Visual Attention Sink in Large Multimodal Models, ICLR 2025 (arXiv 2503.03321)"
    formula = "a'[sink] = p a[sink]; a'[visual] = a[visual] (1 + (1-p) m_sinks / m_visual), in heads with portion <= rho, image >= summ"
    fits = Fits(kinds=frozenset({"self"}), causal=True, visual=True, hidden=True)

    p: float = parameter(0.6, "share of their attention that sinks keep; 1 changes nothing")
    rho: float = parameter(0.5, "greatest portion of a head's attention to the image that may go to its sinks")
    summ: float = parameter(0.2, "least attention of a head to the image")
    tau: float = parameter(20.0, "a token is a sink where a channel exceeds tau times the root mean square of all")
    dims: tuple[int, ...] = parameter((), "channels that sinks are known by; empty is every channel")
    first_layer: int = parameter(2, "layers before this one are left alone, sinks having not yet formed")
    except_last: bool = parameter(True, "leave the last layer alone")

    def check(self) -> None:
        for name in ("p", "rho", "summ"):
            self.require(0.0 <= getattr(self, name) <= 1.0, name, "between 0 and 1")
        self.require(math.isfinite(self.tau) and self.tau > 0.0, "tau", "positive and finite")
        self.require(len(set(self.dims)) == len(self.dims) and all(c >= 0 for c in self.dims), "dims", "channels from 0, each once")
        self.require(self.first_layer >= 0, "first_layer", "at least 0")

    @classmethod
    def identity(cls) -> Self:
        return cls(p=1.0)

    def declines(self, site: Site) -> str | None:
        if site.layer < self.first_layer:
            return f"it is layer {site.layer}, before first_layer={self.first_layer}"
        if self.except_last and site.layer == site.depth - 1:
            return f"it is layer {site.layer}, the last one (except_last=True)"
        if not site.is_plain:
            return f"an earlier pass changed it: it is made of {len(site.body.operations)} operations"
        return None

    def transform(self, site: Site) -> Site:
        channels = site.dims["C"]
        beyond = [channel for channel in self.dims if channel >= channels]
        if beyond:
            raise NotApplicableError(
                f"{self}: {site.name} has hidden states of {channels} channels, 0 to {channels - 1}; there is no channel {beyond[0]}"
            )
        if self.p == 1.0:
            return site
        sinks = SinkGroups("sink_group", "sink_active", "sink_count", "hidden", "visual", self.dims, self.tau)
        return site.with_operations(sinks, replace(site.attend, groups=Groups(sinks.result, GROUPS, self._weights(sinks))))

    def _weights(self, sinks: SinkGroups) -> tuple[sympy.Expr, ...]:
        """One factor per group, in the order of GROUPS."""
        visual, visual_sink, text_sink = mass("visual"), mass("visual_sink"), mass("text_sink")
        image = visual + visual_sink
        selected = sympy.And(
            sympy.Eq(tensor(sinks.active, "bi"), 1),
            visual_sink <= self.rho * (image + PORTION_EPSILON * tensor(sinks.count, "b")),
            image >= self.summ,
            visual > LEAST_MASS,
        )
        gain = 1 + (1 - self.p) * (visual_sink + text_sink) / sympy.Max(visual, LEAST_MASS)
        one = sympy.Integer(1)
        shrunk, grown = (sympy.Piecewise((factor, selected), (one, True)) for factor in (sympy.Float(self.p), gain))
        return one, grown, shrunk, shrunk

    def reference(self, attention: AttentionInputs) -> torch.Tensor:
        """The map itself changed, column by column, batch row by batch row."""
        weights = attention.logits.softmax(-1).nan_to_num(0.0)
        hidden, visual = attention.hidden, attention.visual
        if hidden is None or visual is None:
            raise NotApplicableError(f"{self}: {attention.site.name} gives no hidden states and visual positions")
        queries, keys = weights.shape[-2:]
        relative = hidden.abs() / (hidden.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
        peak = (relative[..., list(self.dims)] if self.dims else relative).max(-1).values
        result = weights.clone()
        for row in range(weights.shape[0]):
            image = visual[row].nonzero().flatten()
            sinks = (peak[row] > self.tau).nonzero().flatten()
            image_sinks = torch.tensor([key for key in sinks.tolist() if visual[row, key]], dtype=torch.long)
            others = torch.tensor([key for key in image.tolist() if key not in image_sinks.tolist()], dtype=torch.long)
            if not len(image_sinks) or not len(others):
                continue
            for query in range(queries):
                if keys - queries + query <= int(image.max()):
                    continue
                before = weights[row, :, query]
                portion = before[:, image_sinks].sum(-1) / (before[:, image] + PORTION_EPSILON).sum(-1)
                for head in ((portion <= self.rho) & (before[:, image].sum(-1) >= self.summ)).nonzero().flatten().tolist():
                    freed = (1 - self.p) * before[head, sinks].sum()
                    result[row, head, query, sinks] = self.p * before[head, sinks]
                    result[row, head, query, others] += freed * before[head, others] / before[head, others].sum()
        return result @ attention.value
