"""Neighborhood attention: each token attends to the window of keys around it.

Hassani et al. 2023, "Neighborhood Attention Transformer", and Hassani & Shi 2022, "Dilated Neighborhood Attention
Transformer", with the conventions of the NATTEN library at stride 1. Along one axis of L tokens, with window w and dilation d,
query c looks at exactly w keys, all of c's residue modulo d. In units of d the window starts w // 2 in front of the query, and it is
shifted, not cut, where it would leave the axis:

    first = min(max(c - d * (w // 2), c mod d),  last - d * (w - 1)),   last = the greatest position under L of c's residue
    keys  = first, first + d, ..., first + d * (w - 1)

An even window thus has one key more in front of the query than behind it. Several axes are a conjunction. In a causal site the window
is the w last keys of that residue up to the query itself, fewer at the beginning.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, Self, TypeAlias

import sympy
import torch
from sympy.logic.boolalg import Boolean

from passes import layers as layers_
from rewrite.ir import NK, NQ, Attend, AttentionInputs, Fits, I, J, Pass, Site, parameter, register_pass
from rewrite.ir.passes import is_causal

# Where query i lies among the keys: queries are aligned with the last keys, those before them being in a KV cache.
QUERY_POSITION = I + NK - NQ

Length: TypeAlias = sympy.Expr | int


@register_pass
@dataclass(frozen=True)
class Neighborhood(Pass):
    """Windows on the token grid (one extent per axis) where the site has one, along the sequence otherwise.

    Prefix tokens (CLS, registers) are seen by all and see all. The site's own mask holds as well. In a causal site positions count the
    keys the site has, those in the KV cache included, and a window longer than the sequence sees all of it.
    """

    name = "neighborhood"
    family = "sparsify"
    paper = "Hassani, Walton, Li, Li, Shi: Neighborhood Attention Transformer, CVPR 2023 (dilation: arXiv 2209.15001)"
    formula = "out[i] = sum_{j in window(i)} softmax_{j in window(i)}(score[i,j]) v[j]"
    fits = Fits(kinds=frozenset({"self"}))

    window: int | tuple[int, ...] | Literal["all"] = parameter(7, 'keys per axis, one number or one per axis; "all" changes nothing')
    dilation: int | tuple[int, ...] = parameter(1, "step between the keys of a window, one number or one per axis")
    layers: tuple[int, ...] | None = parameter(None, "the layers of each stack to work on; None is every layer")

    def check(self) -> None:
        self.require(self.window == "all" or _are_positive(self.window), "window", 'at least 1 along each axis, or "all"')
        self.require(_are_positive(self.dilation), "dilation", "at least 1 along each axis")
        self.require(self.window != "all" or self.dilation == 1, "dilation", '1 with window="all", which is every key')
        self.require(layers_.are_layers(self.layers), "layers", layers_.RANGE)

    @classmethod
    def identity(cls) -> Self:
        return cls(window="all")

    def declines(self, site: Site) -> str | None:
        return next(self._reasons_against(site), None)

    def _reasons_against(self, site: Site) -> Iterator[str]:
        if reason := layers_.reason_against(self.layers, site):
            yield reason
        if len(site.body.attends()) != 1:
            yield f"an earlier pass made {len(site.body.attends())} attentions of it"
        if site.layout.partial is not None:
            yield site.layout.partial
            return
        queries, keys, prefix, grid = site.dims["Nq"], site.dims["Nk"], site.layout.prefix, site.layout.grid
        causal = is_causal(site)
        if not causal and site.cached:
            yield f"it reads a KV cache of {keys} keys and its mask was not found to be causal"
        if not causal and queries != keys:
            yield f"it has {queries} queries and {keys} keys, and windows need one position per token"
        axes = _axes(site)
        if not causal and grid is not None and prefix + math.prod(axes) != keys:
            yield f"{prefix} prefix tokens and the grid {'x'.join(map(str, axes))} make {prefix + math.prod(axes)} tokens, it has {keys}"
        for parameter_, value in (("window", self.window), ("dilation", self.dilation)):
            if isinstance(value, tuple) and len(value) != len(axes):
                yield f"{parameter_}={value!r} has {len(value)} entries, and its tokens lie along {len(axes)} axes"
        if self.window == "all" or causal:
            return
        for axis, length in enumerate(axes):
            window, dilation = _entry(self.window, axis), _entry(self.dilation, axis)
            if window * dilation > length:
                yield f"window {window} x dilation {dilation} = {window * dilation} is more than the {length} tokens of axis {axis}"

    def transform(self, site: Site) -> Site:
        if self.window == "all":
            return site
        seen = sympy.And(site.attend.mask, self.predicate(site))
        operations = (replace(operation, mask=seen) if isinstance(operation, Attend) else operation for operation in site.body.operations)
        return site.with_operations(*operations)

    def predicate(self, site: Site) -> Boolean:
        """Which (i, j) lie in one window, in a site that this pass does not decline."""
        if self.window == "all":
            return sympy.true
        prefix = site.layout.prefix
        if is_causal(site):
            query = QUERY_POSITION
            window, dilation = _entry(self.window, 0), _entry(self.dilation, 0)
            near = sympy.And(sympy.Gt(J, query - window * dilation), sympy.Eq(sympy.Mod(query - J, dilation), 0))
        else:
            query, lengths = I, site.layout.grid or (NK - prefix,)
            near = sympy.And(
                *(
                    _in_window(
                        I - prefix, J - prefix, lengths, axis, window=_entry(self.window, axis), dilation=_entry(self.dilation, axis)
                    )
                    for axis in range(len(lengths))
                )
            )
        return sympy.Or(sympy.Lt(query, prefix), sympy.Lt(J, prefix), near) if prefix else near

    def reference(self, attention: AttentionInputs) -> torch.Tensor:
        """Window by window: the keys of each query listed one by one."""
        site, (queries, keys) = attention.site, attention.logits.shape[-2:]
        if self.window == "all":
            seen = torch.ones(queries, keys, dtype=torch.bool)
        elif is_causal(site):
            seen = self._seen_causal(queries, keys, site.layout.prefix)
        else:
            seen = self._seen(site.layout.grid or (keys - site.layout.prefix,), site.layout.prefix)
        logits = attention.logits.masked_fill(~seen.to(attention.logits.device), -torch.inf)
        return logits.softmax(-1).nan_to_num(0.0) @ attention.value

    def _seen(self, grid: tuple[int, ...], prefix: int) -> torch.Tensor:
        """[N, N] bool: which tokens see which, on a grid after `prefix` tokens."""
        per_axis = [
            [neighbors(c, length, _entry(self.window, axis), _entry(self.dilation, axis)) for c in range(length)]
            for axis, length in enumerate(grid)
        ]
        tokens = list(itertools.product(*(range(length) for length in grid)))
        number = {token: prefix + index for index, token in enumerate(tokens)}
        seen = torch.zeros(prefix + len(tokens), prefix + len(tokens), dtype=torch.bool)
        seen[:prefix], seen[:, :prefix] = True, True
        for token in tokens:
            for key in itertools.product(*(per_axis[axis][c] for axis, c in enumerate(token))):
                seen[number[token], number[key]] = True
        return seen

    def _seen_causal(self, queries: int, keys: int, prefix: int) -> torch.Tensor:
        """[Nq, Nk] bool: the last `window` keys of the query's residue; the queries are the last of the keys."""
        window, dilation = _entry(self.window, 0), _entry(self.dilation, 0)
        seen = torch.zeros(queries, keys, dtype=torch.bool)
        for query in range(queries):
            position = keys - queries + query
            if position < prefix:
                seen[query] = True
            seen[query, :prefix] = True
            for step in range(window):
                key = position - step * dilation
                if key >= prefix:
                    seen[query, key] = True
        return seen


