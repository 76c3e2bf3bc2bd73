"""The registered operators ``rewrite::attend`` and ``rewrite::attend_backward``, and the function `attend` that calls the first.

An operation travels through a graph as its JSON text. On CUDA the forward is the kernel emitted for that text where it has one
(`codegen.kernel.has_triton_form`), or its state kernels where a call of these sizes is computed so (`codegen.contraction_order`,
`codegen.state_kernels.has_triton_state`); on the CPU the torch lowering. So is the backward: on CUDA the kernels emitted for it where it
has them (`codegen.backward_kernel.has_triton_backward`), from the output and the log-sum-exp that forward gave, or state
kernels again where it goes through the state (`codegen.state_gradients`); the torch lowering elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch

from codegen.backward_kernel import has_triton_backward
from codegen.kernel import has_triton_form
from codegen.operands import named_operands, require_attention
from codegen.ordered_launch import launch_attention_in_order, launch_backward_in_order
from codegen.state_call import way_on_device
from codegen.state_kernels import has_triton_state, has_triton_state_backward, state_gradients_on_device, state_kernel_for
from codegen.torch_backward import attend_gradients
from codegen.torch_streaming import attend_forward, output_like
from rewrite.ir.errors import RewriteError
from rewrite.ir.operations import Attend


def _named(
    operation: Attend, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tensors: Sequence[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The tensors by name. Raises `RewriteError` where an operand does not fit the operation."""
    require_attention(query, key, value)
    return named_operands(operation.tensors(), operation.mixes, (query, key), tensors)


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with its last axis contiguous: kernels, and torch's fused CPU operator, read it so whatever the strides say."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


