"""Which kernel serves an operation of a site's body on a GPU."""

from __future__ import annotations

from collections.abc import Mapping

from codegen.backward_kernel import has_triton_backward
from codegen.contraction_order import Sizes, state_plan
from codegen.given_kernel import summed
from codegen.kernel import has_triton_form
from codegen.received_kernel import exchanged
from codegen.state_form import has_sorted_keys
from codegen.state_kernels import has_triton_state_backward
from codegen.statistic_kernels import has_triton_statistic
from rewrite.ir.operations import Attend, Operation
from rewrite.ir.statistic import Statistic


def kernel_attention(operation: Operation) -> tuple[Attend, bool] | None:
    """The attention whose emitted kernel computes the operation, and whether it has values (`codegen.streaming.StreamingKernel`).

    None where torch operators compute it.
    """
    match operation:
        case Attend():
            return (operation, True) if has_triton_form(operation) is None else None
        case Statistic():
            if has_triton_statistic(operation) is not None:
                return None
            return (summed(operation), False) if operation.over == "keys" else (exchanged(operation).attend, True)
        case _:
            return None


def reason_without_backward(attend: Attend, sizes: Mapping[str, int]) -> str | None:
    """Why the gradients of an attention of these sizes (B, H, Hkv, Nq, Nk, D, Dv) are found in torch operators, in words, or None."""
    if state_plan(attend, Sizes.named(sizes)) is not None:
        reason = has_triton_state_backward(attend)
        if reason is None or not has_sorted_keys(attend):
            return reason
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
