"""One axis of the grid that tokens lie on, in the symbols of a mask: token numbers in raster order, and coordinates made of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import sympy
from sympy.logic.boolalg import Boolean

from passes.sparsify import narrowing
from rewrite.ir import Site

Length: TypeAlias = sympy.Expr | int


@dataclass(frozen=True)
class GridAxis:
    """length: tokens along the axis. inner: tokens between two neighbours on it, in raster order. outermost: it is the first axis."""

    length: Length
    inner: int = 1
    outermost: bool = True

    def _rest(self, token: sympy.Expr) -> sympy.Expr:
        """What the axes before this one leave of a token's number."""
        return token if self.outermost else sympy.Mod(token, self.inner * self.length)

    def coordinate(self, token: sympy.Expr) -> sympy.Expr:
        return sympy.floor(self._rest(token) / self.inner)

    def between(self, token: sympy.Expr, first: sympy.Expr, beyond: sympy.Expr) -> Boolean:
        """first <= coordinate(token) < beyond, the bounds set on the token's number: comparing a floor, sympy compares fractions."""
        rest = self._rest(token)
        return sympy.And(sympy.Ge(rest, self.inner * first), sympy.Lt(rest, self.inner * beyond))


def grid_axes(lengths: tuple[Length, ...]) -> tuple[GridAxis, ...]:
    """The axes of a grid of the given lengths, the last one running fastest."""
    return tuple(GridAxis(length, math.prod(lengths[axis + 1 :]), axis == 0) for axis, length in enumerate(lengths))


def reasons_against(site: Site, layers: tuple[int, ...] | None) -> Iterator[str]:
    """What speaks against a mask on the whole grid of a non-causal site, in words."""
    yield from narrowing.reasons_against(site, layers)
    if reason := not_the_whole_grid(site):
        yield reason


def not_the_whole_grid(site: Site) -> str | None:
    """Why a site's keys are not its prefix and its whole grid in order, in words, or None; None too where no grid is known."""
    layout, keys = site.layout, site.dims["Nk"]
    if layout.partial is not None or layout.grid is None:
        return layout.partial
    tokens = layout.prefix + math.prod(layout.grid)
    text = f"{layout.prefix} prefix tokens and the grid {'x'.join(map(str, layout.grid))} make {tokens} tokens, it has {keys}"
    return text if tokens != keys else None
