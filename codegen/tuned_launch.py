"""Launching emitted kernels at the tiles of the table, or at those that were chosen by timing where that is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

from codegen.backward_block import crowding
from codegen.backward_file import backward_source
from codegen.backward_kernel import backward_kernel_for
from codegen.cache import content_hash
from codegen.compilation import CompiledKernel, compile_backward, compile_kernel
from codegen.emitted_file import streaming_source
from codegen.kernel import kernel_for
from codegen.kernel_reads import Owner, gathers
from codegen.launching import dot_precision
from codegen.tile_store import TileKey
from codegen.tiles import BackwardTiles, Tile, backward_tiles, power_of_two, tile_for
from codegen.tuning import TUNER, Autotuning, DeviceFacts, Launch, Tuner
from rewrite.ir.operations import Attend

Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Received = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
_OWNERS: tuple[Owner, ...] = ("queries", "keys")


def launch_attention(
    attend_json: str, operands: Operands, tensors: Sequence[torch.Tensor], out: torch.Tensor, lse: torch.Tensor, tuner: Tuner = TUNER
) -> None:
    """Run the kernel of an operation. operands: query, key and value; other arguments are those of the emitted ``launch``."""
    if Autotuning.is_on():
        launch = attention_launch(attend_json, operands, tensors, (out, lse), tuner.facts(operands[0].device))
        launch.run(tuner.tiles(launch))
    else:
        kernel_for(attend_json).load().launch(*operands, tensors, out, lse)


def attention_launch(
    attend_json: str, operands: Operands, tensors: Sequence[torch.Tensor], results: tuple[torch.Tensor, torch.Tensor], facts: DeviceFacts
) -> Launch:
    """What the tuner is to know of `launch_attention` on a device; results: out and lse."""
    kernel, attend = kernel_for(attend_json), Attend.from_json(attend_json)
    module, dtype = kernel.load(), operands[0].dtype
    n_queries, head_dim, value_dim = *operands[0].shape[2:], operands[2].shape[3]

    def run(tiles: tuple[Tile, ...]) -> None:
        module.launch(*operands, tensors, *results, tile=tiles[0])

    def compiled(place: int, tile: Tile) -> CompiledKernel:
        return compile_kernel(
            module, kernel.name, attend, capability=facts.capability, dtype=dtype, head_dim=head_dim, value_dim=value_dim,
            tensor_dtypes=_dtypes(attend, tensors), tile=tile,
        )  # fmt: skip

    table = tile_for(head_dim, value_dim, dtype.itemsize, facts.capability, n_queries, gathers(attend))
    key = _key(kernel.name, _code(attend_json, backward=False), facts, operands, tensors)
    return Launch(key, facts.shared_memory, (table,), run, compiled)


def launch_backward(
    attend_json: str,
    operands: Operands,
    tensors: Sequence[torch.Tensor],
    received: Received,
    gradients: Operands,
    wanted: Sequence[int],
    tuner: Tuner = TUNER,
) -> list[torch.Tensor]:
    """Run both backward kernels. received: out, lse and their gradients; gradients: what is written; returns those of `wanted`."""
    if Autotuning.is_on():
        launch = backward_launch(attend_json, operands, tensors, received, gradients, wanted, tuner.facts(operands[0].device))
        found: list[torch.Tensor] = launch.run(tuner.tiles(launch))
    else:
        found = backward_kernel_for(attend_json).load().launch(*operands, tensors, *received, *gradients, wanted=wanted)
    return found


def backward_launch(
    attend_json: str,
    operands: Operands,
    tensors: Sequence[torch.Tensor],
    received: Received,
    gradients: Operands,
    wanted: Sequence[int],
    facts: DeviceFacts,
) -> Launch:
    """What the tuner is to know of `launch_backward` on a device."""
    kernel, attend = backward_kernel_for(attend_json), Attend.from_json(attend_json)
    module, dtype = kernel.load(), operands[0].dtype
    head_dim, value_dim = operands[0].shape[3], operands[2].shape[3]
    table = backward_tiles(head_dim, value_dim, dtype.itemsize, crowding(attend), facts.capability)

    def run(tiles: tuple[Tile, ...]) -> list[torch.Tensor]:
        found: list[torch.Tensor] = module.launch(*operands, tensors, *received, *gradients, wanted=wanted, tiles=BackwardTiles(*tiles))
        return found

    def compiled(place: int, tile: Tile) -> CompiledKernel:
        owner = _OWNERS[place]
        return compile_backward(
            module, kernel.name, attend, capability=facts.capability, dtype=dtype, head_dim=head_dim, value_dim=value_dim,
            tensor_dtypes=_dtypes(attend, tensors), tiles=table._replace(**{owner: tile}), only=owner,
        )[owner]  # fmt: skip

    key = _key(kernel.name, _code(attend_json, backward=True), facts, operands, tensors, tuple(wanted))
    return Launch(key, facts.shared_memory, table, run, compiled)


def _dtypes(attend: Attend, tensors: Sequence[torch.Tensor]) -> dict[str, torch.dtype]:
    return {name: tensor.dtype for name, tensor in zip(attend.tensors(), tensors, strict=True)}


@lru_cache(maxsize=1024)
def _code(attend_json: str, backward: bool) -> str:
    """What a kernel computes and how: the hash of its source with no site and no pass in it."""
    attend = Attend.from_json(attend_json)
    return content_hash(backward_source(attend) if backward else streaming_source(attend))


def _key(
    name: str, code: str, facts: DeviceFacts, operands: Operands, tensors: Sequence[torch.Tensor], wanted: tuple[int, ...] = ()
) -> TileKey:
    import triton

    (batch, heads, n_queries, head_dim), (_, key_heads, n_keys, _) = operands[0].shape, operands[1].shape
    return TileKey(
        kernel=name,
        code=code,
        triton=triton.__version__,
        device=facts.name,
        capability=facts.capability,
        dtypes=tuple(str(each.dtype).removeprefix("torch.") for each in (operands[0], *tensors)),
        precision=dot_precision(operands[0].dtype),
        head_dim=head_dim,
        value_dim=operands[2].shape[3],
        shared=heads // key_heads,
        rows=1 << (batch * heads - 1).bit_length(),
        n_queries=power_of_two(n_queries),
        n_keys=power_of_two(n_keys),
        wanted=wanted,
    )