def neighbors(query: int, length: int, window: int, dilation: int) -> list[int]:
    """The keys of one query on an axis of `length` tokens: a slice of the tokens of its residue, shifted to lie inside."""
    group = list(range(query % dilation, length, dilation))
    start = min(max(group.index(query) - window // 2, 0), len(group) - window)
    return group[start : start + window]


def _in_window(query: sympy.Expr, key: sympy.Expr, lengths: tuple[Length, ...], axis: int, *, window: int, dilation: int) -> Boolean:
    """The predicate of the module's docstring along one axis of a grid; `true` where the window is the whole axis.

    query and key are token numbers in raster order. A token's coordinate is floor(rest / inner), rest being what the axes before this
    one leave of its number. The key's bounds are set on rest: comparing a floor, sympy would drop it and compare fractions.
    """
    length, inner = lengths[axis], math.prod(lengths[axis + 1 :])
    if window == length and dilation == 1:
        return sympy.true
    query_rest, key_rest = (token if axis == 0 else sympy.Mod(token, inner * length) for token in (query, key))
    query, key = sympy.floor(query_rest / inner), sympy.floor(key_rest / inner)
    last = length - 1 - sympy.Mod(length - 1 - query, dilation)
    reach = (window - 1) * dilation
    first = sympy.Min(sympy.Max(query - window // 2 * dilation, sympy.Mod(query, dilation)), last - reach)
    return sympy.And(
        sympy.Ge(key_rest, inner * first),
        sympy.Lt(key_rest, inner * (first + reach + 1)),
        sympy.Eq(sympy.Mod(query - key, dilation), 0),
    )


def _axes(site: Site) -> tuple[int, ...]:
    """The sizes of the axes that windows lie on: the grid's, or the sequence's without prefix. Causal sites: the sequence."""
    if site.layout.grid is not None and not is_causal(site):
        return site.layout.grid
    return (site.dims["Nk"] - site.layout.prefix,)


def _are_positive(value: int | tuple[int, ...] | str) -> bool:
    entries = value if isinstance(value, tuple) else (value,)
    return len(entries) > 0 and all(isinstance(entry, int) and entry >= 1 for entry in entries)


def _entry(value: int | tuple[int, ...] | str, axis: int) -> int:
    """The value along one axis: a single number holds for all of them."""
    entry = value[axis] if isinstance(value, tuple) else value
    if isinstance(entry, str):
        raise TypeError(f"{entry!r} has no extent along an axis")
    return entry
