"""The forms of attention that kernels are tested on, and random operands for them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import sympy
import torch

from rewrite.ir import NK, NQ, QK, Attend, Groups, I, J, letters, mass, tensor

SCALE = sympy.Float(0.125)


def plain() -> Attend:
    return Attend("result", "query", "key", "value", SCALE * QK)


def biased(axes: str) -> Attend:
    return replace(plain(), score=SCALE * QK + tensor("bias", axes))


def masked(axes: str) -> Attend:
    return replace(plain(), mask=sympy.Ne(tensor("mask", axes), 0))


def causal() -> Attend:
    return replace(plain(), mask=sympy.Le(J, I + (NK - NQ)))


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


@dataclass(frozen=True)
class Shape:
    batch: int = 2
    heads: int = 4
    key_heads: int = 2
    n_queries: int = 37
    n_keys: int = 53
    head_dim: int = 16
    value_dim: int = 16


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
    for name, axes in attend.tensors().items():
        size = [sizes[axis] for axis in letters(axes) or ""]
        if name == "mask":
            values[name] = torch.rand(size, generator=generator) < 0.4
        elif name == "member":
            values[name] = torch.randint(0, 4, size, generator=generator, dtype=torch.int32)
        elif name == "active":
            values[name] = torch.randint(0, 2, size, generator=generator, dtype=torch.int32)
        elif name == "count":
            values[name] = torch.full(size, 12.0)
        else:
            values[name] = normal(*size)
    return values
