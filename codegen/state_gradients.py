"""The gradients of linear attention as linear attentions, so that the kernels that carry a state give them too.

With s the score, s' its derivative by qk, x y the weight's factors of query and key, share = 1 / denominator (one without a normaliser) and
delta[i] = (denominator's derivative) share[i] (dout[i] . out[i]) - dlse[i] / total[i],

    dquery[i] = sum_j s'[i,j] (x y share[i] (dout[i] . value[j]) - delta[i]) key[j]
    dkey[j]   = sum_i s'[i,j] (x y share[i] (dout[i] . value[j]) - delta[i]) query[i]
    dvalue[j] = sum_i x y share[i] s[i,j] dout[i]

each again a sum over products of a query's and a key's part. In the last two keys stand where queries do; where the order of the tokens
counts it is turned round for them, so that what a key is seen by comes before it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import sympy
import torch

from codegen.normalise import divided
from codegen.state_form import state_form
from codegen.tensor_reads import derivative
from codegen.weight_form import weight_factor
from rewrite.ir.expression import NK, NQ, QK, TOTAL, I, J, W, letters, tensor
from rewrite.ir.operations import Attend
from rewrite.ir.semantics import all_positions, evaluate_expression

# An attention on operands (query, key, value) and tensors by name, its result [B, H, Nq, Dv] in float32 or better.
Compute = Callable[[Attend, tuple[torch.Tensor, torch.Tensor, torch.Tensor], Mapping[str, torch.Tensor]], torch.Tensor]


@dataclass(frozen=True)
class GradientForms:
    """The attentions that give the gradients. of_key and of_value: with queries and keys exchanged, `turned` round if so.

    totals: the sums of the scores, of values that are one; share, delta: the names of the tensors [B, H, Nq] that the others read.
    """

    of_query: Attend
    of_key: Attend
    of_value: Attend
    totals: Attend
    turned: bool
    share: str
    delta: str

    @property
    def every(self) -> tuple[Attend, ...]:
        return self.of_query, self.of_key, self.of_value, self.totals


@lru_cache(maxsize=1024)
def gradient_forms(attend: Attend) -> GradientForms | str:
    """The attentions for the gradients of query, key and value, or why there are none, in words."""
    form = state_form(attend)
    if isinstance(form, str):
        return f"it has no state form: {form}"
    by_expression = [name for name, indices in attend.tensors().items() if letters(indices) is None]
    if by_expression:
        return f"{', '.join(by_expression)} is read at expressions in positions, which do not turn round with the tokens"
    names = [name if name not in attend.tensors() else f"{name}_" for name in ("row_share", "row_delta")]
    share, delta = (tensor(name, "bhi") for name in names)
    factor = sympy.sympify(weight_factor(attend.weight))
    plain = replace(attend, normaliser="none", denominator=TOTAL, weight=W)
    summed = attend.normaliser == "sum"
    received = factor * share * QK - delta if summed else factor * QK
    of_dot = derivative(attend.score, QK) * received
    of_value = factor * share * attend.score if summed else factor * attend.score
    turned = form.limit is not None
    return GradientForms(
        replace(plain, score=of_dot), _exchanged(plain, of_dot, turned), _exchanged(plain, of_value, turned), plain, turned, *names
    )


def _exchanged(plain: Attend, score: sympy.Expr, turned: bool) -> Attend:
    """The operation with queries and keys in each other's place, counted from the last one where `turned`."""
    places = {I: NQ - 1 - I, J: NK - 1 - J} if turned else {}
    swapped = {I: J, J: I, NQ: NK, NK: NQ}

    def exchange(expression: sympy.Basic) -> sympy.Basic:
        reads = {each: sympy.Dummy(real=True) for each in expression.atoms(sympy.Indexed)}
        moved = expression.xreplace(reads).subs(places, simultaneous=True).xreplace(swapped)
        # A tensor is turned round itself.
        return moved.xreplace({dummy: each.xreplace(swapped) for each, dummy in reads.items()})

    return replace(plain, score=exchange(score), mask=exchange(plain.mask))


def gradients_through_state(
    attend: Attend,
    forms: GradientForms,
    received: tuple[torch.Tensor, torch.Tensor],
    out: torch.Tensor,
    operands: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    tensors: Mapping[str, torch.Tensor],
    compute: Compute,
) -> list[torch.Tensor]:
    """Gradients of query, key and value, shaped and typed as these are. received: the gradients of out and of lse."""
    (grad_out, grad_lse), (query, key, value) = received, operands
    known = dict(tensors)
    if attend.normaliser == "sum":
        total = compute(forms.totals, (query, key, value.new_ones(*value.shape[:3], 1)), tensors)
        environment = {**all_positions((*query.shape[:3], key.shape[2]), query.device), "total": total}

        def of_total(expression: sympy.Expr) -> torch.Tensor:
            found = torch.as_tensor(evaluate_expression(expression, environment), dtype=total.dtype, device=total.device)
            return found.expand_as(total)

        share = divided(torch.ones_like(total), of_total(attend.denominator))
        counted = (grad_out.to(total.dtype) * out.to(total.dtype)).sum(-1, keepdim=True)
        delta = of_total(derivative(attend.denominator, TOTAL)) * share * counted
        delta = delta - divided(grad_lse[..., None].to(total.dtype), total.clamp(min=0.0))
        known |= {forms.share: share[..., 0], forms.delta: delta[..., 0]}
    grad_out = grad_out.to(query.dtype)
    d_query = compute(forms.of_query, (grad_out, value, key), known)
    group = query.shape[1] // key.shape[1]
    keys, values = (operand.repeat_interleave(group, dim=1) for operand in (key, value))
    turn = _turned if forms.turned else _as_it_is
    exchanged = {name: turn(known[name], indices) for name, indices in {**forms.of_key.tensors(), **forms.of_value.tensors()}.items()}
    rows = [turn(operand, (None, None, I)) for operand in (query, keys, values, grad_out)]
    turned_query, turned_keys, turned_values, turned_grad = rows
    d_key = compute(forms.of_key, (turned_values, turned_grad, turned_query), exchanged)
    d_value = compute(forms.of_value, (turned_keys, turned_query, turned_grad), exchanged)
    d_key, d_value = (turn(total, (None, None, I)).view(len(total), -1, group, *total.shape[2:]).sum(2) for total in (d_key, d_value))
    return [total.to(operand.dtype) for total, operand in zip((d_query, d_key, d_value), operands, strict=True)]


def _turned(operand: torch.Tensor, indices: tuple[sympy.Expr | None, ...]) -> torch.Tensor:
    """The operand with its axes over tokens turned round."""
    return operand.flip([axis for axis, index in enumerate(indices) if index in (I, J)])


def _as_it_is(operand: torch.Tensor, indices: tuple[sympy.Expr | None, ...]) -> torch.Tensor:
    return operand
