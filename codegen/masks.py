"""The part of a mask that depends on positions alone: evaluated once per size on the host, never as an Nq x Nk array.

Kernels take from it the list of key blocks to visit, the torch lowering the keys to gather, the FLOP counter the number of pairs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache

import sympy
import torch
from sympy.logic.boolalg import Boolean

from rewrite.ir.expression import INDICES, conjuncts, from_json, is_static, to_json
from rewrite.ir.semantics import evaluate_expression, positions

# Queries evaluated at a time: large enough that the torch calls do not count, small enough to stay in cache for some thousand keys.
CHUNK = 128


def depends_on_positions_only(term: Boolean) -> bool:
    """True for a predicate in i, j, Nq and Nk: no tensor is read, and every batch and head sees the same."""
    return is_static(term) and not term.free_symbols & {INDICES["b"], INDICES["h"]}


@lru_cache(maxsize=1024)
def split_mask(mask: Boolean) -> tuple[Boolean, Boolean]:
    """(static, dynamic): the conjunction of the terms that depend on positions only, and that of the others."""
    terms = conjuncts(mask)
    static = [term for term in terms if depends_on_positions_only(term)]
    return sympy.And(*static), sympy.And(*(term for term in terms if term not in static))


@lru_cache(maxsize=1024)
def static_key(mask: Boolean) -> str:
    """The static part of a mask as JSON text: what everything derived from it is cached by."""
    return json.dumps(to_json(split_mask(mask)[0]))


def visible_rows(
    static: str, n_queries: int, n_keys: int, chunk: int = CHUNK, order: torch.Tensor | None = None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(queries [<= chunk], which keys each of them sees [<= chunk, n_keys] bool), on the CPU; all queries once, in `order` if given."""
    predicate = from_json(json.loads(static))
    whole = positions(n_queries, n_keys, torch.device("cpu"))
    for rows in torch.split(torch.arange(n_queries) if order is None else order, chunk):
        seen = torch.as_tensor(evaluate_expression(predicate, {**whole, "i": rows.view(1, 1, -1, 1)}))
        yield rows, seen.expand(1, 1, len(rows), n_keys)[0, 0]


@lru_cache(maxsize=256)
def is_lower_triangle(static: str, n_queries: int, n_keys: int) -> bool:
    """Whether, of as many queries as keys, each sees exactly the keys up to its own, whatever the mask says at other sizes."""
    if static == "true" or n_queries != n_keys or not n_queries:
        return False
    keys = torch.arange(n_keys)
    return all(torch.equal(seen, keys <= rows[:, None]) for rows, seen in visible_rows(static, n_queries, n_keys))


@lru_cache(maxsize=256)
def _count(static: str, n_queries: int, n_keys: int) -> int:
    return sum(int(seen.sum()) for _, seen in visible_rows(static, n_queries, n_keys))


def visible_pairs(mask: Boolean, n_queries: int, n_keys: int) -> int:
    """How many (i, j) the static part of `mask` lets through: exactly, all n_queries * n_keys of them where it has none. Cached."""
    static = static_key(mask)
    return n_queries * n_keys if static == "true" else _count(static, n_queries, n_keys)
