"""An order of the queries in which neighbours see nearly the same keys, read off the predicate itself.

In  floor(j / W) >= max(0, floor(i / W) - r)  and so on, what a query sees is decided by the parts that are made of i alone. Queries for
which a part under an equality differs (the residue of a dilated window) share no keys; those for which a part under an inequality is
close (the first row, the first column of a window) share most. So queries are sorted by the former, and along a Z-order curve of the
latter (Morton 1966), on which any run of queries is a compact tile of the grid.
"""

from __future__ import annotations

import json
from functools import lru_cache

import sympy
import torch

from rewrite.ir.expression import I, J, from_json
from rewrite.ir.semantics import evaluate_expression


def _parts(expression: sympy.Basic) -> list[sympy.Basic]:
    """The largest parts of an expression that depend on i and not on j; terms of one sum are kept together, and count modulo a divisor."""
    symbols = expression.free_symbols
    if I not in symbols:
        return []
    if J not in symbols:
        return [expression]
    if isinstance(expression, sympy.Add):
        alone = [term for term in expression.args if J not in term.free_symbols and I in term.free_symbols]
        mixed = [part for term in expression.args if J in term.free_symbols for part in _parts(term)]
        return [sympy.Add(*alone), *mixed] if alone else mixed
    if isinstance(expression, sympy.Mod) and not expression.args[1].free_symbols & {I, J}:
        return [sympy.Mod(part, expression.args[1]) for part in _parts(expression.args[0])]
    return [part for argument in expression.args for part in _parts(argument)]


def _ranks(part: sympy.Basic, n_queries: int, n_keys: int) -> torch.Tensor:
    """[n_queries]: the part's value for every query, as its rank among the values it takes."""
    value = evaluate_expression(part, {"i": torch.arange(n_queries), "Nq": n_queries, "Nk": n_keys})
    ranks: torch.Tensor = torch.unique(torch.as_tensor(value).expand(n_queries), return_inverse=True)[1]
    return ranks


def _distinct(parts: list[sympy.Basic], n_queries: int, n_keys: int) -> list[torch.Tensor]:
    """The ranks of each part, those that are constant or repeat another left out."""
    kept: list[torch.Tensor] = []
    for part in parts:
        ranks = _ranks(part, n_queries, n_keys)
        mirrored = ranks.max() - ranks
        if ranks.any() and not any(torch.equal(ranks, other) or torch.equal(mirrored, other) for other in kept):
            kept.append(ranks)
    return kept


def _z_order(coordinates: list[torch.Tensor]) -> torch.Tensor:
    """The place on a Z-order curve: the bits of the coordinates, interleaved."""
    place = torch.zeros_like(coordinates[0])
    bits = max(int(ranks.max()).bit_length() for ranks in coordinates)
    for bit in range(bits):
        for axis, ranks in enumerate(coordinates):
            place |= ((ranks >> bit) & 1) << (bit * len(coordinates) + axis)
    return place


@lru_cache(maxsize=256)
def query_order(static: str, n_queries: int, n_keys: int) -> torch.Tensor | None:
    """Positions of the queries [n_queries] in the order to visit them; None where the order they have is as good.

    static: a static mask as JSON text, see `codegen.masks.static_key`.
    """
    if n_queries < 2:
        return None
    apart: list[sympy.Basic] = []
    along: list[sympy.Basic] = []
    for relation in sorted(from_json(json.loads(static)).atoms(sympy.Rel), key=sympy.default_sort_key):
        if J not in relation.free_symbols:
            apart += [relation] if I in relation.free_symbols else []
            continue
        parts = _parts(relation.lhs - relation.rhs)
        if isinstance(relation, sympy.Eq):
            apart += parts
        else:
            along += parts
    classes, coordinates = _distinct(apart, n_queries, n_keys), _distinct(along, n_queries, n_keys)
    if len(coordinates) < 2 and not classes:
        return None
    order = torch.arange(n_queries)
    keys = [*([_z_order(coordinates)] if coordinates else []), *reversed(classes)]
    for ranks in keys:  # the last sort decides first
        order = order[ranks[order].argsort(stable=True)]
    return None if torch.equal(order, torch.arange(n_queries)) else order
