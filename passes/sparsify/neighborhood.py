"""Neighborhood attention: each token attends to the window of keys around it.

Hassani et al. 2023, "Neighborhood Attention Transformer", Hassani & Shi 2022, "Dilated Neighborhood Attention Transformer", and Hassani
et al. 2025, "Generalized Neighborhood Attention" (strides), with the conventions of the NATTEN library along each axis
(`neighborhood_window`); several axes are a conjunction. In a causal site the tokens are one sequence, and the rule along it the causal one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Self

import sympy
import torch
from sympy.logic.boolalg import Boolean

from passes import layers as layers_
from passes.sparsify.grid_axis import Length, grid_axes, not_the_whole_grid
from passes.sparsify.narrowing import QUERY_POSITION, attended, narrowed, reasons_against, with_global_tokens
from passes.sparsify.neighborhood_window import Window
from rewrite.ir import NK, AttentionInputs, Fits, I, J, Pass, Site, parameter, register_pass
from rewrite.ir.passes import is_causal

# What is given per axis, as one number for all of them or one each.
PER_AXIS = ("window", "stride", "dilation", "causal")


@register_pass
@dataclass(frozen=True)
class Neighborhood(Pass):
    """Windows on the token grid (one extent per axis) where the site has one, along the sequence otherwise.

    Prefix tokens (CLS, registers) are seen by all and see all; positions count from the token behind them. The site's own mask holds as
    well. In a causal site positions count the keys the site has, those in the KV cache included, and a window longer than the sequence sees
    all of it. A leader is at most the last token there is, so with a stride above 1 a decoding step sees what the whole sequence up to it
    would, which may be more than a prefill lets that token see whose stride group goes on behind it.
    """

    name = "neighborhood"
    family = "sparsify"
    paper = (
        "Hassani, Walton, Li, Li, Shi: Neighborhood Attention Transformer, CVPR 2023 (dilation: arXiv 2209.15001; stride: Hassani et al., "
        "Generalized Neighborhood Attention, arXiv 2504.16922)"
    )
    formula = "out[i] = sum_{j in window(i)} softmax_{j in window(i)}(score[i,j]) v[j]"
    fits = Fits(kinds=frozenset({"self"}))

    window: int | tuple[int, ...] | Literal["all"] = parameter(7, 'keys per axis, one number or one per axis; "all" changes nothing')
    dilation: int | tuple[int, ...] = parameter(1, "step between the keys of a window, one number or one per axis")
    stride: int | tuple[int, ...] = parameter(1, "queries that share the window of one of them, one number or one per axis")
    causal: bool | tuple[bool, ...] = parameter(False, "no key behind the query along an axis, one for all axes or one per axis")
    layers: tuple[int, ...] | None = parameter(None, "the layers of each stack to work on; None is every layer")

    def check(self) -> None:
        self.require(self.window == "all" or _are_positive(self.window), "window", 'at least 1 along each axis, or "all"')
        for name, value in (("dilation", self.dilation), ("stride", self.stride)):
            self.require(_are_positive(value), name, "at least 1 along each axis")
        self.require(self.causal != (), "causal", "True or False along each axis")
        self.require(layers_.are_layers(self.layers), "layers", layers_.RANGE)
        if self.window == "all":
            for name, nothing in (("dilation", 1), ("stride", 1), ("causal", False)):
                self.require(getattr(self, name) == nothing, name, f'{nothing} with window="all", which is every key')
            return
        axes = max(len(_entries(self.window)), len(_entries(self.stride)))
        shared = all(_entry(self.stride, axis) <= _entry(self.window, axis) for axis in range(axes))
        self.require(shared, "stride", f"at most the window, {self.window!r}, along each axis")

    @classmethod
    def identity(cls) -> Self:
        return cls(window="all")

    def declines(self, site: Site) -> str | None:
        return next(self._reasons_against(site), None)

    def _reasons_against(self, site: Site) -> Iterator[str]:
        yield from reasons_against(site, self.layers)
        causal = is_causal(site)
        if reason := site.layout.partial if causal else not_the_whole_grid(site):
            yield reason
            return
        axes = _axes(site)
        for name in PER_AXIS:
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != len(axes):
                yield f"{name}={value!r} has {len(value)} entries, and its tokens lie along {len(axes)} axes"
                return
        if self.window == "all" or causal:
            return
        for axis, length in enumerate(axes):
            window, dilation = self._along(axis).window, self._along(axis).dilation
            if window * dilation > length:
                yield f"window {window} x dilation {dilation} = {window * dilation} is more than the {length} tokens of axis {axis}"

    def _along(self, axis: int, causal_site: bool = False) -> Window:
        window, stride, dilation, causal = (_entry(getattr(self, name), axis) for name in PER_AXIS)
        return Window(window, stride, dilation, bool(causal) or causal_site)

    def transform(self, site: Site) -> Site:
        return site if self.window == "all" else narrowed(site, self.predicate(site))

    def predicate(self, site: Site) -> Boolean:
        """Which (i, j) lie in one window, in a site that this pass does not decline."""
        if self.window == "all":
            return sympy.true
        prefix, causal = site.layout.prefix, is_causal(site)
        query = QUERY_POSITION if causal else I
        lengths: tuple[Length, ...] = (NK - prefix,) if causal or site.layout.grid is None else site.layout.grid
        along = (self._along(number, causal).predicate(axis, query - prefix, J - prefix) for number, axis in enumerate(grid_axes(lengths)))
        return with_global_tokens(sympy.And(*along), prefix, query)

    def reference(self, attention: AttentionInputs) -> torch.Tensor:
        """Window by window: the keys of each query listed one by one."""
        site, (queries, keys) = attention.site, attention.logits.shape[-2:]
        causal, prefix = is_causal(site), site.layout.prefix
        if self.window == "all":
            return attended(attention, torch.ones(queries, keys, dtype=torch.bool))
        grid = (keys - prefix,) if causal or site.layout.grid is None else site.layout.grid
        return attended(attention, self._seen(grid, prefix, causal)[keys - queries :])

    def _seen(self, grid: tuple[int, ...], prefix: int, causal: bool) -> torch.Tensor:
        """[N, N] bool: which tokens see which, on a grid after `prefix` tokens."""
        windows = [self._along(axis, causal) for axis in range(len(grid))]
        per_axis = [[window.keys(place, length) for place in range(length)] for window, length in zip(windows, grid, strict=True)]
        tokens = list(itertools.product(*(range(length) for length in grid)))
        number = {token: prefix + index for index, token in enumerate(tokens)}
        seen = torch.zeros(prefix + len(tokens), prefix + len(tokens), dtype=torch.bool)
        seen[:prefix], seen[:, :prefix] = True, True
        for token in tokens:
            for key in itertools.product(*(per_axis[axis][place] for axis, place in enumerate(token))):
                seen[number[token], number[key]] = True
        return seen


def _axes(site: Site) -> tuple[int, ...]:
    """The sizes of the axes that windows lie on: the grid's, or the sequence's without prefix. Causal sites: the sequence."""
    if site.layout.grid is not None and not is_causal(site):
        return site.layout.grid
    return (site.dims["Nk"] - site.layout.prefix,)


def _entries(value: int | tuple[int, ...] | str) -> tuple[int | str, ...]:
    return value if isinstance(value, tuple) else (value,)


def _are_positive(value: int | tuple[int, ...] | str) -> bool:
    return len(_entries(value)) > 0 and all(isinstance(entry, int) and entry >= 1 for entry in _entries(value))


def _entry(value: int | tuple[int, ...] | str, axis: int) -> int:
    """The value along one axis: a single number holds for all of them, as does the last one where there are too few."""
    entry = _entries(value)[min(axis, len(_entries(value)) - 1)]
    if isinstance(entry, str):
        raise TypeError(f"{entry!r} has no extent along an axis")
    return entry
