"""Operations around an attention that say themselves what they compute: one result, of the tensors that they name.

A class here has all that the compiler asks of it: `compute` is its meaning, for proofs and tests and in a rewritten graph alike, and `cost`
what it multiplies and adds. Its fields are the names of its tensors (`operands`, None for one that is not there) and facts. Lowering and
semantics treat all of them alike.
"""

from __future__ import annotations

import dataclasses
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self

import torch

from rewrite.ir.attend import Attend


class Axes(NamedTuple):
    """Sizes of a tensor [B, heads, tokens, width] of a body, B aside."""

    heads: int
    tokens: int
    width: int


@dataclass(frozen=True)
class PlainOperation(ABC):
    """Base of these operations: a frozen dataclass whose first field is `result`.

    operands: the fields that name tensors, the first of which is always there. token_by_token: a token of the result depends on the same
    token of the first operand and on nothing else that has tokens.
    """

    operands: ClassVar[tuple[str, ...]]
    token_by_token: ClassVar[bool] = False

    result: str

    @abstractmethod
    def compute(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The result. tensors: by field, for every operand that is not None."""

    @abstractmethod
    def axes(self, given: Mapping[str, Axes]) -> Axes:
        """Those of the result. given: by field, of the operands that are tokens of the site."""

    def cost(self, given: Mapping[str, Axes]) -> int:
        """Multiply-adds for one row of a batch; elementwise work counts nothing."""
        return 0

    def reads(self) -> dict[str, str]:
        """The names of the tensors, by field."""
        return {field: name for field in self.operands if (name := getattr(self, field)) is not None}

    def facts(self) -> str:
        """The fields that are no tensors, as JSON: how they travel through a graph."""
        rest = (field.name for field in dataclasses.fields(self) if field.name not in ("result", *self.operands))
        return json.dumps({name: _written(getattr(self, name)) for name in rest})

    @classmethod
    def of(cls, facts: str, present: tuple[str, ...]) -> Self:
        """The operation that `facts` was written of, its tensors named as its fields, those that are not `present` None."""
        fields: dict[str, Any] = {name: _read(value) for name, value in json.loads(facts).items()}
        return cls(result="result", **fields, **{name: name if name in present else None for name in cls.operands})


def _written(value: Any) -> Any:
    return {"attend": value.to_json()} if isinstance(value, Attend) else value


def _read(value: Any) -> Any:
    if isinstance(value, dict):
        return Attend.from_json(value["attend"])
    return tuple(map(_read, value)) if isinstance(value, list) else value