@torch.library.custom_op("rewrite::attend", mutates_args=(), device_types="cpu")
def attend_op(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tensors: Sequence[torch.Tensor], attend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [B, H, Nq, Dv] in the query's dtype, lse [B, H, Nq] float32) of the operation whose JSON is `attend`.

    query [B, H, Nq, D], key [B, Hkv, Nk, D], value [B, Hkv, Nk, Dv], of one dtype. tensors: in the order of ``Attend.tensors()``, with
    exactly the axes it says, each full size or 1. Raises `RewriteError` where they do not fit.
    """
    operation = Attend.from_json(attend)
    named = _named(operation, query, key, value, tensors)
    return attend_forward(operation, _rows(query), _rows(key), _rows(value), named)


@attend_op.register_kernel("cuda")
def _attend_cuda(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tensors: Sequence[torch.Tensor], attend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    operation = Attend.from_json(attend)
    named = _named(operation, query, key, value, tensors)
    way = way_on_device(operation, (query, key, value), named, has_triton_state(operation))
    if way == "torch" or (way == "pairs" and has_triton_form(operation) is not None):
        return attend_forward(operation, _rows(query), _rows(key), _rows(value), named)
    out, lse = output_like(query, value)
    if out.numel():
        with torch.cuda.device(query.device):
            if way == "kernels":
                state_kernel_for(attend).load().launch(_rows(query), _rows(key), _rows(value), tensors, out, lse)
            else:
                launch_attention_in_order(attend, (_rows(query), _rows(key), _rows(value)), tensors, out, lse)
    return out, lse


@attend_op.register_fake
def _attend_fake(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tensors: Sequence[torch.Tensor], attend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    return output_like(query, value)


@torch.library.custom_op("rewrite::attend_backward", mutates_args=())
def attend_backward_op(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    operands: Sequence[torch.Tensor],
    wanted: Sequence[int],
    attend: str,
) -> list[torch.Tensor]:
    """Gradients of query, key, value, and of ``tensors[n]`` for n in `wanted`, in this order.

    operands: query, key, value and the tensors, as for ``rewrite::attend``; out [B, H, Nq, Dv] and lse [B, H, Nq]: what it gave for them,
    with their gradients.
    """
    operation = Attend.from_json(attend)
    query, key, value, *tensors = operands
    named = _named(operation, query, key, value, tensors)
    names = [list(named)[index] for index in wanted]
    return attend_gradients(operation, (grad_out, grad_lse), (query, key, value), named, names)


@attend_backward_op.register_kernel("cuda")
def _attend_backward_cuda(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    operands: Sequence[torch.Tensor],
    wanted: Sequence[int],
    attend: str,
) -> list[torch.Tensor]:
    operation = Attend.from_json(attend)
    query, key, value, *tensors = operands
    named = _named(operation, query, key, value, tensors)
    names = tuple(list(named)[index] for index in wanted)
    way = way_on_device(operation, (query, key, value), named, has_triton_state_backward(operation, names))
    if way == "kernels":
        with torch.cuda.device(query.device):
            return state_gradients_on_device(operation, (grad_out, grad_lse), out, (query, key, value), named)
    # A grid of no programs cannot be launched.
    if way == "torch" or has_triton_backward(operation, names) is not None or not (query.numel() and key.numel() and value.numel()):
        return attend_gradients(operation, (grad_out, grad_lse), (query, key, value), named, names)
    gradients = (query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape))
    received = (_rows(out), lse, _rows(grad_out), grad_lse)
    with torch.cuda.device(query.device):
        asked = launch_backward_in_order(attend, (_rows(query), _rows(key), _rows(value)), tensors, received, gradients, wanted)
    return [*gradients, *asked]


@attend_backward_op.register_fake
def _attend_backward_fake(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    operands: Sequence[torch.Tensor],
    wanted: Sequence[int],
    attend: str,
) -> list[torch.Tensor]:
    chosen = [*operands[:3], *(operands[3 + index] for index in wanted)]
    return [operand.new_empty(operand.shape) for operand in chosen]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    query, key, value, tensors, attend = inputs
    ctx.save_for_backward(*output, query, key, value, *tensors)
    ctx.attend = attend


def _backward(ctx: Any, grad_out: torch.Tensor, grad_lse: torch.Tensor) -> tuple[Any, ...]:
    out, lse, *operands = ctx.saved_tensors
    tensors = operands[3:]
    needs = ctx.needs_input_grad[3]
    needed = [needs] * len(tensors) if isinstance(needs, bool) else list(needs)
    wanted = [index for index, (operand, need) in enumerate(zip(tensors, needed, strict=True)) if need and operand.is_floating_point()]
    d_query, d_key, d_value, *d_wanted = attend_backward_op(grad_out, grad_lse, out, lse, operands, wanted, ctx.attend)
    d_tensors: list[torch.Tensor | None] = [None] * len(tensors)
    for index, gradient in zip(wanted, d_wanted, strict=True):
        d_tensors[index] = gradient
    return d_query, d_key, d_value, d_tensors, None


attend_op.register_autograd(_backward, setup_context=_setup_context)


def under_autocast(operator: Callable[..., Any], device: str) -> Callable[..., Any]:
    """As torch's own attention does: query, key and value are cast to autocast's dtype, masks and biases are left as they are."""
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))

    def call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *others: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)
        query, key, value = (t.to(dtype) if t.dtype != torch.float64 else t for t in (query, key, value))
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return operator(query, key, value, *others)

    return call


library = torch.library.Library("rewrite", "FRAGMENT")  # type: ignore[no-untyped-call]
for _device in ("cpu", "cuda"):
    library.impl("attend", under_autocast(attend_op, _device), f"Autocast{_device.upper()}")  # type: ignore[no-untyped-call]


@lru_cache(maxsize=1024)
def _described(operation: Attend | str) -> tuple[str, tuple[str, ...]]:
    """(JSON of the operation, the names of its tensors in order)."""
    text = operation if isinstance(operation, str) else operation.to_json()
    return text, tuple(Attend.from_json(text).tensors())


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _constant(operation: Attend | str) -> tuple[str, tuple[str, ...]]:
    """An operation is a constant of the program that calls it: its text is worked out outside the trace."""
    return _described(operation)


def attend(
    operation: Attend | str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tensors: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """The operation's result [B, H, Nq, Dv], in the dtype of query, key and value, or in autocast's where that is on.

    operation: an `Attend` or its JSON. query [B, H, Nq, D], key [B, Hkv, Nk, D], value [B, Hkv, Nk, Dv]. tensors: the operation's other
    operands by name, with exactly the axes that ``operation.tensors()`` says, each full size or 1; names it does not read are ignored.
    Differentiable in query, key, value and the floating tensors. Raises `RewriteError` where operands are missing or do not fit.
    """
    text, names = _constant(operation)
    missing = [name for name in names if name not in tensors]
    if missing:
        raise RewriteError(f"the operation reads {', '.join(missing)}, which were not given")
    out: torch.Tensor = torch.ops.rewrite.attend(query, key, value, [tensors[name] for name in names], text)[0]
    return out
