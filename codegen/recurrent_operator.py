"""The registered operator ``rewrite::attend_state``: linear attention of new tokens behind the state of all earlier ones.

On CUDA a call without a state in front computes its output as ``rewrite::attend`` does; the state, and every later call, are torch
operators there as on the CPU. There is no way back through it: it serves calls without gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from codegen.operands import named_operands, require_attention
from codegen.operator import attend_op, library, under_autocast
from codegen.recurrence import attend_recurrently, state_shape, whole
from codegen.tensor_reads import accumulation_dtype
from codegen.torch_streaming import output_like
from rewrite.ir.errors import RewriteError
from rewrite.ir.operations import Attend

Results = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@torch.library.custom_op("rewrite::attend_state", mutates_args=())
def attend_state_op(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    before: Sequence[torch.Tensor],
    attend: str,
) -> Results:
    """(out, state, seen, held) as in `codegen.recurrence.Continued`.

    query [B, H, n, D], key [B, Hkv, n, D], value [B, Hkv, n, Dv] of the n new tokens. before: state [B, Hs, F, V] and seen [B, N] of the N
    earlier ones, or nothing. tensors: in the order of ``Attend.tensors()``, over N + n keys. attend: the JSON of an operation of which
    `codegen.recurrence.recurrent` gives one.

    Raises `ModelCallError` where the mask says of earlier keys what the state does not, `RewriteError` where operands do not fit.
    """
    operation = Attend.from_json(attend)
    require_attention(query, key, value)
    if query.shape[2] != key.shape[2]:
        raise RewriteError(f"{query.shape[2]} queries and {key.shape[2]} keys are not those of the same new tokens")
    past = before[1].shape[1] if before else 0
    named = named_operands(operation.tensors(), operation.mixes, (query, whole(key, past + key.shape[2])), tensors)
    earlier = (before[0], before[1]) if before else None

    def forward(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = attend_op(query, key, value, tensors, attend)[0]
        return out

    found = attend_recurrently(operation, (query, key, value), named, earlier, None if query.device.type == "cpu" else forward)
    return found.out, found.state, found.seen, found.held


@attend_state_op.register_fake
def _fake(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    before: Sequence[torch.Tensor],
    attend: str,
) -> Results:
    past = before[1].shape[1] if before else 0
    shape = state_shape(Attend.from_json(attend), query.shape, key.shape, value.shape)
    state = query.new_empty(shape, dtype=accumulation_dtype(query.dtype))
    seen = query.new_empty(query.shape[0], past + key.shape[2], dtype=torch.bool)
    return output_like(query, value)[0], state, seen, torch.empty((), dtype=torch.bool)


for _device in ("cpu", "cuda"):
    library.impl("attend_state", under_autocast(attend_state_op, _device), f"Autocast{_device.upper()}")  # type: ignore[no-untyped-call]
