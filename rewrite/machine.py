"""What a device does in a second, measured on the device: the ceilings that a prediction of time divides by.

Each way of computing an attention is timed twice, at a size where the fixed cost of a call is what counts and at one where the
multiply-adds are: from the two come seconds per call and multiply-adds per second. Nothing is a table of constants: another machine,
another number of threads or another version of torch measures anew. It takes some tenths of a second of an idle CPU, once per process,
device, dtype and number of threads.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import sympy
import torch
from torch.nn import functional

import codegen
from rewrite.ir.expression import QK, I, J, Sigmoid, mass
from rewrite.ir.operations import Attend, BlockChoice, Groups

HEADS, HEAD_DIM = 4, 64
SMALL, LARGE = 64, 512
# A state pays from some hundred tokens on; it is measured where it does.
SMALLEST_STATE = 256
# The least of so many runs: what else the machine does only adds.
RUNS = 7
# Elements of the tensors whose addition tells the bandwidth: 16 MiB in float32, beyond the caches.
STREAMED = 1 << 22


@dataclass(frozen=True)
class Ceiling:
    """seconds per call, and multiply-adds per second beyond that."""

    call: float
    rate: float


@dataclass(frozen=True)
class Machine:
    """Ceilings by way of computing: those of `codegen.SKELETONS`, "sdpa" and "eager" (a model's own), and "plain", any other operator.

    bandwidth: bytes per second, from memory and to it.
    """

    ceilings: Mapping[str, Ceiling]
    bandwidth: float

    def seconds(self, way: str, multiply_adds: float, moved: float, calls: int = 1) -> float:
        """calls, and then multiply-adds or bytes, whichever takes longer."""
        ceiling = self.ceilings[way]
        return calls * ceiling.call + max(multiply_adds / ceiling.rate, moved / self.bandwidth)


def machine_of(device: torch.device, dtype: torch.dtype) -> Machine:
    """The device's ceilings in a floating-point type, measured the first time."""
    return _measured(device, dtype, torch.get_num_threads())


@lru_cache(maxsize=16)
def _measured(device: torch.device, dtype: torch.dtype, threads: int) -> Machine:
    with torch.no_grad(), torch.random.fork_rng(devices=[]), torch.autocast(device.type, enabled=False):
        torch.manual_seed(0)
        left = torch.randn(STREAMED, device=device).to(dtype)
        right = left.clone()
        bandwidth = 3 * left.nbytes / least_time(lambda: torch.add(left, right, out=right), device)
        few = left[: HEADS * SMALL]
        plain = least_time(lambda: few + few, device)
        ceilings = {way: _ceiling(way, device, dtype) for way in (*codegen.SKELETONS, "sdpa", "eager")}
    ceilings["plain"] = Ceiling(plain, ceilings["eager"].rate)
    return Machine(ceilings, bandwidth)


def least_time(run: Callable[[], object], device: torch.device, runs: int = RUNS) -> float:
    """Seconds of the fastest of some runs, after one that is not counted."""
    times = []
    for _ in range(runs + 1):
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _ceiling(way: str, device: torch.device, dtype: torch.dtype) -> Ceiling:
    (few, few_calls, short), (many, many_calls, long) = (
        _probe(way, tokens, device, dtype) for tokens in (SMALLEST_STATE if way == "state" else SMALL, LARGE)
    )
    # Two times and two unknowns, seconds = calls * call + multiply-adds / rate; noise must not make either negative.
    grown = many - few * many_calls / few_calls
    rate = grown / max(long - short * many_calls / few_calls, long / 4) if grown > 0 else many / long
    return Ceiling(max(short - few / rate, short / 4) / few_calls, rate)


def _probe(way: str, tokens: int, device: torch.device, dtype: torch.dtype) -> tuple[float, int, float]:
    """(multiply-adds, calls, seconds) of one attention of so many tokens."""
    query, key, value = (torch.rand(1, HEADS, tokens, HEAD_DIM, device=device).to(dtype) for _ in range(3))
    quadratic = HEADS * tokens**2 * 2 * HEAD_DIM
    if way == "sdpa":
        return quadratic, 1, least_time(lambda: functional.scaled_dot_product_attention(query, key, value), device)
    if way == "eager":
        return quadratic, 1, least_time(lambda: (query @ key.transpose(-2, -1) * HEAD_DIM**-0.5).softmax(-1) @ value, device)
    attend, operands = _example(way, tokens)
    text, given = attend.to_json(), [operands[name].to(device) for name in attend.tensors()]
    sizes = {"B": 1, "H": HEADS, "Hkv": HEADS, "Nq": tokens, "Nk": tokens, "D": HEAD_DIM, "Dv": HEAD_DIM}
    work = codegen.work(attend, sizes)
    return work.multiply_adds, work.calls, least_time(lambda: torch.ops.rewrite.attend(query, key, value, given, text), device)


def _example(way: str, tokens: int) -> tuple[Attend, dict[str, torch.Tensor]]:
    """An attention that is computed in that way, and the tensors it reads."""
    score, blocks = HEAD_DIM**-0.5 * QK, 8
    plain = ("out", "query", "key", "value")
    match way:
        case "banded":
            return Attend(*plain, score, mask=sympy.And(sympy.Le(J - I, tokens // 16), sympy.Le(I - J, tokens // 16))), {}
        case "gathered":
            block = tokens // blocks
            routes = sympy.Ne(
                sympy.IndexedBase("routes")[sympy.Symbol("b", integer=True), sympy.floor(I / block), sympy.floor(J / block)], 0
            )
            near = (torch.arange(blocks)[:, None] - torch.arange(blocks)).abs() % (blocks - 1) <= 1
            return Attend(*plain, score, mask=routes, choice=BlockChoice("routes", 3)), {"routes": near[None]}
        case "grouped":
            groups = Groups("groups", ("others", "chosen"), (1 + mass("chosen"), sympy.Rational(1, 2)))
            return Attend(*plain, score, groups=groups), {"groups": (torch.arange(tokens) % 2)[None].int()}
        case "blocks":
            return Attend(*plain, Sigmoid(score), normaliser="none"), {}
        case "state":
            return Attend(*plain, QK, normaliser="sum"), {}
        case _:
            return Attend(*plain, score), {}
