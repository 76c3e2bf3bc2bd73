"""The operation that the compiler is about: attention, in every form that models have it.

Layouts are fixed so that neither a pass nor a kernel sees how the model spelt them: query [B, H, Nq, D], key [B, Hkv, Nk, D],
value [B, Hkv, Nk, Dv] with H a multiple of Hkv, results [B, H, Nq, Dv].
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal, get_args

import sympy
from sympy.logic.boolalg import Boolean

from rewrite.ir.expression import NK, NQ, QK, TOTAL, B, G, H, I, Indices, J, W, from_json, tensors_in, to_json
from rewrite.ir.hashed_once import HashedOnce

Normaliser = Literal["softmax", "sum", "none"]


@dataclass(frozen=True)
class Groups:
    """Keys split into groups whose softmax masses decide how much each group counts.

    membership: name of an integer tensor [B, Nk], or [B, H, Nk] where groups are `per_head`; entry g puts the key into group ``names[g]``.
    weights: one factor per group, an expression in the masses, `i` and tensors indexed by b, h, i. With a the softmax weights and
        g(j) the group of key j, the site's output is  sum_j weights[g(j)] * a[i,j] * v[j]:  nothing is normalised again.
    """

    membership: str
    names: tuple[str, ...]
    weights: tuple[sympy.Expr, ...]
    per_head: bool = False

    @property
    def read(self) -> Indices:
        """Where the membership is read."""
        return (B, H, J) if self.per_head else (B, J)


@dataclass(frozen=True)
class HeadMix:
    """Heads mixed into each other (talking heads):  mixed[g] = sum_h matrix[g,h] x[h] + bias[g].

    matrix: name of an operand [H, H], the first axis being the head that results. bias: name of an operand [H], or None.
    """

    matrix: str
    bias: str | None = None


@dataclass(frozen=True)
class BlockChoice:
    """What is known beforehand of a mask that is chosen from the data: how many blocks of keys a block of queries sees.

    tensor: name of a tensor that the mask reads as ``Ne(tensor[..., f(i), g(j)], 0)``, f the block of a query and g that of a key.
    most: along the tensor's last axis no more entries than this differ from zero.

    It is a promise about the tensor, and no part of the meaning: with it the torch lowering gathers `most` blocks without asking the device
    how many were chosen. The emitted kernels need none: they walk lists that are made from the tensor itself.
    """

    tensor: str
    most: int

    def __post_init__(self) -> None:
        if self.most < 1:
            raise ValueError(f"most={self.most}: a choice is of at least one block")


@dataclass(frozen=True)
class Attend(HashedOnce):
    """``result[b,h,i,:] = sum_j weights[b,h,i,j] value[b,h',j,:]``, the weights being made in this order:

    1. score: an expression in `qk`, positions and tensors.
    2. score_mix: heads mixed into each other.
    3. mask: which pairs take part. Pairs it hides weigh nothing: they are left out of every normaliser and have w = 0 in step 6.
    4. normaliser, over keys. "softmax", with `sink` (an expression in b, h, i and tensors indexed by them) as the logit of one more key
       that has no value. "sum": s / denominator, an expression in `total`, which is sum_j s, and in b, h, i, Nq and Nk. "none": s itself.
    5. weight_mix: heads mixed into each other.
    6. weight: what becomes of the normalised weight `w`, an expression in `w`, positions and tensors.
    7. renormalised: divided by their sum over keys.
    8. groups: reweighting between groups of keys, allowed only where 2 and 4 to 7 are as in plain softmax attention.

    choice: a promise about a tensor that the mask reads, see `BlockChoice`.

    Where a step would divide by zero, for one a softmax over no key, it gives zeros. Raises `ValueError` for parts that do not go together
    and symbols that do not belong.
    """

    result: str
    query: str
    key: str
    value: str
    score: sympy.Expr
    mask: Boolean = sympy.true
    groups: Groups | None = None
    normaliser: Normaliser = "softmax"
    denominator: sympy.Expr = TOTAL
    sink: sympy.Expr | None = None
    weight: sympy.Expr = W
    renormalised: bool = False
    score_mix: HeadMix | None = None
    weight_mix: HeadMix | None = None
    choice: BlockChoice | None = None

    __hash__ = HashedOnce.__hash__

    def __post_init__(self) -> None:
        if self.normaliser not in get_args(Normaliser):
            raise ValueError(f"no such normaliser: {self.normaliser!r}; there are {', '.join(get_args(Normaliser))}")
        if self.sink is not None and self.normaliser != "softmax":
            raise ValueError(f"a sink is a logit of a softmax, and the normaliser is {self.normaliser!r}")
        if self.denominator != TOTAL and self.normaliser != "sum":
            raise ValueError(f"a denominator belongs to a 'sum' normaliser, and the normaliser is {self.normaliser!r}")
        unknown = {str(symbol) for symbol in self.denominator.free_symbols - {TOTAL, B, H, I, NQ, NK}}
        if unknown:
            raise ValueError(
                f"the denominator {self.denominator} may depend on total, b, h, i, Nq and Nk, not on {', '.join(sorted(unknown))}"
            )
        if self.groups is not None and self.unusual:
            raise ValueError(f"groups of keys are defined for plain softmax attention, and this {self.unusual[0]}")
        _tensors_of(self)
        score, mask, weight = (sympy.sympify(part).free_symbols for part in (self.score, self.mask, self.weight))
        if TOTAL in score | mask | weight:
            raise ValueError("total belongs to the denominator")
        if W in score | mask or QK in weight | mask:
            raise ValueError("w belongs to the weight expression and qk to the score: one is not known where the other is used")
        if self.sink is not None and {W, QK, J, TOTAL} & self.sink.free_symbols:
            raise ValueError(f"the sink {self.sink} may depend on b, h and i, not on a key")
        if self.choice is not None and self.choice.tensor not in tensors_in(self.mask):
            raise ValueError(f"blocks are chosen by {self.choice.tensor}, which the mask {self.mask} does not read")

    @property
    def unusual(self) -> tuple[str, ...]:
        """What sets this apart from plain softmax attention, groups aside: words that follow "it"."""
        parts = (
            (self.score_mix is not None or self.weight_mix is not None, "mixes heads (talking heads)"),
            (self.normaliser == "sum", "is linear attention (its weights are scores divided by their sum)"),
            (self.normaliser == "none", "has no normaliser (its weights are the scores)"),
            (self.sink is not None, "has sink logits"),
            (self.weight != W, f"changes its weights after the normaliser (to {self.weight})"),
            (self.renormalised, "normalises its weights again"),
        )
        return tuple(said for holds, said in parts if holds)

    @property
    def is_plain(self) -> bool:
        """Softmax of the masked scores and nothing else: no sink, no mixed heads, no changed weights, no groups."""
        return not self.unusual and self.groups is None

    @property
    def mixes(self) -> tuple[HeadMix, ...]:
        return tuple(mix for mix in (self.score_mix, self.weight_mix) if mix is not None)

    def expressions(self) -> tuple[sympy.Expr, ...]:
        """Everything arithmetic that tensors are read in; the mask only compares."""
        sink = () if self.sink is None else (self.sink,)
        return (self.score, *sink, self.weight, *(() if self.groups is None else self.groups.weights))

    def tensors(self) -> dict[str, Indices]:
        """The tensor operands besides query, key and value, sorted by name: name -> where they are read, one index per axis.

        The matrix of a `HeadMix` is read at (g, h), its bias at (g,).
        """
        return dict(_tensors_of(self))

    def __str__(self) -> str:
        """For example ``out = softmax(0.125*qk + bias[h, i, j], where=j <= i, sink=t[h]) @ value``."""
        score, weight = str(self.score), str(self.weight)
        score = _mixed(self.score_mix, score)
        said = {"where": "" if self.mask == sympy.true else str(self.mask), "sink": "" if self.sink is None else str(self.sink)}
        said["denominator"] = "" if self.denominator == TOTAL else str(self.denominator)
        facts = ", ".join([score, *(f"{name}={text}" for name, text in said.items() if text)])
        text = _mixed(self.weight_mix, f"{'scores' if self.normaliser == 'none' else self.normaliser}({facts})")
        if self.weight != W:
            text = f"({weight} with w = {text})"
        text = f"normalised({text})" if self.renormalised else text
        if self.groups is not None:
            weights = ", ".join(f"{name}: {weight}" for name, weight in zip(self.groups.names, self.groups.weights, strict=True))
            text = f"grouped({text}, by={self.groups.membership}{list(self.groups.read)}, {weights})"
        return f"{self.result} = {text} @ {self.value}"

    def to_json(self) -> str:
        """The operation without its operand names: what a kernel is generated from, and what it is cached by."""
        groups = self.groups
        data: dict[str, Any] = {
            "score": to_json(self.score),
            "mask": to_json(self.mask),
            "groups": None
            if groups is None
            else {
                "membership": groups.membership,
                "names": list(groups.names),
                "weights": [to_json(weight) for weight in groups.weights],
                "per_head": groups.per_head,
            },
            "normaliser": self.normaliser,
            "denominator": to_json(self.denominator),
            "sink": None if self.sink is None else to_json(self.sink),
            "weight": to_json(self.weight),
            "renormalised": self.renormalised,
            "score_mix": None if self.score_mix is None else asdict(self.score_mix),
            "weight_mix": None if self.weight_mix is None else asdict(self.weight_mix),
            "choice": None if self.choice is None else asdict(self.choice),
        }
        return json.dumps(data, separators=(",", ":"))

    @staticmethod
    @lru_cache(maxsize=1024)
    def from_json(text: str) -> Attend:
        """The operation that `to_json` wrote, its operands named query, key, value and result."""
        data = json.loads(text)
        groups, score_mix, weight_mix, choice = data["groups"], data["score_mix"], data["weight_mix"], data["choice"]
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
                groups["per_head"],
            ),
            normaliser=data["normaliser"],
            denominator=sympy.sympify(from_json(data["denominator"])),
            sink=None if data["sink"] is None else from_json(data["sink"]),
            weight=from_json(data["weight"]),
            renormalised=data["renormalised"],
            score_mix=None if score_mix is None else HeadMix(**score_mix),
            weight_mix=None if weight_mix is None else HeadMix(**weight_mix),
            choice=None if choice is None else BlockChoice(**choice),
        )


def _mixed(mix: HeadMix | None, text: str) -> str:
    if mix is None:
        return text
    return f"mixed({text}, {mix.matrix})" if mix.bias is None else f"mixed({text}, {mix.matrix}, {mix.bias})"


@lru_cache(maxsize=1024)
def _tensors_of(operation: Attend) -> tuple[tuple[str, Indices], ...]:
    found = tensors_in(*operation.expressions(), operation.mask)
    named: list[tuple[str, Indices]] = [] if operation.groups is None else [(operation.groups.membership, operation.groups.read)]
    for mix in operation.mixes:
        named += [(mix.matrix, (G, H))] + ([] if mix.bias is None else [(mix.bias, (G,))])
    for name, places in named:
        if found.setdefault(name, places) != places:
            raise ValueError(f"{name} is read at {found[name]} and at {places}; give the second read a name of its own")
    return tuple(sorted(found.items()))
