"""What a site's body is made of: a short straight-line program over named tensors.

Layouts are fixed so that neither a pass nor a kernel sees how the model spelt them: query [B, H, Nq, D], key [B, Hkv, Nk, D],
value [B, Hkv, Nk, Dv] with H a multiple of Hkv, results [B, H, Nq, Dv].
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import lru_cache

import sympy
from sympy.logic.boolalg import Boolean

from rewrite.ir.expression import from_json, tensors_in, to_json


@dataclass(frozen=True)
class Groups:
    """Keys split into groups whose softmax masses decide how much each group counts.

    membership: name of an integer tensor [B, Nk]; entry g puts the key into group ``names[g]``.
    weights: one factor per group, an expression in the masses, `i` and tensors indexed by b, h, i. With a the softmax weights and
        g(j) the group of key j, the site's output is  sum_j weights[g(j)] * a[i,j] * v[j]:  nothing is normalised again.
    """

    membership: str
    names: tuple[str, ...]
    weights: tuple[sympy.Expr, ...]


@dataclass(frozen=True)
class Attend:
    """``result[b,h,i,:] = sum_j softmax_j(score where mask)[b,h,i,j] value[b,h',j,:]``; a query that sees no key gives zeros.

    score: in `qk`, positions and tensors. mask: which (i, j) take part. groups: optional reweighting between groups of keys.
    """

    result: str
    query: str
    key: str
    value: str
    score: sympy.Expr
    mask: Boolean = sympy.true
    groups: Groups | None = None

    def tensors(self) -> dict[str, str]:
        """The tensor operands besides query, key and value, sorted by name: name -> axes ("bij" and so on)."""
        return dict(_tensors_of(self))

    def to_json(self) -> str:
        """The operation without its operand names: what a kernel is generated from, and what it is cached by."""
        groups = self.groups
        return json.dumps(
            {
                "score": to_json(self.score),
                "mask": to_json(self.mask),
                "groups": None
                if groups is None
                else {
                    "membership": groups.membership,
                    "names": list(groups.names),
                    "weights": [to_json(weight) for weight in groups.weights],
                },
            },
            separators=(",", ":"),
        )

    @staticmethod
    @lru_cache(maxsize=1024)
    def from_json(text: str) -> Attend:
        """The operation that `to_json` wrote, its operands named query, key, value and result."""
        data = json.loads(text)
        groups = data["groups"]
        return Attend(
            result="result",
            query="query",
            key="key",
            value="value",
            score=from_json(data["score"]),
            mask=from_json(data["mask"]),
            groups=None
            if groups is None
            else Groups(
                groups["membership"],
                tuple(groups["names"]),
                tuple(sympy.sympify(from_json(weight)) for weight in groups["weights"]),
            ),
        )


@lru_cache(maxsize=1024)
def _tensors_of(operation: Attend) -> tuple[tuple[str, str], ...]:
    expressions: list[sympy.Basic] = [operation.score, operation.mask]
    named: dict[str, str] = {}
    if operation.groups is not None:
        expressions += operation.groups.weights
        named[operation.groups.membership] = "bj"
    return tuple(sorted({**tensors_in(*expressions), **named}.items()))


@dataclass(frozen=True)
class Pool:
    """Adaptive average pooling of tokens: source [B, H, prefix + N, D] -> result [B, H, prod(size), D]; prefix tokens are left out.

    grid: how the N tokens lie, raster order; a 1-tuple (N,) pools along the sequence. size: one entry per grid axis.
    """

    result: str
    source: str
    grid: tuple[int, ...]
    size: tuple[int, ...]
    prefix: int = 0


@dataclass(frozen=True)
class DepthwiseConv:
    """A depthwise convolution of tokens as an image; rows of prefix tokens are zero.

    source [B, H, prefix + h*w, D], weight [H*D, 1, k, k], bias [H*D]; zero padding k // 2; result shaped like source.
    """

    result: str
    source: str
    weight: str
    bias: str
    grid: tuple[int, int]
    prefix: int = 0


@dataclass(frozen=True)
class GridBias:
    """An attention bias interpolated to a grid (agent attention, Han et al. 2024, eq. 6).

    table [H, P, s, s] is resized bilinearly (align_corners=False) to the grid, rows [1, H, P, h, 1] and columns [1, H, P, 1, w] are
    added, and prefix [1, H, P, prefix] leads; result [1, H, P, prefix + h*w], transposed in the last two where asked.
    """

    result: str
    table: str
    rows: str
    columns: str
    prefix: str | None
    grid: tuple[int, int]
    transposed: bool = False


@dataclass(frozen=True)
class Sum:
    """result = the sum of equally shaped tensors."""

    result: str
    terms: tuple[str, ...]


@dataclass(frozen=True)
class SinkGroups:
    """Groups of keys for visual attention sinks (Kang et al. 2025), from the hidden states that enter the layer.

    hidden [B, N, C] and visual [B, N] (bool) cover the new tokens; earlier tokens of a KV cache keep the group they were given.
    A token is a sink where  max_{c in dims} |hidden_c| / sqrt(mean(hidden^2) + epsilon) > threshold  (dims empty: every channel).

    Three results: result [B, Nk] int32 (0 text, 1 visual, 2 visual sink, 3 text sink); active [B, N] int32, one where the query comes
    after the last visual token of a row that has a visual sink; count [B] float32, the visual tokens of the row.
    """

    result: str
    active: str
    count: str
    hidden: str
    visual: str
    dims: tuple[int, ...]
    threshold: float
    epsilon: float = 1e-6


Operation = Attend | Pool | DepthwiseConv | GridBias | Sum | SinkGroups


@dataclass(frozen=True)
class Parameter:
    """A tensor a pass adds to the model: `init` is "zeros", "ones" or ("normal", std)."""

    name: str
    shape: tuple[int, ...]
    init: str | tuple[str, float] = "zeros"


@dataclass(frozen=True)
class Body:
    """A site's computation: operations in order, the last one's result being the site's output."""

    operations: tuple[Operation, ...]
    parameters: tuple[Parameter, ...] = field(default=())

    @property
    def result(self) -> str:
        return self.operations[-1].result

    def attends(self) -> tuple[Attend, ...]:
        """The attention operations, in order."""
        return tuple(operation for operation in self.operations if isinstance(operation, Attend))
