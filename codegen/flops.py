"""What `torch.utils.flop_counter` counts for the attention operators: what they multiply and add, exactly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils.flop_counter import register_flop_formula

from codegen.multiply_adds import computed_multiply_adds
from codegen.operator import attend_backward_op, attend_op
from codegen.recurrence import state_shape
from codegen.recurrent_operator import attend_state_op
from rewrite.ir.operations import Attend

# torch's convention for the backward of attention: five matrix products (one of them recomputes the scores) to the forward's two.
BACKWARD_TO_FORWARD = 2.5

Shape = Sequence[int]


def attend_flops(query: Shape, key: Shape, value: Shape, attend: str) -> int:
    """Two for every multiply-add, for query [B, H, Nq, D], key [B, Hkv, Nk, D] and value [B, Hkv, Nk, Dv]."""
    sizes = dict(zip(("B", "H", "Nq", "D", "Hkv", "Nk", "Dv"), (*query, *key[1:3], value[3]), strict=True))
    return 2 * computed_multiply_adds(Attend.from_json(attend), sizes)


@register_flop_formula(attend_op._opoverload.overloadpacket)
def _forward(query: Shape, key: Shape, value: Shape, tensors: Any, attend: str, *args: Any, **kwargs: Any) -> int:
    return attend_flops(query, key, value, attend)


@register_flop_formula(attend_backward_op._opoverload.overloadpacket)
def _backward(
    grad_out: Shape, grad_lse: Shape, out: Shape, lse: Shape, operands: Sequence[Shape], wanted: Any, attend: str, *args: Any, **kwargs: Any
) -> int:
    query, key, value = operands[:3]
    return int(BACKWARD_TO_FORWARD * attend_flops(query, key, value, attend))


@register_flop_formula(attend_state_op._opoverload.overloadpacket)
def _recurrent(query: Shape, key: Shape, value: Shape, tensors: Any, before: Any, attend: str, *args: Any, **kwargs: Any) -> int:
    """Without a state in front, the attention and the sum that makes the state; behind one, its update and its product with queries."""
    batch, own, features, columns = state_shape(Attend.from_json(attend), query, key, value)
    if not before:
        return attend_flops(query, key, value, attend) + 2 * batch * own * key[2] * features * columns
    return 2 * batch * (query[1] * query[2] + own * key[2]) * features * columns
