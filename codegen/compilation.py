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

from codegen.backward_block import BackwardBlock, crowding, row_facts, way_of
from codegen.interval_kernel import IntervalKernels
from codegen.kernel_reads import Owner, axis_names, gathers
from codegen.launching import dot_precision
from codegen.names import identifiers
from codegen.state_file import state_kernels
from codegen.state_tiles import CARRIED, device_chunk, state_tile
from codegen.tiles import BackwardTiles, Tile, backward_tiles, power_of_two, tile_for
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
    torch.float64: "fp64",
    torch.bool: "i1",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int16: "i16",
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
    capability: int,
    dtype: torch.dtype,
    head_dim: int,
    value_dim: int,
    tensor_dtypes: Mapping[str, torch.dtype],
    tile: Tile | None,
) -> CompiledKernel:
    """Compile the function `name` of an emitted module; see `codegen.kernel.Kernel.compile`."""
    _require(dtype)
    tile = tile or tile_for(head_dim, value_dim, dtype.itemsize, capability, gathers=gathers(attend))
    call = _Call(module, name, attend, dtype, (head_dim, value_dim), tile, tensor_dtypes)
    types = dict.fromkeys(("query", "key", "value", "out"), dtype) | dict.fromkeys(("lse", "row_parts", "parts"), torch.float32)
    return call.compiled(capability, types, {"lse_stride_i": 1})


# What the tensors' gradients are compiled as: summed by what the letters of their axes allow.
_WAYS: Mapping[str, tuple[str, str]] = {"pairs": ("pairs", ""), "keys": ("", "keys"), "rows": ("rows", "")}


def compile_backward(
    module: ModuleType,
    name: str,
    attend: Attend,
    *,
    capability: int,
    dtype: torch.dtype,
    head_dim: int,
    value_dim: int,
    tensor_dtypes: Mapping[str, torch.dtype],
    tiles: BackwardTiles | None,
    only: Owner | None = None,
) -> dict[Owner, CompiledKernel]:
    """Compile both backward kernels of an emitted module; see `codegen.backward_kernel.BackwardKernel.compile`. only: one of the two."""
    _require(dtype)
    tiles = tiles or backward_tiles(head_dim, value_dim, dtype.itemsize, crowding(attend), capability)
    types = dict.fromkeys(("query", "key", "value", "out", "d_out", "d_query", "d_key", "d_value"), dtype)
    types |= dict.fromkeys(("lse", "d_lse", *(f"row_{fact}" for fact in row_facts(attend))), torch.float32)
    found: dict[Owner, CompiledKernel] = {}
    owners: tuple[tuple[Owner, Tile], ...] = (("queries", tiles.queries), ("keys", tiles.keys))
    for place, (owner, tile) in enumerate(owners):
        if only not in (None, owner):
            continue
        call = _Call(module, f"{name}_{owner}", attend, dtype, (head_dim, value_dim), tile, tensor_dtypes)
        gradients = BackwardBlock(attend, owner).gradients
        ways: dict[str, int | str] = {f"{gradient}_by": _WAYS[way_of(attend, tensor)][place] for tensor, gradient in gradients.items()}
        found[owner] = call.compiled(capability, types | dict.fromkeys(gradients.values(), torch.float32), ways)
    return found


def compile_state(
    module: ModuleType,
    name: str,
    attend: Attend,
    *,
    capability: int,
    dtype: torch.dtype,
    head_dim: int,
    value_dim: int,
    tensor_dtypes: Mapping[str, torch.dtype],
) -> dict[str, CompiledKernel]:
    """Compile the state kernels of an emitted module; see `codegen.state_kernels.StateKernel.compile`."""
    _require(dtype)
    kernels = state_kernels(attend, name)
    features = kernels.form.width(head_dim)
    tile = state_tile(head_dim, value_dim, dtype.itemsize, intervals=isinstance(kernels, IntervalKernels))
    chunk = device_chunk(features, value_dim, tile)
    constants = {"BLOCK_DV": tile.block_v, "CHUNK": chunk, "FEATURES": features, "HEADS_PER_STATE": 1, "STATES_PER_KEY": 1}
    constants |= {"SIZE": features * value_dim, "BLOCK": CARRIED, "lse_stride_i": 1}
    types = {
        **dict.fromkeys(("query", "key", "value", "out"), dtype),
        **dict.fromkeys(("states", "sums", "head_states", "head_sums", "lse"), torch.float32),
    }
    types |= dict.fromkeys(("key_order", "query_order", "begins", "ends", "chunk_begins"), torch.int32)
    place = Tile(tile.block_q, tile.block_k, tile.warps, tile.stages)
    parts = ["states", *(["carry"] if kernels.limited else []), "outputs"]
    calls = {part: _Call(module, f"{name}_{part}", attend, dtype, (head_dim, value_dim), place, tensor_dtypes) for part in parts}
    return {part: call.compiled(capability, types, constants) for part, call in calls.items()}


