"""How far gradients may be from the float64 reference: bounds from the data and the arithmetic, as in `budget`.

Names as in `codegen.backward_block`. A product is off by the unit roundoff of float32 times the number of its terms times the sum of their
magnitudes; what is rounded to the dtype for a second product, or was (the output that delta is made of), by the dtype's. Errors of weights
come from those of scores (`budget.score_error`). Each is carried on by the magnitudes of what it is multiplied by.
"""

from __future__ import annotations

from dataclasses import replace

import sympy
import torch
from budget import OPERATIONS_OF_A_GROUP_WEIGHT, environment, in_double, score_error, scores

from codegen.backward_block import read_of
from codegen.tensor_reads import derivative
from codegen.torch_backward import attend_gradients
from codegen.weight_form import weight_factor
from rewrite.ir import QK, TOTAL, Attend, Groups, W, mass
from rewrite.ir.expression import letters
from rewrite.ir.semantics import aligned, attend, attention_weights, evaluate_expression

SINGLE = torch.finfo(torch.float32).eps
# Roundings of a few operations in float32 between two sums.
FEW = 8


def reference_gradients(operation: Attend, values: dict[str, torch.Tensor], d_out: torch.Tensor) -> dict[str, torch.Tensor]:
    """In float64, of query, key, value and every floating tensor.

    Where a group has no keys, autograd takes nought times infinity; the torch lowering, whose slopes are symbolic, is the reference there.
    """
    leaves = {name: value.requires_grad_() for name, value in in_double(values).items() if value.is_floating_point()}
    found = torch.autograd.grad(attend(operation, {**values, **leaves}), list(leaves.values()), d_out.double(), allow_unused=True)
    if any(part is not None and part.isnan().any() for part in found):
        doubled = in_double(values)
        qkv, names = (doubled["query"], doubled["key"], doubled["value"]), list(leaves)[3:]
        found = attend_gradients(operation, (d_out.double(), torch.zeros(d_out.shape[:3])), qkv, doubled, names)
    return {name: torch.zeros_like(leaves[name]) if part is None else part for name, part in zip(leaves, found, strict=True)}


