"""Sparsifiner: a map of low rank, predicted cheaply, says which keys each query attends to.

Wei et al. 2023, "Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers". With L a linear layer from
the head dim D to D / reduce_channels, shared by queries, keys and heads, and N tokens brought down to K = N // reduce_tokens:

    c    = softmax_k(D^-0.5 L(q) (L(k)^T down))        [N, K], of which each query keeps its `coefficients` greatest
    m    = c u^T                                       [N, N], u = up [N, K] without its entries of magnitude `threshold` or less
    out  = sum_j softmax_j(score[i,j]) v[j]            over the ceil(keep * N) keys of the greatest m[i,j]

in every head by itself; the rows of CLS and registers are full. The released code scales c by H^-0.5 (scale="heads").

The choice of keys is hard: no gradient of the model's loss reaches L, down and up. The paper trains them by bringing m close to the map of
the dense model, and the model behind them by distillation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, Self

import sympy
import torch

from passes import layers as layers_
from passes.sparsify.narrowing import attended
from rewrite.ir import Attend, AttentionInputs, Fits, Fitting, Parameter, Pass, Site, SparseMap, parameter, register_pass, tensor

MAP = "sparse_map"

# What the paper's parameters start from (vision transformers' usual 0.02).
INITIAL_DEVIATION = 0.02


@register_pass
@dataclass(frozen=True)
class Sparsifiner(Pass):
    """Each query keeps the share `keep` of its keys, those of the greatest predicted attention.

    Adds, for a site of N tokens, sparsifiner_weight [D', D], sparsifiner_bias [D'], sparsifiner_down and sparsifiner_up [N, K], with
    D' = D // reduce_channels and K = N // reduce_tokens: random at first and without a gradient (see above), so the choice means nothing
    until they were trained. They fix N: a call with another number of tokens raises `NotApplicableError`. The kept keys lie anywhere, in
    every head elsewhere, so this takes no less time than dense attention (nor does the released code), and a byte for each pair.
    """

    name = "sparsifiner"
    family = "sparsify"
    paper = (
        "Wei, Duke, Jiang, Aarabi, Taylor, Shkurti: Sparsifiner: Learning Sparse Instance-Dependent Attention, CVPR 2023 (arXiv 2303.13755)"
    )
    formula = "m = top_c(softmax(D^-0.5 L(q) (L(k)^T down))) up^T; out[i] = sum_j softmax_j(score[i,j]) v[j], j in top_keep(m[i])"
    training_free = False
    fits = Fits(kinds=frozenset({"self"}), causal=False, cached=False)
    fitting = Fitting(compares="map")

    keep: float = parameter(0.25, "share of the keys that each query keeps; 1 changes nothing")
    reduce_channels: int = parameter(2, "head dim over the width that queries and keys are narrowed to")
    reduce_tokens: int = parameter(6, "tokens over the rank of the map")
    coefficients: int = parameter(8, "coefficients that each query keeps of its row of the map")
    threshold: float = parameter(0.02, "entries of the basis of at most this magnitude are left out")
    scale: Literal["dim", "heads"] = parameter("dim", 'scale of the map: one over the root of the head dim, or of the heads ("heads")')
    layers: tuple[int, ...] | None = parameter(None, "the layers of each stack to work on; None is every layer")

    def check(self) -> None:
        self.require(0.0 < self.keep <= 1.0, "keep", "above 0 and at most 1")
        for name in ("reduce_channels", "reduce_tokens", "coefficients"):
            self.require(getattr(self, name) >= 1, name, "at least 1")
        self.require(math.isfinite(self.threshold) and self.threshold >= 0.0, "threshold", "at least 0 and finite")
        self.require(layers_.are_layers(self.layers), "layers", layers_.RANGE)

    @classmethod
    def identity(cls) -> Self:
        return cls(keep=1.0)

    def adds_parameters(self) -> bool:
        return self.keep < 1.0

    def declines(self, site: Site) -> str | None:
        return next(self._reasons_against(site), None)

    def _reasons_against(self, site: Site) -> Iterator[str]:
        if reason := layers_.reason_against(self.layers, site):
            yield reason
        if len(site.body.attends()) != 1:
            yield f"an earlier pass made {len(site.body.attends())} attentions of it"
            return
        if site.layout.partial is not None:
            yield site.layout.partial
        queries, keys, width = site.dims["Nq"], site.dims["Nk"], site.dims["D"]
        if site.attend.mask != True:  # noqa: E712  (sympy.true equals True and is not it)
            yield f"it is masked ({site.attend.mask}), and the share that is kept is of all its keys"
        if queries != keys:
            yield f"it has {queries} queries and {keys} keys, and the map is of tokens by tokens"
        if keys < self.reduce_tokens:
            yield f"its {keys} tokens over reduce_tokens={self.reduce_tokens} leave a map of rank 0"
        if width < self.reduce_channels:
            yield f"its head dim {width} over reduce_channels={self.reduce_channels} leaves no channel"

    def _kept(self, tokens: int) -> int:
        return math.ceil(self.keep * tokens)

    def _scale(self, site: Site) -> float:
        return float((site.dims["D"] if self.scale == "dim" else site.dims["H"]) ** -0.5)

    def transform(self, site: Site) -> Site:
        attend, tokens, width = site.attend, site.dims["Nk"], site.dims["D"]
        if self._kept(tokens) == tokens:
            return site
        narrow, rank, start = width // self.reduce_channels, tokens // self.reduce_tokens, ("normal", INITIAL_DEVIATION)
        parameters = (
            Parameter("sparsifiner_weight", (narrow, width), start, trainable=False),
            Parameter("sparsifiner_bias", (narrow,), trainable=False),
            Parameter("sparsifiner_down", (tokens, rank), start, trainable=False),
            Parameter("sparsifiner_up", (tokens, rank), start, trainable=False),
        )
        weight, bias, down, up = (each.name for each in parameters)
        facts = (self._kept(tokens), self._scale(site), self.coefficients, self.threshold, site.layout.prefix)
        seen = sympy.Ne(tensor(MAP, "bhij"), 0)
        operations = (replace(each, mask=seen) if isinstance(each, Attend) else each for each in site.body.operations)
        return site.with_operations(
            SparseMap(MAP, attend.query, attend.key, weight, bias, down, up, *facts), *operations, parameters=parameters
        )

    def reference(self, attention: AttentionInputs) -> torch.Tensor:
        """Query by query."""
        site, (tokens, keys) = attention.site, attention.logits.shape[-2:]
        seen = torch.ones(attention.logits.shape, dtype=torch.bool)
        if self._kept(keys) < keys:
            weight, bias, down, up = (attention.parameters[f"sparsifiner_{name}"] for name in ("weight", "bias", "down", "up"))
            basis = torch.where(up.abs() > self.threshold, up, 0.0)
            for row, head in torch.cartesian_prod(torch.arange(seen.shape[0]), torch.arange(seen.shape[1])).tolist():
                query, key = attention.query[row, head] @ weight.T + bias, attention.key[row, head] @ weight.T + bias
                shares = (self._scale(site) * query @ (down.T @ key).T).softmax(-1)
                for token in range(site.layout.prefix, tokens):
                    greatest = shares[token].argsort(descending=True)[: self.coefficients]
                    likes = basis[:, greatest] @ shares[token, greatest]
                    seen[row, head, token] = False
                    seen[row, head, token, likes.argsort(descending=True)[: self._kept(keys)]] = True
        return attended(attention, seen)

    def attention_map(self, attention: AttentionInputs) -> torch.Tensor:
        """m, whose gradient goes through the coefficients and the entries of the basis that are kept."""
        weight, bias, down, up = (attention.parameters[f"sparsifiner_{name}"] for name in ("weight", "bias", "down", "up"))
        query, key = (torch.nn.functional.linear(tokens, weight, bias) for tokens in (attention.query, attention.key))
        shares = (self._scale(attention.site) * query @ (key.transpose(-2, -1) @ down)).softmax(-1)
        kept = shares.topk(min(self.coefficients, shares.shape[-1])).indices
        shares = shares * torch.zeros_like(shares).scatter(-1, kept, 1.0)
        return shares @ torch.where(up.abs() > self.threshold, up, 0.0).T
