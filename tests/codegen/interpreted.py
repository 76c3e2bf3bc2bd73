"""Emitted kernels run by Triton's interpreter, in a process of its own: TRITON_INTERPRET has to be set before Triton is imported."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from unittest import mock

import numpy as np
import torch


def _interpret() -> None:
    """Set up the worker. Triton 3.6 and 3.7 keep bfloat16 as bits and multiply the bits in tl.dot; here they become float32 first."""
    import triton.language as tl
    from triton.runtime import interpreter

    multiply = interpreter.InterpreterBuilder.create_dot

    def widened(handle: interpreter.TensorHandle) -> interpreter.TensorHandle:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(builder, a, b, *rest):  # type: ignore[no-untyped-def]
        return multiply(builder, widened(a), widened(b), *rest)

    interpreter.InterpreterBuilder.create_dot = create_dot

    patch = interpreter._patch_lang_tensor

    def patch_with_index(tensor, scope):  # type: ignore[no-untyped-def]
        patch(tensor, scope)
        # Triton 3.6 converts an array of one element, which numpy 2.5 refuses; 3.7 does what stands here.
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_with_index
    torch.set_num_threads(1)

    from codegen import narrowed_visits, tile_list

    # Attentions of tests are small, and are to leave out what others would look at.
    tile_list.LEAST_WORK = narrowed_visits.LEAST_PAIRS = 0


def start() -> ProcessPoolExecutor:
    """One worker that interprets; this process goes on compiling."""
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        pool.submit(_interpret).result()
    finally:
        del os.environ["TRITON_INTERPRET"]
    return pool


def run(
    attend_json: str, operands: list[torch.Tensor], block: tuple[int, int], units: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of the kernel emitted for the operation, poisoned with NaN before the run.

    operands: query, key, value and the operation's tensors. block: queries and keys per tile. units: programs that share the tiles' keys.
    """
    from codegen.kernel import kernel_for
    from codegen.tiles import Tile
    from codegen.torch_streaming import output_like

    query, key, value, *tensors = operands
    out, lse = output_like(query, value)
    out.fill_(torch.nan)
    lse.fill_(torch.nan)
    with _poisoned():
        kernel_for(attend_json).load().launch(
            query, key, value, tensors, out, lse, tile=Tile(*block, 4, 1), **({"units": units} if units else {})
        )
    return out, lse


