"""Linear attention as published methods and models have it, and random operands for it."""

from __future__ import annotations

from dataclasses import replace

import sympy
import torch
from attention_forms import Shape, operands, plain

from codegen import packed
from rewrite.ir import NK, NQ, QK, TOTAL, Attend, B, I, J, W, read, tensor

UNNORMALISED = replace(plain(), normaliser="none")
NORMALISED = replace(plain(), score=QK, normaliser="sum", denominator=TOTAL + 1e-12)
SEEN = sympy.Ne(tensor("seen", "bi"), 0)
CAUSAL = sympy.Le(J, I + (NK - NQ))


def lightning(shift: sympy.Expr | int = 0) -> Attend:
    """Lightning attention, RetNet: a decay per head; keys that are not `shift` tokens back are not seen."""
    return replace(UNNORMALISED, score=sympy.exp(-tensor("rate", "h") * (I + (NK - NQ) - J)) * QK, mask=sympy.Le(J, I + (NK - NQ) - shift))


def inline() -> Attend:
    """InLine attention: weights that sum to one by an offset of each query."""
    scale = sympy.Float(0.25)
    return replace(UNNORMALISED, score=scale * QK / NK + (1 - scale * tensor("offset", "bhi")) / NK)


def gated() -> Attend:
    """Factors of queries, keys, weights and values, and a mask of keys."""
    score = (tensor("a", "bhi") * QK + tensor("bias", "j")) * tensor("c", "bj") + tensor("c", "bj") ** 2
    weight = tensor("gate", "hi") * W * read("table", B, sympy.floor(J / 9)) / 2
    return replace(NORMALISED, score=score, weight=weight, denominator=sympy.Max(TOTAL, 3), mask=sympy.Ne(tensor("mask", "bj"), 0))


# Name -> the form, and whether a query sees a part of the keys only.
FORMS: dict[str, tuple[Attend, bool]] = {
    "lightning": (lightning(), True),
    "lightning, 64 tokens back": (lightning(64), True),
    "hedgehog": (NORMALISED, False),
    "hedgehog, causal": (replace(NORMALISED, mask=CAUSAL), True),
    "inline": (inline(), False),
    "rala": (replace(UNNORMALISED, score=tensor("z", "bhi") * QK / NK), False),
    "l2vit": (replace(NORMALISED, denominator=sympy.Max(TOTAL, 100), weight=tensor("t", "h") * W), False),
    "gated": (gated(), False),
    "gated, causal": (replace(gated(), mask=sympy.And(gated().mask, CAUSAL)), True),
    "padded and decaying": (replace(lightning(), mask=sympy.And(CAUSAL, sympy.Ne(tensor("mask", "bhj"), 0), SEEN)), True),
    "prefix": (replace(UNNORMALISED, score=QK / NK, mask=sympy.Or(I < 3, J < 5, J <= I)), True),
    "frames": (replace(NORMALISED, mask=sympy.floor(J / 7) <= sympy.floor(I / 7)), True),
    "columns": (replace(UNNORMALISED, score=tensor("column", "bhj")), False),
    "packed": (packed(NORMALISED), False),
    "packed, causal": (packed(replace(NORMALISED, mask=CAUSAL)), True),
    "packed, gated, padded": (packed(gated()), False),
    "packed, padded and decaying": (packed(replace(lightning(), mask=sympy.And(CAUSAL, SEEN))), True),
    "packed, prefix": (packed(replace(UNNORMALISED, score=QK, mask=sympy.Or(J < 5, J <= I))), True),
    "packed, positions": (packed(replace(NORMALISED, mask=tensor("key_places", "bj") <= tensor("query_places", "bi"))), False),
    "positions": (replace(NORMALISED, mask=sympy.And(tensor("query_places", "bi") < tensor("key_places", "bj"), SEEN)), False),
    "windows, packed": (packed(replace(NORMALISED, mask=sympy.Eq(sympy.floor(I / 7), sympy.floor(J / 7)))), False),
}


def linear_operands(
    attend: Attend, shape: Shape, dtype: torch.dtype = torch.float32, seed: int = 0, rate: float = 0.1, broadcast: bool = False
) -> dict[str, torch.Tensor]:
    """Operands whose sums stay away from zero: features of queries and keys, and what multiplies them, are not negative."""
    values = operands(attend, shape, dtype, seed, broadcast)
    if attend.normaliser == "sum":
        values |= {name: value.abs() for name, value in values.items() if name in {"query", "key", "a", "c", "bias"}}
    generator = torch.Generator().manual_seed(seed)
    values |= {name: torch.randint(-9, 9, value.shape, generator=generator) for name, value in values.items() if name.endswith("places")}
    if "rate" in values:
        values["rate"] = rate * values["rate"].abs()
    if "seen" in values:
        values["seen"] = values["seen"] > -1
    return values
