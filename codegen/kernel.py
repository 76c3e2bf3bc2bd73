"""From an attention operation to its emitted kernel, and from the operation's JSON back to the kernel that serves it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch

from codegen.cache import store
from codegen.compilation import CompiledKernel, capability_of, compile_kernel
from codegen.emitted_file import kernel_name, streaming_source
from codegen.emitted_kernel import EmittedKernel
from codegen.split_keys import reason_against_split
from codegen.tiles import Tile
from rewrite.ir.errors import RewriteError
from rewrite.ir.operations import Attend

Form = Literal["whole", "split", "join"]


@dataclass(frozen=True)
class Kernel(EmittedKernel):
    """An emitted kernel that streams over keys, `name` being its function's. values: as of a `codegen.streaming.StreamingKernel`."""

    values: bool = True

    def compile(
        self,
        target: str = "sm_90",
        dtype: torch.dtype = torch.bfloat16,
        head_dim: int = 64,
        value_dim: int | None = None,
        tensor_dtypes: Mapping[str, torch.dtype] | None = None,
        tile: Tile | None = None,
        form: Form = "whole",
    ) -> CompiledKernel:
        """Compile ahead of time; needs no GPU.

        target: "sm_80", "sm_90" or "sm_100". dtype: of query, key and value. value_dim: head_dim if None. tensor_dtypes: of the other
        tensors by name; by default int32 for the groups, bool for what only a predicate reads, `dtype` for the rest. tile: by default the
        table's. form: the kernel of whole tiles, or the "split" walk and its "join", see `codegen.split_kernel`.
        Raises `RewriteError` for an unknown target or dtype, a form that there is not, or under TRITON_INTERPRET.
        """
        reason = None if form == "whole" else reason_against_split(self.attend)
        if reason is not None:
            raise RewriteError(f"{self.name} has no form {form!r}: {reason}")
        return compile_kernel(
            self.load(),
            self.name if form == "whole" else f"{self.name}_{form}",
            self.attend,
            capability=capability_of(target),
            dtype=dtype,
            head_dim=head_dim,
            value_dim=value_dim or head_dim,
            tensor_dtypes=tensor_dtypes or {},
            tile=tile,
        )


_kernels: dict[tuple[str, bool], Kernel] = {}


def emit(attend: Attend, sites: tuple[str, ...] = (), passes: tuple[str, ...] = (), values: bool = True) -> Kernel:
    """Write the Triton source for `attend` to the cache and let the operator use it from now on; needs no GPU.

    sites: names of the attention sites that share the kernel. passes: what shaped it. Both are stated in the source. values: as of a
    `codegen.streaming.StreamingKernel`. Raises `RewriteError` where the operation has no Triton form or the cache folder is not the user's
    alone.
    """
    source = streaming_source(attend, sites, passes, values)
    name = kernel_name(attend, values)
    kernel = Kernel(name, ", ".join(sites), passes, store(name, source), source, attend.to_json(), values)
    _kernels[kernel.attend_json, values] = kernel
    return kernel


@lru_cache(maxsize=1024)
def has_triton_form(attend: Attend, values: bool = True) -> str | None:
    """None where a kernel can be emitted for the operation, else why not, in words: the torch lowering serves it on every device."""
    try:
        streaming_source(attend, values=values)
    except RewriteError as error:
        return str(error)
    return None


def kernel_for(attend_json: str, values: bool = True) -> Kernel:
    """The kernel last emitted for the operation; one without sites where none was (a graph that came from another process)."""
    return _kernels.get((attend_json, values)) or emit(Attend.from_json(attend_json), values=values)
