"""Which side of a linear attention is contracted first, and in what chunks: by closed forms of the multiply-adds in a call's sizes.

    (queries keys^T) values    B H pairs (D + Dv)
    queries (keys^T values)    B (H Nq + Hs Nk) F V  +  B H diagonal (F + V)

F are the features of a query or key and V the columns of a state (`codegen.state_form`), Hs the heads that have a state of their own,
`pairs` those of a query and a key that it sees, `diagonal` those that a chunk of queries multiplies before they go into the state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import NamedTuple

import sympy
import torch

from codegen.masks import visible_pairs
from codegen.state_form import StateForm, state_form
from rewrite.ir.expression import is_static
from rewrite.ir.operations import Attend
from rewrite.ir.semantics import evaluate_expression, positions

_B, _H, _HS, _NQ, _NK, _D, _DV, _F, _V, _PAIRS, _DIAGONAL = _SYMBOLS = sympy.symbols("B H Hs Nq Nk D Dv F V pairs diagonal", positive=True)
QUADRATIC = _B * _H * _PAIRS * (_D + _DV)
STATE = _B * (_H * _NQ + _HS * _NK) * _F * _V + _B * _H * _DIAGONAL * (_F + _V)

# In multiply-adds, taking 50 of them for a nanosecond of 2 CPU cores (`codegen.visits` has measured 30 ns for 1536): some thirty calls of
# 10 us for a chunk, and 0.4 ns for the eight bytes read and eight written of an entry of the state.
COST_OF_A_CHUNK = 15_000_000
COST_OF_AN_ENTRY = 20
# What chunks of C queries cost in all heads, `fixed` being what every chunk of one head costs beside its pairs; and where that is least.
_C, _FIXED = sympy.symbols("C fixed", positive=True)
_OF_CHUNKS = _NQ * _C * (_F + _V) + _NQ / _C * _FIXED
_BEST_CHUNK = sympy.lambdify((_F, _V, _FIXED), sympy.solve(sympy.diff(_OF_CHUNKS, _C), _C)[0], "math")
# Below 16 a product no longer amortises its operands; above 256 the scores of a chunk leave the cache.
CHUNKS = (16, 256)
# Entries of features held at a time where nothing limits a chunk: 16 MiB in float32, as for scores.
FEATURES_AT_A_TIME = 1 << 22

_quadratic, _state = (sympy.lambdify(_SYMBOLS, formula, "math") for formula in (QUADRATIC, STATE))


def best_chunk(features: int, columns: int, fixed: float) -> float:
    """Queries per chunk at which the multiply-adds are fewest, where a chunk of one head costs `fixed` of them beside its pairs."""
    return float(_BEST_CHUNK(features, columns, fixed))


class Sizes(NamedTuple):
    """Of one call: query [batch, heads, n_queries, head_dim], key and value with `key_heads`, n_keys and value_dim."""

    batch: int
    heads: int
    key_heads: int
    n_queries: int
    n_keys: int
    head_dim: int
    value_dim: int

    @classmethod
    def of(cls, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Sizes:
        batch, heads, n_queries, head_dim = query.shape
        return cls(batch, heads, key.shape[1], n_queries, key.shape[2], head_dim, value.shape[3])

    @classmethod
    def named(cls, sizes: Mapping[str, int]) -> Sizes:
        """From B, H, Hkv, Nq, Nk, D and Dv."""
        return cls(*(sizes[name] for name in ("B", "H", "Hkv", "Nq", "Nk", "D", "Dv")))


class Step(NamedTuple):
    """A chunk of queries. rows: a slice, or positions [n] int64 on the CPU. The state holds the keys from `start` to `before`, which all of
    them see; those from there to `until`, which any of them sees, are multiplied pair by pair. Keys are counted in the plan's order."""

    rows: slice | torch.Tensor
    before: int
    until: int
    start: int = 0

    @property
    def n_rows(self) -> int:
        return self.rows.stop - self.rows.start if isinstance(self.rows, slice) else len(self.rows)


class StatePlan(NamedTuple):
    """The chunks in the order in which the state grows, and the numbers that `STATE` needs beside a call's sizes."""

    steps: tuple[Step, ...]
    counts: dict[str, int]


def _rounded(chunk: float) -> int:
    """The nearest power of two within `CHUNKS`."""
    low, high = CHUNKS
    return max(low, min(high, 1 << round(math.log2(max(1.0, chunk)))))