def run_state(attend_json: str, operands: list[torch.Tensor], block: tuple[int, int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of the kernels that compute the operation through its state; everything they write is poisoned with NaN before.

    block: queries, keys and columns of a state per tile, queries per chunk.
    """
    from codegen.state_kernels import state_kernel_for
    from codegen.state_tiles import StateTile
    from codegen.torch_streaming import output_like

    query, key, value, *tensors = operands
    out, lse = (made.fill_(torch.nan) for made in output_like(query, value))
    with _poisoned():
        state_kernel_for(attend_json).load().launch(query, key, value, tensors, out, lse, tile=StateTile(*block[:3], 4, 1, block[3]))
    return out, lse


@contextmanager
def _poisoned() -> Iterator[None]:
    """What is allocated and not initialised is NaN."""
    empty = torch.empty

    def poisoned(*size: object, **kwargs: object) -> torch.Tensor:
        return empty(*size, **kwargs).fill_(torch.nan)  # type: ignore[call-overload, no-any-return]

    with mock.patch("torch.empty", poisoned):
        yield


def run_state_backward(
    attend_json: str,
    operands: list[torch.Tensor],
    received: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    block: tuple[int, int, int, int],
) -> list[torch.Tensor]:
    """The gradients of query, key and value by kernels that carry a state; everything they write is poisoned with NaN before.

    received: out and the gradients of out and lse. block: as for `run_state`.
    """
    from unittest import mock

    from codegen.state_kernels import state_gradients_on_device
    from codegen.state_tiles import StateTile
    from rewrite.ir import Attend

    operation = Attend.from_json(attend_json)
    query, key, value, *tensors = operands
    empty = torch.empty

    def poisoned(*size: object, **kwargs: object) -> torch.Tensor:
        return empty(*size, **kwargs).fill_(torch.nan)  # type: ignore[call-overload, no-any-return]

    with mock.patch("torch.empty", poisoned):
        return state_gradients_on_device(
            operation, received[1:], received[0], (query, key, value), dict(zip(operation.tensors(), tensors, strict=True)),
            StateTile(*block[:3], 4, 1, block[3]),
        )  # fmt: skip


def run_backward(
    attend_json: str,
    operands: list[torch.Tensor],
    received: tuple[torch.Tensor, torch.Tensor],
    wanted: list[int],
    block: tuple[int, int],
    given: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> list[torch.Tensor]:
    """The gradients of query, key, value and the wanted tensors by the backward kernels.

    Everything that the kernels write is poisoned with NaN before. operands: query, key, value and the operation's tensors; received: the
    gradients of out and lse; wanted: positions among the tensors. block: queries and keys per tile, of both kernels. given: out and lse as
    forward gave them, by default by the torch lowering.
    """
    from codegen.backward_kernel import backward_kernel_for
    from codegen.tiles import BackwardTiles, Tile
    from codegen.torch_streaming import attend_forward
    from rewrite.ir import Attend

    operation = Attend.from_json(attend_json)
    query, key, value, *tensors = operands
    out, lse = given or attend_forward(operation, query, key, value, dict(zip(operation.tensors(), tensors, strict=True)))
    gradients = [torch.full(operand.shape, torch.nan, dtype=operand.dtype) for operand in (query, key, value)]
    tiles = BackwardTiles(Tile(*block, 4, 1), Tile(*block, 4, 1))
    with _poisoned():
        launch = backward_kernel_for(attend_json).load().launch
        return [*gradients, *launch(query, key, value, tensors, out, lse, *received, *gradients, wanted=wanted, tiles=tiles)]


def compile_while_interpreting(attend_json: str) -> str:
    """What `Kernel.compile` says in a process that interprets."""
    from codegen.kernel import kernel_for
    from rewrite.ir.errors import RewriteError

    try:
        kernel_for(attend_json).compile()
    except RewriteError as error:
        return str(error)
    return "compiled"


def run_statistic(statistic_json: str, operands: list[torch.Tensor], lse: torch.Tensor | None, units: int = 0) -> torch.Tensor:
    """A statistic by its kernels; what they write is poisoned with NaN before.

    operands: query, key and the statistic's tensors. units: programs that share the key blocks of sums over keys, 0 for whole tiles.
    """
    from codegen.given_kernel import softmax_of, summed
    from codegen.kernel import kernel_for
    from codegen.statistic_kernels import statistic_by_kernel
    from rewrite.ir.statistic import Statistic

    statistic = Statistic.from_json(statistic_json)
    query, key, *tensors = operands
    with ExitStack() as stack:
        stack.enter_context(_poisoned())
        for attend in (softmax_of(statistic), summed(statistic)) if units else ():
            module = kernel_for(attend.to_json(), values=False).load()
            stack.enter_context(mock.patch.object(module, "units_for", return_value=units))
        return statistic_by_kernel(statistic, query, key, dict(zip(statistic.tensors(), tensors, strict=True)), lse)


def run_tuned(attend_json: str, operands: list[torch.Tensor], preferred: list[tuple[int, ...]]) -> tuple[object, dict[str, object], int]:
    """(results, the tile that each kernel was last launched with, how often was timed) with a timer to which `preferred` tiles are fast.

    One tile: forward, whose result is out; two: the backward kernels, whose results are all gradients; none: backward, not tuned.
    """
    from contextlib import ExitStack
    from unittest import mock

    from codegen import Autotuning, tuned_launch
    from codegen.backward_kernel import backward_kernel_for
    from codegen.kernel import kernel_for
    from codegen.tiles import BackwardTiles, Tile
    from codegen.torch_streaming import attend_forward, output_like
    from codegen.tuning import DeviceFacts, Tuner
    from rewrite.ir import Attend

    operation = Attend.from_json(attend_json)
    query, key, value, *tensors = operands
    forward = len(preferred) == 1
    launched: dict[str, object] = {}
    timed: list[float] = []

    class Recorded:
        def __init__(self, kernel: object, name: str) -> None:
            self.kernel, self.name = kernel, name

        def __getitem__(self, grid: object):  # type: ignore[no-untyped-def]
            def launch(*arguments: object, **given: int) -> None:
                launched[self.name] = Tile(given["BLOCK_Q"], given["BLOCK_K"], given["num_warps"], given["num_stages"])
                self.kernel[grid](*arguments, **given)  # type: ignore[index]

            return launch

    def timer(run):  # type: ignore[no-untyped-def]
        run()
        timed.append(1.0 + sum(tile not in launched.values() for tile in map(tuple, preferred)))
        return timed[-1]

    tuner = Tuner(lambda device: DeviceFacts("interpreter", 90, 1 << 20), timer)
    module = (kernel_for if forward else backward_kernel_for)(attend_json).load()  # type: ignore[operator]
    small = Tile(16, 16, 4, 2)
    with ExitStack() as stack:
        # The tables' tiles are for a device: these make few programs of few steps here.
        stack.enter_context(mock.patch.object(tuned_launch, "tile_for", return_value=small))
        stack.enter_context(mock.patch.object(tuned_launch, "backward_tiles", return_value=BackwardTiles(small, small)))
        stack.enter_context(mock.patch("codegen.tuning._fits", return_value=True))
        for name in [name for name in vars(module) if name.startswith("attend")]:
            stack.enter_context(mock.patch.object(module, name, Recorded(getattr(module, name), name)))
        stack.enter_context(Autotuning(bool(preferred)))
        out, lse = attend_forward(operation, query, key, value, dict(zip(operation.tensors(), tensors, strict=True)))
        if forward:
            out, lse = output_like(query, value)
            tuned_launch.launch_attention(attend_json, (query, key, value), tensors, out, lse, tuner)
            return out, launched, len(timed)
        received = (out, lse, torch.ones_like(out), torch.zeros_like(lse))
        gradients = (torch.empty_like(query), torch.empty_like(key), torch.empty_like(value))
        asked = tuned_launch.launch_backward(attend_json, (query, key, value), tensors, received, gradients, [0], tuner)
        return [*gradients, *asked], launched, len(timed)


def run_in_order(
    attend_json: str, operands: list[torch.Tensor], received: tuple[torch.Tensor, torch.Tensor], wanted: list[int]
) -> list[torch.Tensor]:
    """out, lse, and the gradients of query, key, value and the wanted tensors, by kernels that are given the tokens in another order."""
    from codegen.ordered_launch import launch_attention_in_order, launch_backward_in_order, order_of
    from codegen.torch_streaming import output_like

    query, key, value, *tensors = operands
    assert order_of(attend_json, (query, key, value)) is not None
    out, lse = (each.fill_(torch.nan) for each in output_like(query, value))
    launch_attention_in_order(attend_json, (query, key, value), tensors, out, lse)
    gradients = tuple(torch.full(operand.shape, torch.nan) for operand in (query, key, value))
    given = (out.contiguous(), lse, *received)
    asked = launch_backward_in_order(attend_json, (query, key, value), tensors, given, gradients, wanted)  # type: ignore[arg-type]
    return [out, lse, *gradients, *asked]
