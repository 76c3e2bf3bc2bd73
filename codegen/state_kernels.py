"""From an attention operation to its emitted state kernels, and from the operation's JSON back to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch

from codegen.backward_block import reached
from codegen.cache import store
from codegen.compilation import CompiledKernel, capability_of, compile_state
from codegen.emitted_kernel import EmittedKernel
from codegen.state_file import state_name, state_source
from codegen.state_gradients import gradient_forms, gradients_through_state
from codegen.state_tiles import StateTile
from rewrite.ir.errors import RewriteError
from rewrite.ir.operations import Attend


@dataclass(frozen=True)
class StateKernel(EmittedKernel):
    """The emitted kernels that compute an operation through its state: ``<name>_states``, ``<name>_outputs`` and, where the state grows,
    ``<name>_carry``.
    """

    def compile(
        self,
        target: str = "sm_90",
        dtype: torch.dtype = torch.bfloat16,
        head_dim: int = 64,
        value_dim: int | None = None,
        tensor_dtypes: Mapping[str, torch.dtype] | None = None,
    ) -> dict[str, CompiledKernel]:
        """Compile ahead of time; needs no GPU. {"states": ..., "outputs": ...}, and "carry" where the state grows.

        Arguments and errors are those of `codegen.kernel.Kernel.compile`.
        """
        return compile_state(
            self.load(),
            self.name,
            self.attend,
            capability=capability_of(target),
            dtype=dtype,
            head_dim=head_dim,
            value_dim=value_dim or head_dim,
            tensor_dtypes=tensor_dtypes or {},
        )


_kernels: dict[str, StateKernel] = {}


def emit_state(attend: Attend, sites: tuple[str, ...] = (), passes: tuple[str, ...] = ()) -> StateKernel:
    """Write the kernels that compute `attend` through its state to the cache and let the operator use them from now on.

    sites: names of the attention sites that share them. passes: what shaped them. Both are stated in the source.
    Raises `RewriteError` where the operation has no such kernels or the cache folder is not the user's alone.
    """
    source = state_source(attend, sites, passes)
    name = state_name(attend)
    kernel = StateKernel(name, ", ".join(sites), passes, store(name, source), source, attend.to_json())
    _kernels[kernel.attend_json] = kernel
    return kernel


@lru_cache(maxsize=1024)
def has_triton_state(attend: Attend) -> str | None:
    """None where kernels compute the operation through its state, else why not, in words."""
    try:
        state_source(attend)
    except RewriteError as error:
        return str(error)
    return None


def state_kernel_for(attend_json: str) -> StateKernel:
    """The kernels last emitted for the operation; such without sites where none were (a graph that came from another process)."""
    return _kernels.get(attend_json) or emit_state(Attend.from_json(attend_json))


@lru_cache(maxsize=1024)
def has_triton_state_backward(attend: Attend, wanted: tuple[str, ...] | None = None) -> str | None:
    """None where kernels that carry a state give the gradients of the operation, else why not, in words.

    wanted: names of the tensors whose gradients are asked for, query, key and value aside; by default every one that arithmetic reads.
    """
    names = [name for name in attend.tensors() if reached(attend, name)] if wanted is None else list(wanted)
    if names:
        return f"kernels that carry a state do not give the gradient of {', '.join(names)}"
    forms = gradient_forms(attend)
    if isinstance(forms, str):
        return forms
    return next((reason for each in forms.every if (reason := has_triton_state(each)) is not None), None)


def state_gradients_on_device(
    attend: Attend,
    received: tuple[torch.Tensor, torch.Tensor],
    out: torch.Tensor,
    operands: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    tensors: Mapping[str, torch.Tensor],
    tile: StateTile | None = None,
) -> list[torch.Tensor]:
    """Gradients of query, key and value by kernels that carry a state, of an operation that has them (`has_triton_state_backward`).

    received: the gradients of out and lse. tile: by default the one for the head dim.
    """
    forms = gradient_forms(attend)
    assert not isinstance(forms, str)

    def compute(each: Attend, given: tuple[torch.Tensor, torch.Tensor, torch.Tensor], named: Mapping[str, torch.Tensor]) -> torch.Tensor:
        query, key, value = (operand if operand.stride(-1) == 1 else operand.contiguous() for operand in given)
        # In float32: heads that share keys are summed yet, and what a sum is divided by is no place for roundings.
        result = torch.empty(*query.shape[:3], value.shape[3], dtype=torch.float32, device=query.device)
        lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
        launch = state_kernel_for(each.to_json()).load().launch
        launch(query, key, value, [named[name] for name in each.tensors()], result, lse, tile=tile)
        return result

    return gradients_through_state(attend, forms, received, out, operands, tensors, compute)
