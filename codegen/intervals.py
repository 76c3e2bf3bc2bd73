"""Which keys a query sees, as an interval of places: the keys in an order of their own, segment by segment.

Of a mask that lets a query see the keys of its own segment (packed sequences), the first keys up to some limit, or both
(`codegen.state_form.MaskSides`), sorting makes intervals: with the keys sorted by segment, and within each in the order of the row, a query
sees those from where its segment begins to as many as are below its limit. That holds whatever the numbers of the segments are, in order or
not. It is done on the device of the tensors and nothing is asked of it; every size is that of queries and keys.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

import sympy
import torch

from codegen.state_form import MaskSides, split_by_side
from rewrite.ir.errors import RewriteError
from rewrite.ir.expression import from_json, tensors_in
from rewrite.ir.semantics import all_positions, evaluate_expression, read_at


class Intervals(NamedTuple):
    """Each int32 [B or 1, ..]. Places are counted along the sorted keys.

    key_order [.., Nk]: the position of the key at each place. key_begins [.., Nk]: the place where its segment begins. query_order
    [.., Nq]: positions of the queries, those first whose interval ends first. begins, ends [.., Nq]: of these queries, in this order, the
    interval begins <= place < ends of the keys that they see; an empty one ends where it begins, or before.
    """

    key_order: torch.Tensor
    key_begins: torch.Tensor
    query_order: torch.Tensor
    begins: torch.Tensor
    ends: torch.Tensor

    def for_rows(self, batch: int) -> Intervals:
        """The same with a row for each of the batch, each of them contiguous."""
        return Intervals(*(each.expand(batch, -1).contiguous() for each in self))

    def chunk_begins(self, chunk: int) -> torch.Tensor:
        """[B or 1, chunks] int32: for chunks of so many places, where the segment begins that holds the last key of the chunk."""
        n_keys = self.key_order.shape[1]
        last = torch.arange(chunk - 1, n_keys + chunk - 1, chunk, device=self.key_order.device).clamp(max=n_keys - 1)
        return self.key_begins[:, last].contiguous()


def by_integers(sides: MaskSides, tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether all that is compared are integers: what is no number equals nothing, and has no place among the others."""
    return not any(tensors[name].is_floating_point() for name in tensors_in(*sides.compared))


@lru_cache(maxsize=1024)
def mask_sides(mask: str) -> MaskSides:
    """Of a mask as JSON text."""
    return split_by_side(from_json(json.loads(mask)))


def intervals(sides: MaskSides, tensors: Mapping[str, torch.Tensor], query: torch.Tensor, key: torch.Tensor) -> Intervals:
    """The intervals by a mask's limit and its segments.

    tensors: by name, what the segments read. query [B, H, Nq, D], key [B, Hkv, Nk, D]. Raises `RewriteError` where floating numbers are
    compared.
    """
    if not by_integers(sides, tensors):
        raise RewriteError("its mask compares floating numbers of queries and keys; give them as integers")
    sizes, device = (query.shape[0], query.shape[1], query.shape[2], key.shape[2]), query.device
    n_queries, n_keys = sizes[2:]
    places = all_positions(sizes, device)
    of_query, of_key = (torch.zeros(1, n, dtype=torch.int64, device=device) for n in (n_queries, n_keys))
    for pair in sides.segments:
        numbers = [_rows(side, places, tensors, n) for side, n in zip(pair, (n_queries, n_keys), strict=True)]
        both = zip((of_query, of_key), _ranked(*numbers), strict=True)
        of_query, of_key = _ranked(*(before * (n_queries + n_keys) + own for before, own in both))
    # Of a key, its place in the row or in the order; of a query, the least that it does not see.
    of_row, limit = torch.arange(n_keys, device=device)[None], torch.full((1, n_queries), n_keys, device=device)
    if sides.order is not None:
        numbers = [_rows(side, places, tensors, n) for side, n in zip(sides.order[:2], (n_queries, n_keys), strict=True)]
        limit, of_row = _ranked(*(-own if sides.order.descending else own for own in numbers))
        limit = limit if sides.order.strict else limit + 1
    elif sides.limit is not None:
        limit = _rows(sides.limit, places, {}, n_queries).clamp(0, n_keys)
    # Segment and place in one number, by which keys are sorted.
    stride = n_queries + n_keys + 1
    numbered = of_key * stride + of_row
    key_order = numbered.argsort(dim=1, stable=True)
    numbered = numbered.gather(1, key_order)

    def place(numbers: torch.Tensor) -> torch.Tensor:
        rows = max(len(numbers), len(numbered))
        return torch.searchsorted(numbered.expand(rows, -1).contiguous(), numbers.expand(rows, -1).contiguous())

    ends = place(of_query * stride + limit)
    query_order = ends.argsort(dim=1, stable=True)
    begins = place(of_query * stride).expand(len(ends), -1).gather(1, query_order)
    found = (key_order, place(numbered // stride * stride), query_order, begins, ends.gather(1, query_order))
    rows = max(map(len, found))
    return Intervals(*(each.expand(rows, -1).to(torch.int32) for each in found))


def _rows(side: sympy.Expr, places: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor], length: int) -> torch.Tensor:
    """[B or 1, length] int64: the values of an expression at b and one side's positions."""
    reads = {name: read_at(tensors[name], indices, places) for name, indices in tensors_in(side).items()}
    value = torch.as_tensor(evaluate_expression(side, {**places, **reads}), device=places["i"].device)
    value = value.reshape((1,) * (4 - value.dim()) + value.shape).to(torch.int64)
    return value.reshape(value.shape[0], -1).expand(-1, length)


def _ranked(of_query: torch.Tensor, of_key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers below Nq + Nk in the place of any, the same for the same and in the same order."""
    rows = max(len(of_query), len(of_key))
    both = torch.cat([each.expand(rows, -1) for each in (of_query, of_key)], 1)
    ranks = torch.searchsorted(both.sort(dim=1).values, both)
    return ranks[:, : of_query.shape[1]], ranks[:, of_query.shape[1] :]