class GradientBudget:
    """The bounds for one operation on its operands, for a gradient d_out [B, H, Nq, Dv] of its result in `dtype`."""

    def __init__(self, operation: Attend, values: dict[str, torch.Tensor], d_out: torch.Tensor, dtype: torch.dtype) -> None:
        self.operation, self.values, self.dtype = operation, in_double(values), dtype
        self.known = environment(operation, values)
        self.dot = self.known["qk"]
        score, self.seen, _ = scores(operation, values)
        self.unit = torch.finfo(dtype).eps
        self.smallest = torch.finfo(dtype).eps * torch.finfo(dtype).smallest_normal
        self.heads = self.values["query"].shape[1] // self.values["key"].shape[1]
        self.d_out = d_out.double().abs()
        value = self.values["value"].abs().repeat_interleave(self.heads, 1)
        self.weights = attention_weights(replace(operation, weight=W, groups=None), self.values).abs()
        self.known["w"] = self.weights
        self.d_weight = self.d_out @ value.transpose(-2, -1)
        # How far what weights are reweighted by may be off, relatively: a few operations on masses.
        self.group_error = 0.0 if operation.groups is None else OPERATIONS_OF_A_GROUP_WEIGHT * self._of_scores()
        if operation.groups is None:
            self.factor = self._filled(weight_factor(operation.weight)).abs()
            self.d_normalised = self.factor * self.d_weight
        else:
            self.factor, offset = self._groups(operation.groups)
            self.d_normalised = self.factor * self.d_weight + offset
        self.plain_error = self._of_weights(score) + FEW * SINGLE * self.weights
        self.weight_error = self.factor * self.plain_error + (self.group_error + FEW * SINGLE) * self.factor * self.weights
        self.off = (value.shape[3] + FEW) * SINGLE
        self.received_error = (self.off + self.group_error) * self.d_normalised
        n_keys = value.shape[2]
        # c: from the output as it was rounded, or summed up where there are groups.
        self.counted = (self.weights * self.d_normalised).sum(-1, keepdim=True)
        self.counted_error = (self.plain_error * self.d_normalised + self.weights * self.received_error).sum(-1, keepdim=True)
        self.counted_error = self.counted_error + (3 * self.unit + n_keys * SINGLE) * self.counted
        self.score_gradient, self.score_gradient_error = self._through_normaliser(score)

    def _filled(self, expression: sympy.Basic | None, **more: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(evaluate_expression(expression, {**self.known, **more}), dtype=torch.float64).expand_as(self.dot)

    def _groups(self, groups: Groups) -> tuple[torch.Tensor, torch.Tensor]:
        """Magnitudes of what weights are multiplied by, and of what their gradients get through the masses, per pair."""
        member = self.known[groups.membership].expand_as(self.dot)
        for index, name in enumerate(groups.names):
            self.known[f"mass_{name}"] = (self.weights * (member == index)).sum(-1, keepdim=True)
        factor, offset = torch.zeros_like(self.dot), torch.zeros_like(self.dot)
        for index, (name, weight) in enumerate(zip(groups.names, groups.weights, strict=True)):
            chosen = (member == index) & (self.known[f"mass_{name}"] > 0)
            factor = torch.where(chosen, self._filled(weight).abs(), factor)
            offset = torch.where(chosen, self.through_groups(groups, mass(name)), offset)
        return factor, offset

    def through_groups(self, groups: Groups, variable: sympy.Basic) -> torch.Tensor:
        """The magnitude of  sum_f c_f dW_f/dvariable,  [B, H, Nq, 1]."""
        member = self.known[groups.membership].expand_as(self.dot)
        total = torch.zeros_like(self.dot[..., :1])
        for index, (name, weight) in enumerate(zip(groups.names, groups.weights, strict=True)):
            received = (self.weights * self.d_weight * (member == index)).sum(-1, keepdim=True)
            slope = self._filled(derivative(sympy.sympify(weight), variable))[..., :1].abs()
            total = total + torch.where(self.known[f"mass_{name}"] > 0, received * slope, 0.0)
        return total

    def _of_scores(self) -> float:
        """The relative error of a softmax weight that is recomputed from lse."""
        largest = float(self.known["qk"].abs().max()) + 1.0
        return 4 * score_error(self.operation, self.values) + FEW * SINGLE * largest

    def _of_weights(self, score: torch.Tensor) -> torch.Tensor:
        """How far the normalised weights may be off, before their factor."""
        if self.operation.normaliser == "softmax":
            return self._of_scores() * self.weights
        error = score_error(self.operation, self.values) * self._slope(QK).abs() * self.seen
        if self.operation.normaliser == "none":
            return error
        share, _, relative = self._divided(score)
        return share * error + torch.where(self.weights > 0, relative * self.weights, 0.0)

    def _divided(self, score: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of a sum: (1 / denominator, magnitude of its slope by the sum, relative error of the former)."""
        total = score.masked_fill(~self.seen, 0.0).sum(-1, keepdim=True).expand_as(self.dot)
        divisor = self._filled(self.operation.denominator, total=total).abs()
        changes = self._filled(derivative(self.operation.denominator, TOTAL), total=total).abs()
        # Scores that a rectifier holds at zero are zero exactly.
        error = (score_error(self.operation, self.values) * self._slope(QK).abs() * self.seen).sum(-1, keepdim=True)
        share = (1 / divisor.masked_fill(divisor == 0, 1.0)).masked_fill(divisor == 0, 0.0)
        # Where the sum is nothing but error, so is what is divided by it.
        unknown = (changes * error > 0) & (divisor <= changes * error)
        return share, changes, (changes * error * share + FEW * SINGLE).masked_fill(unknown, torch.inf)

    def _through_normaliser(self, score: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(magnitude, error) of d_score."""
        received, counted = self.d_normalised, self.counted
        if self.operation.normaliser == "softmax":
            error = self._of_scores() * self.weights * (received + counted)
            return self.weights * (received + counted), error + self.weights * (self.received_error + self.counted_error)
        if self.operation.normaliser == "none":
            return received * self.seen, self.received_error * self.seen
        share, changes, relative = self._divided(score)
        magnitude = share * (received + changes * counted) * self.seen
        error = share * (self.received_error + changes * self.counted_error) * self.seen
        return magnitude, error + torch.where(magnitude > 0, relative * magnitude, 0.0)

    def _slope(self, variable: sympy.Basic) -> torch.Tensor:
        return self._filled(derivative(self.operation.score, variable))

    def _reached(self, slope: sympy.Expr) -> tuple[torch.Tensor, torch.Tensor]:
        """(magnitude, error) of d_score times a slope of the score, which is off itself where it depends on qk."""
        size = self._filled(slope).abs()
        bent = self._filled(derivative(slope, QK)).abs().max() if slope.has(QK) else torch.zeros(())
        off = bent * score_error(self.operation, self.values) + FEW * SINGLE * size.max()
        magnitude = size * self.score_gradient
        return magnitude, size * self.score_gradient_error + off * self.score_gradient

    def of(self, name: str) -> torch.Tensor:
        """The bound for the gradient of query, key, value or a tensor."""
        if name == "value":
            counted = self.factor * self.weights
            error = self.weight_error + (3 * self.unit + counted.shape[2] * SINGLE) * counted + self.smallest
            return self._by_key_head(error.transpose(-2, -1) @ self.d_out) + self.smallest
        if name in ("query", "key"):
            magnitude, error = self._reached(sympy.sympify(derivative(self.operation.score, QK)))
            # Rounded for the product, and once more as a result. A slope that is a number is multiplied by afterwards.
            error = error + (3 * self.unit + max(magnitude.shape[2:]) * SINGLE) * magnitude + self.smallest
            if name == "query":
                return error @ self.values["key"].abs().repeat_interleave(self.heads, 1) + self.smallest
            return self._by_key_head(error.transpose(-2, -1) @ self.values["query"].abs()) + self.smallest
        return self._of_tensor(name)

    def _by_key_head(self, gradient: torch.Tensor) -> torch.Tensor:
        return gradient.unflatten(1, (-1, self.heads)).sum(2)

    def _of_tensor(self, name: str) -> torch.Tensor:
        operation, operand = self.operation, self.values[name]
        indices = operation.tensors()[name]
        variable = read_of(name, indices)
        magnitude, error = self._reached(sympy.sympify(derivative(operation.score, variable)))
        by_weight = self._filled(derivative(sympy.sympify(weight_factor(operation.weight)), variable)).abs()
        magnitude = magnitude + by_weight * self.weights * self.d_weight
        error = error + by_weight * (self.off * self.weights + self.plain_error) * self.d_weight
        # Sums along each axis, one after the other.
        stages = (sum(self.dot.shape[2:]) + self.dot.shape[0] * self.dot.shape[1]) * SINGLE
        parts = [error + (stages + self.unit) * magnitude]
        if operation.sink is not None:
            size, off = self._sink()
            slope = self._filled(derivative(operation.sink, variable))[..., :1].abs()
            parts.append(slope * (off + (stages + self.unit + FEW * SINGLE) * size))
        if operation.groups is not None:
            size = self.through_groups(operation.groups, variable)
            parts.append((stages + self.unit + self.off + 2 * self.group_error) * size)
        whole = aligned(operand, letters(indices) or "").shape
        total = torch.zeros(whole, dtype=torch.float64)
        for part in parts:
            summed = [axis for axis in range(4) if whole[axis] == 1 and part.shape[axis] != 1]
            total = total + (part.sum(summed, keepdim=True) if summed else part)
        return total.reshape(operand.shape) + self.smallest

    def _sink(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(magnitude, error) of the gradient of the sink's logit, [B, H, Nq, 1]."""
        score, seen, sink = scores(self.operation, self.values)
        assert sink is not None
        lse = score.masked_fill(~seen, -torch.inf).logsumexp(-1, keepdim=True)
        share = torch.sigmoid(sink - lse).masked_fill(lse == -torch.inf, 0.0)
        return share * self.counted, share * (self.counted_error + self._of_scores() * self.counted)
