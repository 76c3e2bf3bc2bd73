"""Which kernel serves an operation of a site's body on a GPU."""

from __future__ import annotations

from collections.abc import Mapping

from codegen.backward_kernel import has_triton_backward
from codegen.contraction_order import Sizes, state_plan
from codegen.kernel import has_triton_form
from codegen.received_kernel import exchanged, has_triton_statistic
from codegen.state_kernels import has_triton_state_backward
from rewrite.ir.operations import Attend, Operation
from rewrite.ir.statistic import Statistic


def kernel_attention(operation: Operation) -> Attend | None:
    """The attention whose emitted kernel computes the operation, or None where torch operators do."""
    match operation:
        case Attend():
            return operation if has_triton_form(operation) is None else None
        case Statistic():
            return exchanged(operation).attend if has_triton_statistic(operation) is None else None
        case _:
            return None


def reason_without_backward(attend: Attend, sizes: Mapping[str, int]) -> str | None:
    """Why the gradients of an attention of these sizes (B, H, Hkv, Nq, Nk, D, Dv) are found in torch operators, in words, or None."""
    if state_plan(attend, Sizes.named(sizes)) is not None:
        return has_triton_state_backward(attend)
    return has_triton_backward(attend)


def reason_without_kernel(operation: Operation) -> str | None:
    """Why an attention or a statistic runs in torch operators on every device, in words; None where a kernel serves it, or none should."""
    match operation:
        case Attend():
            return has_triton_form(operation)
        case Statistic():
            reason = has_triton_statistic(operation)
            return None if reason is None else f"the statistic has no Triton form: {reason}"
        case _:
            return None
