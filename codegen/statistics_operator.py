"""The registered operator ``rewrite::attention_statistic`` with its gradient, and the function `statistic` that calls it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch

from codegen.operands import named_operands, require_attention
from codegen.statistic_kernels import has_triton_statistic, statistic_by_kernel
from codegen.tensor_reads import accumulation_dtype
from codegen.torch_statistics import result_shape, statistic_forward, statistic_gradients
from rewrite.ir.errors import RewriteError
from rewrite.ir.statistic import Statistic


@torch.library.custom_op("rewrite::attention_statistic", mutates_args=(), device_types="cpu")
def statistic_op(
    query: torch.Tensor, key: torch.Tensor, tensors: Sequence[torch.Tensor], lse: torch.Tensor | None, statistic: str
) -> torch.Tensor:
    """The result of the `Statistic` whose JSON is given: [B, H, Nk] over queries, [B, H, rows] over keys, in the accumulation dtype.

    query [B, H, Nq, D], key [B, Hkv, Nk, D], of one dtype. tensors: in the order of ``Statistic.tensors()``. lse: the attention's own
    [B, H, Nq] where it is at hand, which saves the kernels a pass. Raises `RewriteError` where operands do not fit.
    """
    operation = Statistic.from_json(statistic)
    require_attention(query, key, key)
    named = named_operands(operation.tensors(), operation.attend.mixes, (query, key), tensors)
    return statistic_forward(operation, query, key, named)


@statistic_op.register_kernel("cuda")
def _statistic_cuda(
    query: torch.Tensor, key: torch.Tensor, tensors: Sequence[torch.Tensor], lse: torch.Tensor | None, statistic: str
) -> torch.Tensor:
    operation = Statistic.from_json(statistic)
    require_attention(query, key, key)
    named = named_operands(operation.tensors(), operation.attend.mixes, (query, key), tensors)
    # A grid of no programs cannot be launched.
    if has_triton_statistic(operation) is not None or query.dtype == torch.float64 or not (query.numel() and key.numel()):
        return statistic_forward(operation, query, key, named)
    with torch.cuda.device(query.device):
        return statistic_by_kernel(operation, query, key, named, lse)


@statistic_op.register_fake
def _statistic_fake(
    query: torch.Tensor, key: torch.Tensor, tensors: Sequence[torch.Tensor], lse: torch.Tensor | None, statistic: str
) -> torch.Tensor:
    return query.new_empty(result_shape(Statistic.from_json(statistic), query, key), dtype=accumulation_dtype(query.dtype))


@torch.library.custom_op("rewrite::attention_statistic_backward", mutates_args=())
def statistic_backward_op(
    received: torch.Tensor, operands: Sequence[torch.Tensor], wanted: Sequence[int], statistic: str
) -> list[torch.Tensor]:
    """Gradients of query, key, and of ``tensors[n]`` for n in `wanted`, in this order; operands: query, key and the tensors."""
    operation = Statistic.from_json(statistic)
    query, key, *tensors = operands
    named = named_operands(operation.tensors(), operation.attend.mixes, (query, key), tensors)
    return statistic_gradients(operation, received, query, key, named, [list(named)[index] for index in wanted])


@statistic_backward_op.register_fake
def _statistic_backward_fake(
    received: torch.Tensor, operands: Sequence[torch.Tensor], wanted: Sequence[int], statistic: str
) -> list[torch.Tensor]:
    chosen = [*operands[:2], *(operands[2 + index] for index in wanted)]
    return [operand.new_empty(operand.shape) for operand in chosen]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    query, key, tensors, _, ctx.statistic = inputs
    ctx.save_for_backward(query, key, *tensors)


def _backward(ctx: Any, received: torch.Tensor) -> tuple[Any, ...]:
    _, _, *tensors = ctx.saved_tensors
    needs = ctx.needs_input_grad[2]
    needed = [needs] * len(tensors) if isinstance(needs, bool) else list(needs)
    wanted = [index for index, (operand, need) in enumerate(zip(tensors, needed, strict=True)) if need and operand.is_floating_point()]
    d_query, d_key, *d_wanted = statistic_backward_op(received, list(ctx.saved_tensors), wanted, ctx.statistic)
    d_tensors: list[torch.Tensor | None] = [None] * len(tensors)
    for index, gradient in zip(wanted, d_wanted, strict=True):
        d_tensors[index] = gradient
    # lse is a function of the same operands, and the result does not depend on it.
    return d_query, d_key, d_tensors, None, None


statistic_op.register_autograd(_backward, setup_context=_setup_context)


@lru_cache(maxsize=1024)
def _described(operation: Statistic | str) -> tuple[str, tuple[str, ...]]:
    """(JSON of the statistic, the names of its tensors in order)."""
    text = operation if isinstance(operation, str) else operation.to_json()
    return text, tuple(Statistic.from_json(text).tensors())


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _constant(operation: Statistic | str) -> tuple[str, tuple[str, ...]]:
    """A statistic is a constant of the program that reads it: its text is worked out outside the trace."""
    return _described(operation)


def statistic(
    operation: Statistic | str, query: torch.Tensor, key: torch.Tensor, tensors: Mapping[str, torch.Tensor], lse: torch.Tensor | None = None
) -> torch.Tensor:
    """The statistic's result, [B, H, Nk] over queries, [B, H, rows] over keys; float32, or float64 for float64 operands.

    operation: a `Statistic` or its JSON, which is what Dynamo of torch 2.11 takes from outside a function that it compiles. query
    [B, H, Nq, D], key [B, Hkv, Nk, D]. tensors: the operands of attention and term by name, as in `codegen.attend`. lse: what the attention
    saved, if at hand. Differentiable in query, key and the floating tensors. Raises `RewriteError` where operands are missing or do not
    fit.
    """
    text, names = _constant(operation)
    missing = [name for name in names if name not in tensors]
    if missing:
        raise RewriteError(f"the statistic reads {', '.join(missing)}, which were not given")
    result: torch.Tensor = torch.ops.rewrite.attention_statistic(query, key, [tensors[name] for name in names], lse, text)
    return result
