"""The scores of one block of queries in torch, and what their expressions read there.

Forward and backward read the same block: the expressions of the IR evaluated on [B, H, rows, columns], nothing larger.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import cached_property, lru_cache
from typing import Any

import sympy
import torch

from codegen.block_choice import choice_term
from codegen.gathered_visit import GatheredVisit
from codegen.tensor_reads import accumulation_dtype, read_block
from codegen.visits import Visit
from codegen.weight_form import split_visits
from rewrite.ir.expression import QK
from rewrite.ir.operations import Attend
from rewrite.ir.semantics import evaluate_expression


def buffer_size(visits: Iterable[Visit], batch: int, heads: int) -> int:
    """Numbers that a buffer for the scores of any of the visits holds."""
    sizes = ((len(range(batch)[visit.planes.batch]) * len(range(heads)[visit.planes.heads]), visit) for visit in visits)
    return max((maps * visit.n_queries * visit.n_keys for maps, visit in sizes), default=0)


def by_key_head(tensor: torch.Tensor, key_heads: int) -> torch.Tensor:
    """[B, H, n, D] -> [B, Hkv, H / Hkv * n, D]: query heads that share a key head, one after the other, so that no key is copied."""
    batch, heads, n, width = tensor.shape
    if heads == key_heads:
        return tensor
    return tensor.reshape(batch, key_heads, heads // key_heads * n, width)


def dot(query: torch.Tensor, key: torch.Tensor, buffer: torch.Tensor | None = None) -> torch.Tensor:
    """query [B, H, n, D], key [B, Hkv, m, D] -> [B, H, n, m]; in the memory of `buffer`, one-dimensional, where that is given."""
    rows = by_key_head(query, key.shape[1])
    shape = (*rows.shape[:3], key.shape[2])
    out = None if buffer is None else buffer[: math.prod(shape)].view(shape)
    product = torch.matmul(rows, key.transpose(-2, -1), out=out)
    return product if query.shape[1] == key.shape[1] else product.view(*query.shape[:3], key.shape[2])


def weighted_sum(weights: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """weights [B, H, n, m], value [B, Hkv, m, D] -> [B, H, n, D]."""
    return (by_key_head(weights, value.shape[1]) @ value).view(*weights.shape[:3], value.shape[3])


def sum_over_queries(weights: torch.Tensor, rows: torch.Tensor, key_heads: int) -> torch.Tensor:
    """weights [B, H, n, m], rows [B, H, n, D] -> [B, Hkv, m, D], summed over queries and over the heads that share a key head."""
    return by_key_head(weights, key_heads).transpose(-2, -1) @ by_key_head(rows, key_heads)


def _positions(query: torch.Tensor, key: torch.Tensor, visit: Visit) -> dict[str, Any]:
    device = query.device
    return {
        "b": torch.arange(query.shape[0], device=device)[visit.planes.batch].view(-1, 1, 1, 1),
        "h": torch.arange(query.shape[1], device=device)[visit.planes.heads].view(1, -1, 1, 1),
        "i": visit.query_positions(device).view(1, 1, -1, 1),
        "j": visit.key_positions(device).view(1, 1, 1, -1),
        "Nq": query.shape[2],
        "Nk": key.shape[2],
    }


class ScoreBlock:
    """The symbols and tensors of an operation on one visit, everything broadcasting against [B, H, rows, columns].

    values: by name, as `evaluate_expression` takes them; floating tensors in the accumulation dtype. visit, attend: what it is of.
    Of a `GatheredVisit`, its small attentions stand where the batch does, and the tensor that chose their keys is not read again.
    """

    def __init__(
        self,
        attend: Attend,
        query: torch.Tensor,
        key: torch.Tensor,
        tensors: Mapping[str, torch.Tensor],
        visit: Visit | GatheredVisit,
    ) -> None:
        """query [B, H, Nq, D], key [B, Hkv, Nk, D] whole; only the visited part of them and of the tensors is read."""
        self.dtype = accumulation_dtype(query.dtype)
        self.attend, self.visit = attend, visit
        self._operands = query, key, tensors
        self._linear: torch.Tensor | None = None

    @cached_property
    def values(self) -> dict[str, Any]:
        """Read when they are first asked for: a plain attention never does."""
        attend, visit, (query, key, tensors) = self.attend, self.visit, self._operands
        found: dict[str, Any] = dict(visit.values) if isinstance(visit, GatheredVisit) else _positions(query, key, visit)
        unread = {name for mix in attend.mixes for name in (mix.matrix, mix.bias)}
        if isinstance(visit, GatheredVisit) and attend.choice is not None:
            unread.add(attend.choice.tensor)
        places = dict(found)
        for name, indices in attend.tensors().items():
            if name not in unread:
                part = read_block(tensors[name], indices, places, visit)
                found[name] = part.to(self.dtype) if part.is_floating_point() else part
        return found

    def read_dot(self, query: torch.Tensor, key: torch.Tensor) -> None:
        """Read the visited rows of query and key, in the accumulation dtype; sets qk where the score is not linear in it."""
        linear = linear_score(self.attend.score)
        if linear is None:
            self.values["qk"] = dot(query, key)
            self._linear = None
        else:
            # Neither the scores nor their derivatives need qk itself, and queries are fewer than scores.
            self._linear = dot(query * linear[0], key)

    def hidden(self) -> torch.Tensor | None:
        """True where the mask hides a key: broadcasts against [B, H, rows, columns]; None where it hides nothing."""
        if isinstance(self.visit, GatheredVisit):
            term, seen = choice_term(self.attend), self.visit.taken
            dynamic = self.attend.mask if term is None else term.rest
        else:
            dynamic = split_visits(self.attend)[1]
            seen = None if self.visit.seen is None else self.visit.seen[None, None]
        hidden = None if seen is None else ~seen
        if dynamic != sympy.true:
            unseen = ~torch.as_tensor(evaluate_expression(dynamic, self.values), device=self.values["i"].device)
            hidden = unseen if hidden is None else hidden | unseen
        return hidden

    def hide(self, terms: torch.Tensor, hidden: torch.Tensor | None, filling: float) -> torch.Tensor:
        """terms [B, H, rows, columns] with `filling` where `hidden` says so, in place; the fewer columns are looked at the better."""
        if hidden is None:
            return terms
        if isinstance(self.visit, Visit) and split_visits(self.attend)[1] == sympy.true:
            partial = self.visit.partial
            terms[..., partial].masked_fill_(hidden[..., partial], filling)
            return terms
        return terms.masked_fill_(hidden, filling)

    def scores(self) -> torch.Tensor:
        """[B, H, rows, columns], as the expression says, hidden pairs too; once, and for the caller to write over."""
        if self._linear is None:
            return self.filled(self.attend.score, self.values["qk"])
        _, rest = linear_score(self.attend.score) or (1.0, sympy.Integer(0))
        return self._linear if rest == 0 else self._linear.add_(self.evaluate(rest))

    def filled(self, expression: sympy.Basic, like: torch.Tensor) -> torch.Tensor:
        """The expression's value, shaped and typed as `like`."""
        return torch.as_tensor(self.evaluate(expression), dtype=self.dtype, device=like.device).expand(like.shape)

    def evaluate(self, expression: sympy.Basic) -> Any:
        return evaluate_expression(expression, self.values)


@lru_cache(maxsize=1024)
def linear_score(score: sympy.Expr) -> tuple[float, sympy.Expr] | None:
    """(scale, rest) of a score  scale * qk + rest  with a number `scale` and a rest without qk; None for any other score."""
    expanded = sympy.expand(score)
    scale = expanded.coeff(QK, 1)
    rest = expanded - scale * QK
    return None if not scale.is_number or rest.has(QK) else (float(scale), rest)
