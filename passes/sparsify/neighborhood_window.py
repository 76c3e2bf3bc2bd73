"""The keys of one query along one axis, as neighborhood attention defines them.

With window w, stride s and dilation d, a query looks at keys of its own residue modulo d alone; c is its number among the L tokens of that
residue. The s queries of a stride group share the window of their leader:

    window:  leader = min((c // s) * s + s // 2, L - 1),      first = clamp(leader - w // 2, 0, L - w),  keys first .. first + w - 1
    causal:  leader = min((c // s) * s + s - 1, L - 1),       first = max(leader - (w - 1), 0),          keys first .. c

A window is shifted, not cut, where it would leave the axis; an even one has one key more in front of its leader than behind. Strides:
Hassani et al. 2025, "Generalized Neighborhood Attention" (GNA); dilation and causality: the NATTEN library.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy
from sympy.logic.boolalg import Boolean

from passes.sparsify.grid_axis import GridAxis


@dataclass(frozen=True)
class Window:
    """keys in a window, dilation between them, queries that share one, and whether keys behind the query are left out."""

    window: int
    stride: int = 1
    dilation: int = 1
    causal: bool = False

    def predicate(self, axis: GridAxis, query: sympy.Expr, key: sympy.Expr) -> Boolean:
        """Whether the key is in the query's window, both being numbers of tokens; `true` where a window is the whole axis.

        In units of tokens, c being (x - x mod d) / d for the coordinate x.
        """
        if not self.causal and self.window == axis.length and self.dilation == 1:
            return sympy.true
        place, residue = axis.coordinate(query), sympy.Mod(axis.coordinate(query), self.dilation)
        last = axis.length - 1 - sympy.Mod(axis.length - 1 - place, self.dilation)
        reach = (self.window - 1) * self.dilation
        if self.causal:
            first = sympy.Max(self._leader(place, self.stride - 1, last) - reach, residue)
            behind = place + 1
        else:
            middle = self._leader(place, self.stride // 2, last)
            first = sympy.Min(sympy.Max(middle - self.window // 2 * self.dilation, residue), last - reach)
            behind = first + reach + 1
        same_residue = sympy.Eq(sympy.Mod(place - axis.coordinate(key), self.dilation), 0)
        return sympy.And(axis.between(key, first, behind), same_residue)

    def _leader(self, place: sympy.Expr, offset: int, last: sympy.Expr) -> sympy.Expr:
        """The coordinate of the leader, `offset` tokens of the residue behind the first of its stride group."""
        if self.stride == 1:
            return place
        group = sympy.floor(place / (self.dilation * self.stride))
        return sympy.Min(sympy.Mod(place, self.dilation) + self.dilation * (group * self.stride + offset), last)

    def keys(self, query: int, length: int) -> list[int]:
        """The same, listed: the keys of one query on an axis of `length` tokens, a slice of the tokens of its residue."""
        group = list(range(query % self.dilation, length, self.dilation))
        own = group.index(query)
        team = [member for member in range(own - own % self.stride, own - own % self.stride + self.stride) if member < len(group)]
        if self.causal:
            return group[max(team[-1] + 1 - self.window, 0) : own + 1]
        middle = team[min(self.stride // 2, len(team) - 1)]
        start = min(max(middle - self.window // 2, 0), len(group) - self.window)
        return group[start : start + self.window]
