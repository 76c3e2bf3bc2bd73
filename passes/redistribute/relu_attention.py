"""ReLU attention and scaling attention: normalisers without an exponential, chosen head by head.

Zeng et al. 2023, "MPCViT: Searching for Accurate and Efficient MPC-Friendly Vision Transformer with Heterogeneous Attention". With a the
logits and n the number of keys, a head is one of

    ReLU attention       w[i,j] = relu(a[i,j]) / (sum_j relu(a[i,j]) + 1e-5)
    scaling attention    w[i,j] = a[i,j] / n

and which is which comes from the paper's search, which is no part of this pass. Both need training.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import sympy
import torch

from passes import layers as layers_
from passes.redistribute import row_length as row_length_
from rewrite.ir import TOTAL, AttentionInputs, Fits, H, J, Pass, Site, parameter, register_pass, tensors_in

# Added by the published code to the sum that ReLU attention divides by.
EPSILON = 1e-5


@register_pass
@dataclass(frozen=True)
class ReluAttention(Pass):
    """Hidden keys weigh nothing. n is row_len(i) (see `passes.redistribute.row_length`), in the paper's vision transformers every key.

    relu_heads: the heads with ReLU attention, the others having scaling attention; a tuple of such tuples has one for each layer of a
    stack; None is every head. divide="count" divides ReLU heads by n too. Scaling attention is declined where the score adds a tensor read
    by key: a model may hide keys by adding -inf, and a / n has no weight for that.
    """

    name = "relu_attention"
    family = "redistribute"
    paper = (
        "Zeng, Li, Xiong, Tong, Lu, Tan, Wang, Huang: MPCViT: Searching for Accurate and Efficient MPC-Friendly Vision Transformer with "
        "Heterogeneous Attention, ICCV 2023 (arXiv 2211.13955)"
    )
    formula = "w[i,j] = relu(score[i,j]) / (sum_j relu(score[i,j]) + 1e-5), or score[i,j] / n, by head"
    training_free = False
    fits = Fits(kinds=frozenset({"self"}))

    relu_heads: tuple[int, ...] | tuple[tuple[int, ...], ...] | None = parameter(
        None, "the heads with ReLU attention, or a tuple of them per layer; the others have scaling attention; None is every head"
    )
    divide: Literal["sum", "count"] = parameter("sum", 'what ReLU heads divide by: "sum" of their scores, "count" of the keys')
    layers: tuple[int, ...] | None = parameter(None, "the layers of each stack to work on; None is every layer")

    def check(self) -> None:
        self.require(all(_are_heads(heads) for heads in self._each()), "relu_heads", "head numbers from 0, each once")
        self.require(layers_.are_layers(self.layers), "layers", layers_.RANGE)

    def _each(self) -> tuple[tuple[int, ...], ...]:
        """One entry, or one for each layer."""
        if self.relu_heads is None:
            return ()
        by_layer = tuple(entry for entry in self.relu_heads if isinstance(entry, tuple))
        return by_layer or (tuple(entry for entry in self.relu_heads if isinstance(entry, int)),)

    @property
    def _by_layer(self) -> bool:
        return self.relu_heads is not None and any(isinstance(entry, tuple) for entry in self.relu_heads)

    def heads(self, site: Site) -> tuple[int, ...]:
        """The heads of a site that have ReLU attention, in a site that this pass does not decline."""
        if self.relu_heads is None:
            return tuple(range(site.dims["H"]))
        return self._each()[site.layer if self._by_layer else 0]

    def declines(self, site: Site) -> str | None:
        return next(self._reasons_against(site), None)

    def _reasons_against(self, site: Site) -> Iterator[str]:
        if reason := layers_.reason_against(self.layers, site):
            yield reason
        if not site.is_plain:
            yield f"an earlier pass changed it: it is made of {len(site.body.operations)} operations"
            return
        if self._by_layer and site.layer >= len(self._each()):
            yield f"it is layer {site.layer}, and relu_heads has entries for {len(self._each())} layers"
            return
        heads, count = self.heads(site), site.dims["H"]
        if any(head >= count for head in heads):
            yield f"it has {count} heads, 0 to {count - 1}, and relu_heads={heads!r} names head {max(heads)}"
        scaled = len(heads) < count
        if (scaled or self.divide == "count") and (unknown := row_length_.reason_against(site)):
            yield unknown
        by_key = [name for name, places in tensors_in(site.attend.score).items() if any(J in place.free_symbols for place in places)]
        if scaled and by_key:
            yield f"its score adds {', '.join(by_key)}, which may hide keys with -inf, and scaling attention has no weight for that"

    def transform(self, site: Site) -> Site:
        score, heads = site.attend.score, self.heads(site)
        rectifies = _one_of(heads, site.dims["H"])
        score = _by_head(rectifies, sympy.Max(0, score), score)
        if self.divide == "count" or not heads:
            return site.with_operations(replace(site.attend, score=score / row_length_.row_length(site), normaliser="none"))
        denominator = _by_head(rectifies, TOTAL + EPSILON, row_length_.row_length(site))
        return site.with_operations(replace(site.attend, score=score, normaliser="sum", denominator=denominator))

    def reference(self, attention: AttentionInputs) -> torch.Tensor:
        """Head by head."""
        rectified, outputs = self.heads(attention.site), []
        for head, logits in enumerate(attention.logits.unbind(1)):
            scores = logits.clamp(min=0.0) if head in rectified else logits.masked_fill(logits == -torch.inf, 0.0)
            by_sum = head in rectified and self.divide == "sum"
            divisor = scores.sum(-1, keepdim=True) + EPSILON if by_sum else row_length_.row_lengths(attention.site, attention.logits)
            outputs.append(scores / divisor @ attention.value[:, head])
        return torch.stack(outputs, dim=1)


def _are_heads(heads: tuple[int, ...]) -> bool:
    return len(set(heads)) == len(heads) and min(heads, default=0) >= 0


def _one_of(heads: tuple[int, ...], count: int) -> sympy.Basic:
    """The predicate that h is one of the heads."""
    return sympy.true if len(heads) == count else sympy.Or(*(sympy.Eq(H, head) for head in heads))


def _by_head(chosen: sympy.Basic, yes: sympy.Expr, no: sympy.Expr) -> sympy.Expr:
    """`yes` where the head is chosen; sympy gives the piece itself where the predicate is constant."""
    return sympy.Piecewise((yes, chosen), (no, True))
