"""Ahead-of-time compilation without a GPU, and what the compiled kernel uses: registers, spills, shared memory."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import TypeVar

import torch

from codegen.kernel_reads import axis_names
from codegen.launching import dot_precision
from codegen.names import identifiers
from codegen.tiles import power_of_two, tile_for
from rewrite.ir.errors import RewriteError
from rewrite.ir.expression import tensors_in
from rewrite.ir.operations import Attend

Fact = TypeVar("Fact")

# Compute capabilities that CI compiles for: A100, H100/H200, B200. A warp has 32 threads on each.
TARGETS: Mapping[str, int] = {"sm_80": 80, "sm_90": 90, "sm_100": 100}
WARP = 32

_TYPES: Mapping[torch.dtype, str] = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.bool: "i1",
    torch.int32: "i32",
    torch.int64: "i64",
}


@dataclass(frozen=True)
class CompiledKernel:
    """A kernel compiled for one target.

    registers: per thread. spills: bytes of registers that went to memory, per thread. shared_memory: bytes per program.
    """

    target: str
    dtype: torch.dtype
    head_dim: int
    registers: int
    spills: int
    shared_memory: int
    ptx: str = field(repr=False)
    cubin: bytes = field(repr=False)


def tensor_types(attend: Attend, dtype: torch.dtype, given: Mapping[str, torch.dtype]) -> dict[str, torch.dtype]:
    """The dtype of every tensor operand: as given, else int32 for the groups, bool for what only a predicate reads, else `dtype`."""
    arithmetic = tensors_in(*attend.expressions())
    types = {name: dtype if name in arithmetic else torch.bool for name in attend.tensors()}
    if attend.groups is not None:
        types[attend.groups.membership] = torch.int32
    return {**types, **given}


def _used(cubin: bytes) -> dict[str, int]:
    """What cuobjdump says a kernel uses: REG and STACK per thread, LOCAL and SHARED."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", said)}
    if not {"REG", "STACK", "LOCAL"} <= found.keys():
        raise RewriteError(f"{command[0]} does not state the registers of a kernel; it said: {said.strip()[:500]}")
    return found


def compile_kernel(
    module: ModuleType,
    name: str,
    attend: Attend,
    *,
    target: str,
    dtype: torch.dtype,
    head_dim: int,
    value_dim: int,
    tensor_dtypes: Mapping[str, torch.dtype],
) -> CompiledKernel:
    """Compile the function `name` of an emitted module; see `codegen.kernel.Kernel.compile`."""
    if target not in TARGETS:
        raise RewriteError(f"no such target: {target!r}; kernels are compiled for {', '.join(TARGETS)}")
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise RewriteError(f"no attention kernel for {dtype}; use float32, float16 or bfloat16")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    function = getattr(module, name)
    if not isinstance(function, JITFunction):
        raise RewriteError("kernels cannot be compiled while Triton interprets them; unset TRITON_INTERPRET and start again")
    tile = tile_for(head_dim, value_dim, dtype.itemsize)
    constants = {
        "HEADS_PER_KEY": 1,
        "D": head_dim,
        "DV": value_dim,
        "BLOCK_D": power_of_two(head_dim),
        "BLOCK_DV": power_of_two(value_dim),
        "BLOCK_Q": tile.block_q,
        "BLOCK_K": tile.block_k,
        "PRECISION": dot_precision(dtype),
    }
    # As for contiguous tensors, whose last stride is one; a launch finds that and makes it a constant too.
    by_identifier = _by_identifier(attend, attend.tensors())
    constants |= {f"{operand}_stride_{axis_names(indices)[-1]}": 1 for operand, indices in by_identifier.items() if indices}
    constants["lse_stride_i"] = 1
    types = {"query": dtype, "key": dtype, "value": dtype, "out": dtype, "lse": torch.float32}
    types |= {"starts": torch.int32, "blocks": torch.int32, **_by_identifier(attend, tensor_types(attend, dtype, tensor_dtypes))}
    signature = {
        argument: "constexpr" if argument in constants else f"*{_TYPES[types[argument]]}" if argument in types else "i32"
        for argument in function.arg_names
    }
    # As a launch from PyTorch would find them: addresses and strides are multiples of 16, lengths anything.
    sizes = {f"{operand}_size_{axis}" for operand, indices in by_identifier.items() for axis in range(len(indices))}
    lengths = {"H", "Nq", "Nk", *sizes}
    aligned = [(index,) for index, argument in enumerate(function.arg_names) if argument not in constants and argument not in lengths]
    source = ASTSource(function, signature, constants, {index: [["tt.divisibility", 16]] for index in aligned})
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", TARGETS[target], WARP), options=options)
    used = _used(compiled.asm["cubin"])
    return CompiledKernel(
        target, dtype, head_dim, used["REG"], used["STACK"] + used["LOCAL"], compiled.metadata.shared, compiled.asm["ptx"],
        compiled.asm["cubin"],
    )  # fmt: skip


def _by_identifier(attend: Attend, facts: Mapping[str, Fact]) -> dict[str, Fact]:
    """The same facts, by the names that the tensors have in the kernel."""
    ids = identifiers(attend.tensors())
    return {ids[name]: fact for name, fact in facts.items()}
