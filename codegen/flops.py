"""What `torch.utils.flop_counter` counts for the attention operators: the pairs that the static mask lets through, exactly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils.flop_counter import register_flop_formula

from codegen.block_choice import visited_pairs
from codegen.operator import attend_backward_op, attend_op
from rewrite.ir.operations import Attend

# torch's convention for the backward of attention: five matrix products (one of them recomputes the scores) to the forward's two.
BACKWARD_TO_FORWARD = 2.5

Shape = Sequence[int]


def attend_flops(query: Shape, key: Shape, value: Shape, attend: str) -> int:
    """2 * B * H * pairs * (D + Dv), for query [B, H, Nq, D], key [B, Hkv, Nk, D] and value [B, Hkv, Nk, Dv].

    Of blocks that the data choose, as many pairs are counted as may be chosen (`codegen.block_choice`).
    """
    batch, heads, n_queries, head_dim = query
    return 2 * batch * heads * visited_pairs(Attend.from_json(attend), n_queries, key[2]) * (head_dim + value[3])


@register_flop_formula(attend_op._opoverload.overloadpacket)
def _forward(query: Shape, key: Shape, value: Shape, tensors: Any, attend: str, *args: Any, **kwargs: Any) -> int:
    return attend_flops(query, key, value, attend)


@register_flop_formula(attend_backward_op._opoverload.overloadpacket)
def _backward(
    grad_out: Shape, grad_lse: Shape, out: Shape, lse: Shape, operands: Sequence[Shape], wanted: Any, attend: str, *args: Any, **kwargs: Any
) -> int:
    query, key, value = operands[:3]
    return int(BACKWARD_TO_FORWARD * attend_flops(query, key, value, attend))
