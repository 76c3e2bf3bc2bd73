"""From an attention operation to its emitted backward kernels, and from the operation's JSON back to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch

from codegen.backward_file import backward_name, backward_source, reason_against_backward
from codegen.cache import store
from codegen.compilation import CompiledKernel, capability_of, compile_backward
from codegen.emitted_kernel import EmittedKernel
from codegen.kernel_reads import Owner
from codegen.tiles import BackwardTiles
from rewrite.ir.errors import RewriteError
from rewrite.ir.operations import Attend


@dataclass(frozen=True)
class BackwardKernel(EmittedKernel):
    """The emitted backward kernels of an operation, ``<name>_queries`` and ``<name>_keys``, for what their programs own."""

    def compile(
        self,
        target: str = "sm_90",
        dtype: torch.dtype = torch.bfloat16,
        head_dim: int = 64,
        value_dim: int | None = None,
        tensor_dtypes: Mapping[str, torch.dtype] | None = None,
        tiles: BackwardTiles | None = None,
    ) -> dict[Owner, CompiledKernel]:
        """Compile ahead of time; needs no GPU. {"queries": ..., "keys": ...}, with every gradient they can give.

        tiles: by default the table's. Other arguments and errors are those of `codegen.kernel.Kernel.compile`.
        """
        return compile_backward(
            self.load(),
            self.name,
            self.attend,
            capability=capability_of(target),
            dtype=dtype,
            head_dim=head_dim,
            value_dim=value_dim or head_dim,
            tensor_dtypes=tensor_dtypes or {},
            tiles=tiles,
        )


_kernels: dict[str, BackwardKernel] = {}


def emit_backward(attend: Attend, sites: tuple[str, ...] = (), passes: tuple[str, ...] = ()) -> BackwardKernel:
    """Write the backward kernels for `attend` to the cache and let the operator use them from now on; needs no GPU.

    sites: names of the attention sites that share them. passes: what shaped them. Both are stated in the source.
    Raises `RewriteError` where the operation has no backward kernels or the cache folder is not the user's alone.
    """
    source = backward_source(attend, sites, passes)
    name = backward_name(attend)
    kernel = BackwardKernel(name, ", ".join(sites), passes, store(name, source), source, attend.to_json())
    _kernels[kernel.attend_json] = kernel
    return kernel


@lru_cache(maxsize=1024)
def has_triton_backward(attend: Attend, wanted: tuple[str, ...] | None = None) -> str | None:
    """None where kernels give the gradients of the operation, else why not, in words: torch operators serve them on every device.

    wanted: names of the tensors whose gradients are asked for, query, key and value aside; by default every one that arithmetic reads.
    """
    reason = reason_against_backward(attend, wanted)
    if reason is not None:
        return reason
    try:
        backward_source(attend)
    except RewriteError as error:
        return str(error)
    return None


def backward_kernel_for(attend_json: str) -> BackwardKernel:
    """The kernels last emitted for the operation; such without sites where none were (a graph that came from another process)."""
    return _kernels.get(attend_json) or emit_backward(Attend.from_json(attend_json))