def limits(form: StateForm, n_queries: int, n_keys: int) -> torch.Tensor:
    """[Nq] int64 on the CPU: how many of the first keys each query sees."""
    limit = sympy.Integer(n_keys) if form.limit is None else form.limit
    found = torch.as_tensor(evaluate_expression(limit, positions(n_queries, n_keys, torch.device("cpu"))))
    return found.to(torch.int64).clamp(0, n_keys).flatten().expand(n_queries)


@lru_cache(maxsize=512)
def state_plan(attend: Attend, sizes: Sizes) -> StatePlan | None:
    """The plan by which a call computes the operation through its state; None where pair by pair is cheaper, or the only way.

    Of segments, as of a single one: their lengths are data (`codegen.interval_plan`), but for those that positions tell apart, whose pairs
    are counted.
    """
    form = state_form(attend)
    if isinstance(form, str) or not all(sizes):
        return None
    # Few queries, as in decoding: nothing has to be looked at.
    whole = sizes.n_queries * sizes.n_keys
    if not is_cheaper(sizes, counts_of(form, sizes, 0), whole):
        return None
    if form.limit is not None:
        whole = int(limits(form, sizes.n_queries, sizes.n_keys).sum())
    if any(all(map(is_static, pair)) for pair in form.segments):
        whole = visible_pairs(attend.mask, sizes.n_queries, sizes.n_keys)
    plan = chunked(form, sizes, best_chunk_of(form, sizes))
    return plan if is_cheaper(sizes, plan.counts, whole) else None


def best_chunk_of(form: StateForm, sizes: Sizes) -> int:
    """How many queries a call takes at a time."""
    if form.limit is None:
        return max(1, FEATURES_AT_A_TIME // (sizes.batch * sizes.heads * form.width(sizes.head_dim)))
    return best_limited_chunk(form, sizes)


def best_limited_chunk(form: StateForm, sizes: Sizes) -> int:
    """The same where its keys are multiplied pair by pair."""
    counts = counts_of(form, sizes, 0)
    of_entries = COST_OF_AN_ENTRY * counts["Hs"] / sizes.heads * counts["F"] * counts["V"]
    return _rounded(best_chunk(counts["F"], counts["V"], COST_OF_A_CHUNK / (sizes.batch * sizes.heads) + of_entries))


def chunked(form: StateForm, sizes: Sizes, chunk: int) -> StatePlan:
    """The plan that takes `chunk` queries at a time."""
    steps = _steps(limits(form, sizes.n_queries, sizes.n_keys), chunk)
    return StatePlan(steps, counts_of(form, sizes, sum(step.n_rows * (step.until - step.before) for step in steps)))


def counts_of(form: StateForm, sizes: Sizes, diagonal: int) -> dict[str, int]:
    """The numbers that `STATE` needs beside a call's sizes."""
    own = sizes.key_heads if form.shares_keys else sizes.heads
    return {"Hs": own, "F": form.width(sizes.head_dim), "V": sizes.value_dim + form.totals, "diagonal": diagonal}


def is_cheaper(sizes: Sizes, counts: Mapping[str, int], pairs: int) -> bool:
    """Whether `STATE` with these counts is below `QUADRATIC` with so many pairs."""
    return _value(_state, sizes, counts) < _value(_quadratic, sizes, {"pairs": pairs})


def _value(formula: Callable[..., float], sizes: Sizes, counts: Mapping[str, int]) -> float:
    """A formula at the sizes of a call; what it does not depend on need not be known."""
    batch, heads, _, n_queries, n_keys, head_dim, value_dim = sizes
    known = {"B": batch, "H": heads, "Nq": n_queries, "Nk": n_keys, "D": head_dim, "Dv": value_dim, **counts}
    return formula(*(known.get(symbol.name, 0) for symbol in _SYMBOLS))


def _steps(seen: torch.Tensor, chunk: int) -> tuple[Step, ...]:
    """Chunks of queries, in an order in which what they see grows."""
    n_queries = len(seen)
    if bool((seen.diff() >= 0).all()):
        starts = range(0, n_queries, chunk)
        return tuple(Step(slice(at, min(at + chunk, n_queries)), int(seen[at]), int(seen[min(at + chunk, n_queries) - 1])) for at in starts)
    order = seen.argsort(stable=True)
    return tuple(Step(rows, int(seen[rows[0]]), int(seen[rows[-1]])) for rows in torch.split(order, chunk))
