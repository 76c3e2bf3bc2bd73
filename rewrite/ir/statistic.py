"""What is read off an attention map without the map."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import sympy

from rewrite.ir.attend import Attend
from rewrite.ir.expression import QK, Indices, W, from_json, tensors_in, to_json
from rewrite.ir.hashed_once import HashedOnce

Over = Literal["queries", "keys"]


@dataclass(frozen=True)
class Statistic(HashedOnce):
    """Sums over an attention's map, float32 (float64 for float64 operands):

        over = "queries"    result[b,h,j] = sum_i term(w[b,h,i,j])      [B, H, Nk]: what each key receives
        over = "keys"       result[b,h,i] = sum_j term(w[b,h,i,j])      [B, H, rows]: what each query gives, its entropy, ...

    with w the weights that `attend` multiplies its values by, over the pairs that its mask lets through.

    term: an expression in `w`, positions and tensors: `w` itself; `text[b,i] * w` for the rows of some queries; `visual[b,j] * w` over keys
        for the mass of a group of keys; see `ENTROPY`.
    rows: the queries that are summed or given, (start, stop) as of a slice, negative from the end; None is all of them. (0, 1) is the row
        of a leading CLS token, (-1, None) that of the last query: no other row is computed.
    result, and the operands that `attend` names, as in `Attend`; its value and its result are not read. Raises `ValueError` for a term that
    reads what is not known there.
    """

    result: str
    attend: Attend
    over: Over = "queries"
    term: sympy.Expr = W
    rows: tuple[int, int | None] | None = None

    __hash__ = HashedOnce.__hash__

    def __post_init__(self) -> None:
        if self.over not in get_args(Over):
            raise ValueError(f"a statistic is summed over queries or over keys, not over {self.over!r}")
        if QK in self.term.free_symbols or W not in self.term.free_symbols:
            raise ValueError(f"a term is an expression in the weight w, and not in qk: {self.term}")
        self.tensors()

    def tensors(self) -> dict[str, Indices]:
        """The tensor operands of the attention and of the term, sorted by name: name -> where they are read."""
        return dict(_tensors_of(self))

    def __str__(self) -> str:
        """For example ``received = sum_i text[b, i]*w with w = softmax(0.125*qk, where=j <= i)``."""
        index, told = ("i", "") if self.over == "queries" else ("j", "")
        if self.rows is not None:
            told = f" of queries {self.rows[0]}:{'' if self.rows[1] is None else self.rows[1]}"
        weights = str(self.attend).removeprefix(f"{self.attend.result} = ").removesuffix(f" @ {self.attend.value}")
        return f"{self.result} = sum_{index} {self.term}{told} with w = {weights}"

    def to_json(self) -> str:
        """The statistic without operand names: what a kernel is generated from, and what it is cached by."""
        data = {"attend": self.attend.to_json(), "over": self.over, "term": to_json(self.term), "rows": self.rows}
        return json.dumps(data, separators=(",", ":"))

    @staticmethod
    @lru_cache(maxsize=1024)
    def from_json(text: str) -> Statistic:
        """The statistic that `to_json` wrote."""
        data = json.loads(text)
        rows = None if data["rows"] is None else (data["rows"][0], data["rows"][1])
        return Statistic("statistic", Attend.from_json(data["attend"]), data["over"], from_json(data["term"]), rows)


# The entropy of each query's attention in nats: over="keys".
ENTROPY = sympy.Piecewise((-W * sympy.log(W), W > 0), (sympy.Integer(0), True))


@lru_cache(maxsize=1024)
def _tensors_of(statistic: Statistic) -> tuple[tuple[str, Indices], ...]:
    found = statistic.attend.tensors()
    for name, places in tensors_in(statistic.term).items():
        if found.setdefault(name, places) != places:
            raise ValueError(f"{name} is read at {found[name]} and at {places}; give the second read a name of its own")
    return tuple(sorted(found.items()))
