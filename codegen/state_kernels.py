"""From an attention operation to its emitted state kernels, and from the operation's JSON back to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import torch

from codegen.cache import load, store
from codegen.compilation import CompiledKernel, capability_of, compile_state
from codegen.state_file import state_name, state_source
from rewrite.ir.errors import RewriteError
from rewrite.ir.operations import Attend


@dataclass(frozen=True)
class StateKernel:
    """The emitted kernels that compute an operation through its state.

    name: what their names begin with; the functions are ``<name>_states``, ``<name>_outputs`` and, where the state grows, ``<name>_carry``.
    site: the sites they were made for, joined by ", ". passes: what shaped them. path: the file, source: its text. attend_json: the
    operation.
    """

    name: str
    site: str
    passes: tuple[str, ...]
    path: Path
    source: str
    attend_json: str

    def load(self) -> ModuleType:
        """The module in `path`: the kernels and ``launch``. Raises `RewriteError` where the file is not what was emitted."""
        return load(self.path)

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
            Attend.from_json(self.attend_json),
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
