"""The tensors an operation reads, on one block of queries: their values there, and their gradients gathered block by block.

A tensor read at the indices themselves is cut with slices. One that is read at expressions in them, such as a table of relative positions,
is gathered for the block, and its gradient is added up entry by entry, in one fixed order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import sympy
import torch

from codegen.gathered_visit import GatheredVisit
from codegen.visits import Visit
from rewrite.ir.errors import RewriteError
from rewrite.ir.expression import Indices, letters
from rewrite.ir.semantics import aligned, evaluate_expression, places_of, read_at


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What scores and sums are kept in: float32 for the low precisions, float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _entries(shape: Sequence[int], indices: Indices, values: Mapping[str, Any], device: torch.device) -> torch.Tensor:
    """Where a tensor of that shape is read, as numbers of its entries in row-major order, broadcasting against [B, H, rows, columns]."""
    entry = torch.zeros(1, 1, 1, 1, dtype=torch.int64, device=device)
    for place, size in zip(places_of(shape, indices, values, device), shape, strict=True):
        entry = entry * size + place
    return entry


def read_block(tensor: torch.Tensor, indices: Indices, values: Mapping[str, Any], visit: Visit | GatheredVisit) -> torch.Tensor:
    """The tensor where a visit reads it, broadcasting against [B, H, rows, columns]; values: the visit's positions by name."""
    if isinstance(visit, GatheredVisit):
        return tensor.reshape(-1)[_entries(tensor.shape, indices, values, tensor.device)]
    plain = letters(indices)
    return read_at(tensor, indices, values) if plain is None else visit.pairs(aligned(tensor, plain))


@lru_cache(maxsize=1024)
def derivative(expression: sympy.Basic, variable: sympy.Basic) -> sympy.Expr:
    """d expression / d variable in the vocabulary of the IR, the variable being a symbol or a tensor read.

    Corners of Min, Max and Abs are written as cases first. What stands in a tensor's index is no part of the derivative.
    """
    reads = {each: sympy.Dummy(real=True) for each in expression.atoms(sympy.Indexed)}
    bare = expression.xreplace(reads)
    cased = bare.replace(lambda part: isinstance(part, sympy.Min | sympy.Max | sympy.Abs), lambda part: part.rewrite(sympy.Piecewise))
    slope = sympy.sympify(cased).diff(reads.get(variable, variable)).xreplace({symbol: each for each, symbol in reads.items()})
    if slope.has(sympy.Derivative, sympy.Subs, sympy.Heaviside, sympy.DiracDelta):
        raise RewriteError(f"{expression} has no derivative by {variable}: a gradient cannot pass floor or Mod")
    return slope


class TensorGradient:
    """The gradient of one tensor operand, gathered block by block."""

    def __init__(self, name: str, indices: Indices, operand: torch.Tensor) -> None:
        self.read, self.indices, self.operand = sympy.Indexed(sympy.IndexedBase(name, real=True), *indices), indices, operand
        self.total = torch.zeros_like(operand, dtype=accumulation_dtype(operand.dtype), memory_format=torch.contiguous_format)

    def add(self, part: torch.Tensor, values: Mapping[str, Any], visit: Visit | GatheredVisit) -> None:
        """Add what one visit gives, [B, H, rows, columns] or [B, H, rows, 1]; values: the visit's positions by name."""
        plain = letters(self.indices)
        if plain is None or isinstance(visit, GatheredVisit):
            self._add_entries(part, values)
            return
        total = aligned(self.total, plain)
        whole = [axis for axis in range(4) if total.shape[axis] == 1]
        part = part.sum(whole, keepdim=True) if whole else part
        places = zip(range(4), (*visit.of_queries, visit.columns), strict=True)
        batch, heads, rows, columns = (slice(None) if axis in whole else place for axis, place in places)
        if isinstance(rows, torch.Tensor) and isinstance(columns, torch.Tensor):
            rows = rows[:, None]
        total[batch, heads, rows, columns] += part

    def _add_entries(self, part: torch.Tensor, values: Mapping[str, Any]) -> None:
        entry = _entries(self.total.shape, self.indices, values, part.device)
        whole = [axis for axis in range(4) if entry.shape[axis] == 1]
        part = part.sum(whole, keepdim=True) if whole else part
        flat, where, terms = self.total.view(-1), entry.expand_as(part).reshape(-1), part.reshape(-1)
        # Each adds up in a fixed order on its device: the other one would not.
        if part.device.type == "cpu":
            flat.index_add_(0, where, terms)
        else:
            flat.index_put_((where,), terms, accumulate=True)

    def result(self) -> torch.Tensor:
        return self.total.to(self.operand.dtype)


class TensorGradients:
    """The gradients of the tensors in `wanted`, by name; those that nobody wants are not computed."""

    def __init__(self, indices: Mapping[str, Indices], tensors: Mapping[str, torch.Tensor], wanted: Sequence[str]) -> None:
        self._of = {name: TensorGradient(name, indices[name], tensors[name]) for name in wanted}

    def through(self, expression: sympy.Expr, received: torch.Tensor, values: Mapping[str, Any], visit: Visit | GatheredVisit) -> None:
        """Add what reaches the tensors through an expression whose own gradient on this visit is `received`.

        Pairs that receive nothing give nothing: where an additive mask hides a key, slopes may be infinite.
        """
        for gradient in self._of.values():
            slope = derivative(expression, gradient.read)
            if slope != 0:
                part = received * torch.as_tensor(evaluate_expression(slope, values), dtype=received.dtype, device=received.device)
                gradient.add(part.masked_fill_(received == 0, 0.0), values, visit)

    def add_whole(self, parts: Mapping[str, torch.Tensor]) -> None:
        """Add what one visit gives to whole tensors, by name."""
        for name in parts.keys() & self._of.keys():
            self._of[name].total += parts[name]

    def __iter__(self) -> Iterator[TensorGradient]:
        return iter(self._of.values())
