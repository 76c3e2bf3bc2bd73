"""The forms of attention that kernels are tested on, and random operands for them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import sympy
import torch
from sympy.logic.boolalg import Boolean

from rewrite.ir import NK, NQ, QK, TOTAL, Attend, B, G, Groups, H, HeadMix, I, J, Sigmoid, W, mass, read, tensor

SCALE = sympy.Float(0.125)


def plain() -> Attend:
    return Attend("result", "query", "key", "value", SCALE * QK)


def biased(axes: str) -> Attend:
    return replace(plain(), score=SCALE * QK + tensor("bias", axes))


def masked(axes: str) -> Attend:
    return replace(plain(), mask=sympy.Ne(tensor("mask", axes), 0))


def masked_by_block() -> Attend:
    """A mask of blocks, as methods that choose them from the data have it."""
    return replace(plain(), mask=sympy.Ne(read("mask", B, sympy.floor(I / 5), sympy.floor(J / 9)), 0))


def packed(*more: Boolean) -> Attend:
    """Sequences one after the other in a row, each seeing itself."""
    return replace(plain(), mask=sympy.And(sympy.Eq(tensor("query_segments", "bi"), tensor("key_segments", "bj")), *more))


def causal() -> Attend:
    return replace(plain(), mask=sympy.Le(J, I + (NK - NQ)))


def padded() -> Attend:
    """What is later is hidden, and so is padding: the first queries may see no key."""
    return replace(biased("bhj"), mask=sympy.And(causal().mask, sympy.Ne(tensor("mask", "bj"), 0)))


def softcap() -> Attend:
    return replace(plain(), score=30 * sympy.tanh(SCALE * QK / 30), mask=sympy.Le(J, I + (NK - NQ)))


def _window(x: sympy.Expr, y: sympy.Expr, length: int, window: int, dilation: int) -> sympy.Expr:
    """y in the neighbourhood of x on a line: the `window` positions of x's residue class nearest to x, clipped at the ends."""
    place, residue = sympy.floor(x / dilation), sympy.Mod(x, dilation)
    count = sympy.floor((length - 1 - residue) / dilation) + 1
    first = sympy.Max(0, sympy.Min(place - window // 2, count - window))
    other = sympy.floor(y / dilation)
    return sympy.And(sympy.Eq(sympy.Mod(y, dilation), residue), other >= first, other < first + window)


def neighbourhood_1d(length: int, window: int, dilation: int = 1, prefix: int = 0) -> Attend:
    near = _window(I - prefix, J - prefix, length, window, dilation)
    return replace(plain(), mask=sympy.Or(sympy.Lt(I, prefix), sympy.Lt(J, prefix), near) if prefix else near)


def neighbourhood_2d(height: int, width: int, window: int, dilation: int = 1, prefix: int = 0) -> Attend:
    x, y = I - prefix, J - prefix
    rows = _window(sympy.floor(x / width), sympy.floor(y / width), height, window, dilation)
    columns = _window(sympy.Mod(x, width), sympy.Mod(y, width), width, window, dilation)
    near = sympy.And(rows, columns)
    return replace(plain(), mask=sympy.Or(sympy.Lt(I, prefix), sympy.Lt(J, prefix), near) if prefix else near)


def empty_rows() -> Attend:
    """Every third query sees nothing, the others every second key."""
    return replace(plain(), mask=sympy.And(sympy.Ne(sympy.Mod(I, 3), 1), sympy.Eq(sympy.Mod(J, 2), 0)))


NAMES = ("text", "visual", "visual_sink", "text_sink")


def grouped(is_causal: bool = True) -> Attend:
    """Redistribution of visual attention sinks: part of the sinks' mass is given to the visual keys, where there is enough of both."""
    visual, visual_sink, text_sink = (mass(name) for name in NAMES[1:])
    condition = sympy.And(
        visual_sink <= 0.5 * (visual + visual_sink + 1e-6 * tensor("count", "b")),
        visual + visual_sink >= 0.2,
        sympy.Ne(tensor("active", "bi"), 0),
    )
    sink = sympy.Piecewise((sympy.Float(0.6), condition), (sympy.Integer(1), True))
    more = sympy.Piecewise((1 + 0.4 * (visual_sink + text_sink) / visual, condition), (sympy.Integer(1), True))
    groups = Groups("member", NAMES, (sympy.Integer(1), more, sink, sink))
    return replace(causal() if is_causal else plain(), groups=groups)


def grouped_by_head() -> Attend:
    """Calibration of attention sinks that each head has of its own."""
    rest = mass("rest")
    gain = sympy.Piecewise((1 + 0.6 * mass("sink") / rest, rest > 1e-20), (sympy.Integer(1), True))
    kept = sympy.Piecewise((sympy.Float(0.4), rest > 1e-20), (sympy.Integer(1), True))
    return replace(causal(), groups=Groups("member", ("rest", "sink"), (gain, kept), per_head=True))


def sinks(axes: str) -> Attend:
    """A logit without a key, per head or more (attention sinks)."""
    return replace(causal(), sink=tensor("t", axes) if axes else sympy.Integer(0))


def sinks_and_empty_rows() -> Attend:
    return replace(empty_rows(), sink=2 * tensor("t", "h") + I / 8)


def decomposed_position(width: int = 7) -> Attend:
    """A query's own bias for the row and the column of the key."""
    rows, columns = read("rel_h", B, H, I, sympy.floor(J / width)), read("rel_w", B, H, I, sympy.Mod(J, width))
    return replace(plain(), score=SCALE * QK + rows + columns)


def relative_table() -> Attend:
    """A table by distance, which ends before the distances do."""
    return replace(causal(), score=SCALE * QK + read("table", H, I - J + 11))


def guarded_table() -> Attend:
    """A table for some of the keys, the same for every head; reads outside of it are clamped and not chosen."""
    inside = read("narrow", sympy.Integer(0), J - 4)
    return replace(plain(), score=SCALE * QK + sympy.Piecewise((inside, sympy.And(J >= 4, J < 10)), (sympy.Integer(0), True)))


def linear() -> Attend:
    return replace(causal(), score=(SCALE * QK) ** 2, normaliser="sum", denominator=TOTAL + 0.25)


def rectified() -> Attend:
    """ReLU attention: its sum may be zero."""
    return replace(masked("bij"), score=sympy.Max(0, SCALE * QK - 1), normaliser="sum")


def sigmoid() -> Attend:
    return replace(masked("bij"), score=1 / (1 + sympy.exp(-(SCALE * QK + tensor("bias", "h")))) / NK, normaliser="none")


def rectified_or_scaled() -> Attend:
    """MPCViT: some heads ReLU over its sum, the others their scores over the number of keys."""
    rectifies = sympy.Eq(sympy.Mod(H, 2), 0)
    score = sympy.Piecewise((sympy.Max(0, SCALE * QK), rectifies), (SCALE * QK, True))
    return replace(causal(), score=score, normaliser="sum", denominator=sympy.Piecewise((TOTAL + 1e-5, rectifies), (I + NK - NQ + 1, True)))


def flash_sigmoid() -> Attend:
    """Sigmoid attention with the bias -log(n) of a causal row."""
    return replace(causal(), score=Sigmoid(SCALE * QK - sympy.log(I + NK - NQ + 1)), normaliser="none")


def row_temperature() -> Attend:
    """Selective self-attention: a learned share of the logarithm of the row's length."""
    share = sympy.exp(-sympy.exp(tensor("t", "h")))
    return replace(plain(), score=(SCALE * QK + tensor("bias", "hij")) * (1 + share * sympy.log(I + 1)))


def gated(axes: str) -> Attend:
    return replace(causal(), weight=tensor("gate", axes) * W)


def gated_rectified() -> Attend:
    return replace(rectified(), weight=W * sympy.exp(-sympy.Abs(I - J) / 8) * tensor("gate", "h"))


def positional_gate() -> Attend:
    """ConViT: content and position mixed, and normalised again."""
    gate = 1 / (1 + sympy.exp(-tensor("gate", "h")))
    return replace(plain(), weight=(1 - gate) * W + gate * sympy.Abs(tensor("bias", "hij")), renormalised=True)


def renormalised() -> Attend:
    """Some rows see nothing, some are gated to nothing."""
    gate = sympy.Piecewise((sympy.Integer(0), sympy.Eq(sympy.Mod(I, 5), 0)), (sympy.Abs(tensor("gate", "hj")), True))
    return replace(empty_rows(), weight=gate * W, renormalised=True)


def offset_under_a_mask() -> Attend:
    """What is hidden weighs nothing before the offset, and the offset after it."""
    return replace(causal(), weight=W + tensor("bias", "hij") / NK)


def talking_heads(bias: bool = True) -> Attend:
    mixes = HeadMix("before", "before_bias" if bias else None), HeadMix("after", "after_bias" if bias else None)
    return replace(masked("bij"), score=SCALE * QK + tensor("bias", "ij"), score_mix=mixes[0], weight_mix=mixes[1])


def everything() -> Attend:
    mixes = HeadMix("before"), HeadMix("after", "after_bias")
    weight = W**2 * sympy.Abs(tensor("gate", "hj")) + W
    mask = sympy.And(causal().mask, sympy.Ne(tensor("mask", "bhij"), 0))
    score = decomposed_position().score
    return replace(
        plain(), score=score, mask=mask, sink=tensor("t", "bhi"), weight=weight, renormalised=True, score_mix=mixes[0], weight_mix=mixes[1]
    )


@dataclass(frozen=True)
class Shape:
    batch: int = 2
    heads: int = 4
    key_heads: int = 2
    n_queries: int = 37
    n_keys: int = 53
    head_dim: int = 16
    value_dim: int = 16


# Axes that are read at an expression are of no size that the expression's values fit in.
SIZES_OF_TABLES = {"table": 30, "narrow": 6}


def operands(
    attend: Attend, shape: Shape, dtype: torch.dtype = torch.float32, seed: int = 0, broadcast: bool = False
) -> dict[str, torch.Tensor]:
    """query, key, value and the operation's tensors by name; with `broadcast` the tensors' b and h axes are of size 1."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    sizes = {"b": 1 if broadcast else shape.batch, "h": 1 if broadcast else shape.heads, "i": shape.n_queries, "j": shape.n_keys}
    values = {
        "query": 2 * normal(shape.batch, shape.heads, shape.n_queries, shape.head_dim),
        "key": 2 * normal(shape.batch, shape.key_heads, shape.n_keys, shape.head_dim),
        "value": normal(shape.batch, shape.key_heads, shape.n_keys, shape.value_dim),
    }
    for name, indices in attend.tensors().items():
        size = [sizes.get(str(index), SIZES_OF_TABLES.get(name, 8)) for index in indices]
        if G in indices:
            size = [shape.heads] * len(indices)
        if name == "mask":
            values[name] = torch.rand(size, generator=generator) < 0.4
        elif name.endswith("segments"):
            # The same sequences for queries and keys, of 8 tokens on average.
            begins = torch.rand(size[0], max(shape.n_queries, shape.n_keys), generator=torch.Generator().manual_seed(seed)) < 0.125
            values[name] = begins.cumsum(1, dtype=torch.int32)[:, : size[1]]
        elif name == "member":
            values[name] = torch.randint(0, 4, size, generator=generator, dtype=torch.int32)
        elif name == "active":
            values[name] = torch.randint(0, 2, size, generator=generator, dtype=torch.int32)
        elif name == "count":
            values[name] = torch.full(size, 12.0)
        else:
            values[name] = normal(*size)
    return values