def capability_of(target: str) -> int:
    """90 for "sm_90". Raises `RewriteError` for what is none of `TARGETS`."""
    if target not in TARGETS:
        raise RewriteError(f"no such target: {target!r}; kernels are compiled for {', '.join(TARGETS)}")
    return TARGETS[target]


def _require(dtype: torch.dtype) -> None:
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise RewriteError(f"no attention kernel for {dtype}; use float32, float16 or bfloat16")


@dataclass(frozen=True)
class _Call:
    """A function of an emitted module and what it is called with. widths: of heads and of values."""

    module: ModuleType
    name: str
    attend: Attend
    dtype: torch.dtype
    widths: tuple[int, int]
    tile: Tile
    tensor_dtypes: Mapping[str, torch.dtype]

    def compiled(self, capability: int, types: Mapping[str, torch.dtype], more: Mapping[str, int | str]) -> CompiledKernel:
        """types: of what the skeleton reads and writes. more: constants beside those that every kernel has."""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
        from triton.runtime.jit import JITFunction

        function, tile, (head_dim, value_dim) = getattr(self.module, self.name), self.tile, self.widths
        if not isinstance(function, JITFunction):
            raise RewriteError("kernels cannot be compiled while Triton interprets them; unset TRITON_INTERPRET and start again")
        constants = {
            "HEADS_PER_KEY": 1,
            "D": head_dim,
            "DV": value_dim,
            "BLOCK_D": power_of_two(head_dim),
            "BLOCK_DV": power_of_two(value_dim),
            "BLOCK_Q": tile.block_q,
            "BLOCK_K": tile.block_k,
            "PRECISION": dot_precision(self.dtype),
            **more,
        }
        # As for contiguous tensors, whose last stride is one; a launch finds that and makes it a constant too.
        by_identifier = _by_identifier(self.attend, self.attend.tensors())
        constants |= {f"{operand}_stride_{axis_names(indices)[-1]}": 1 for operand, indices in by_identifier.items() if indices}
        known = {**types, "starts": torch.int32, "blocks": torch.int32, "owners": torch.int32}
        known |= _by_identifier(self.attend, tensor_types(self.attend, self.dtype, self.tensor_dtypes))
        constants = {argument: constant for argument, constant in constants.items() if argument in function.arg_names}
        signature = {
            argument: "constexpr" if argument in constants else f"*{_TYPES[known[argument]]}" if argument in known else "i32"
            for argument in function.arg_names
        }
        # As a launch from PyTorch would find them: addresses and strides are multiples of 16, lengths anything.
        given = [argument for argument in function.arg_names if argument not in constants and (argument in known or "_stride_" in argument)]
        aligned = [(function.arg_names.index(argument),) for argument in given]
        source = ASTSource(function, signature, constants, {index: [["tt.divisibility", 16]] for index in aligned})
        options = {"num_warps": tile.warps, "num_stages": tile.stages}
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, WARP), options=options)
        used = _used(compiled.asm["cubin"])
        return CompiledKernel(
            f"sm_{capability}", self.dtype, head_dim, used["REG"], used["STACK"] + used["LOCAL"], compiled.metadata.shared,
            compiled.asm["ptx"], compiled.asm["cubin"],
        )  # fmt: skip


def _by_identifier(attend: Attend, facts: Mapping[str, Fact]) -> dict[str, Fact]:
    """The same facts, by the names that the tensors have in the kernel."""
    ids = identifiers(attend.tensors())
    return {ids[name]: fact for name, fact in facts.items()}
