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
from rewrite.ir.operations import Attend, BlockChoice, Groups, Pool
from rewrite.ir.site_operations import pool

HEADS, HEAD_DIM = 4, 64
# Channels in and out of the linear layer that is measured.
WIDTH = 1024
SMALL, LARGE = 64, 512
# A state pays from some hundred tokens on, and a band is cut into blocks from there; they are measured where that is so.
SMALLEST = {"state": 256, "banded": 256}
# Blocks of a band see few keys: the more there are, the less what is done once counts.
LARGEST = {"banded": 2048}
# Maps above this are memory that the system gives anew each time, page by page: the most that glibc's allocator keeps (its mmap threshold).
LARGEST_KEPT = 32 << 20
# Blocks of queries of an attention whose blocks of keys the data choose.
BLOCKS = 8
# The least of so many runs: what else the machine does only adds.
RUNS = 7
# Elements of the tensors whose addition tells the bandwidth: 32 MiB in float32, beyond the caches.
STREAMED = 1 << 23


@dataclass(frozen=True)
class Ceiling:
    """seconds per call, and multiply-adds per second beyond that."""

    call: float
    rate: float


@dataclass(frozen=True)
class Machine:
    """Ceilings by way of computing: those of `codegen.SKELETONS`; "sdpa", "eager" and "large" (a model's own: fused, and a map written out,
    beyond what an allocator keeps in "large"); "plain", an operation of a body that is no attention (pooling, features); "linear", linear
    layers and other contractions of the model; and "moved", its operators that multiply nothing (norms, sums, activations).

    bandwidth: bytes per second, from memory and to it. plain_bandwidth: likewise, through a plain operation.
    """

    ceilings: Mapping[str, Ceiling]
    bandwidth: float
    plain_bandwidth: float

    def seconds(self, way: str, multiply_adds: float, moved: float, calls: int = 1) -> float:
        """calls, and then multiply-adds or bytes, whichever takes longer."""
        ceiling, bandwidth = self.ceilings[way], self.plain_bandwidth if way == "plain" else self.bandwidth
        return calls * ceiling.call + max(multiply_adds / ceiling.rate, moved / bandwidth)


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
        plain, plain_bandwidth = _plain(left)
        ceilings = {way: _ceiling(way, device, dtype) for way in (*codegen.SKELETONS, "sdpa", "eager", "linear")}
        ceilings["large"] = _large(ceilings["eager"].call, device, dtype)
        little = left[:1]
        moved = least_time(lambda: torch.add(little, little), device)
    ceilings["plain"], ceilings["moved"] = (Ceiling(call, ceilings["eager"].rate) for call in (plain, moved))
    return Machine(ceilings, bandwidth, plain_bandwidth)


def _large(call: float, device: torch.device, dtype: torch.dtype) -> Ceiling:
    """A map of 40 MiB in float32, written out: once is enough, it takes a tenth of a second."""
    query, key, value = (torch.rand(1, 10, 1024, HEAD_DIM, device=device).to(dtype) for _ in range(3))
    seconds = least_time(lambda: (query @ key.transpose(-2, -1) * HEAD_DIM**-0.5).softmax(-1) @ value, device, runs=1)
    return Ceiling(call, 10 * 1024**2 * 2 * HEAD_DIM / seconds)


def _plain(source: torch.Tensor) -> tuple[float, float]:
    """(seconds of a call, bytes per second) of pooling tokens, which a quarter of them are left of."""
    times, sizes = [], []
    for side in (8, 64):
        tokens = source[: HEADS * side**2 * HEAD_DIM].view(1, HEADS, side**2, HEAD_DIM)
        operation = Pool("out", "tokens", (side, side), (side // 2, side // 2))
        times.append(least_time(lambda of=operation, given=tokens: pool(of, {"tokens": given}), source.device))  # type: ignore[misc]
        sizes.append(tokens.nbytes * 5 / 4)
    return times[0], (sizes[1] - sizes[0]) / max(times[1] - times[0], times[1] / 4)


def least_time(run: Callable[[], object], device: torch.device, runs: int = RUNS) -> float:
    """Seconds of the fastest of some runs, after one that is not counted."""
    times, clock = [], clock_of(device)
    for _ in range(runs + 1):
        _wait(device)
        start = clock()
        run()
        _wait(device)
        times.append(clock() - start)
    return min(times[1:])


def clock_of(device: torch.device) -> Callable[[], float]:
    """What times are taken by: of one thread on a CPU its own time, which other processes do not add to."""
    return time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _ceiling(way: str, device: torch.device, dtype: torch.dtype) -> Ceiling:
    (few, few_calls, short), (many, many_calls, long) = (
        _probe(way, tokens, device, dtype) for tokens in (SMALLEST.get(way, SMALL), LARGEST.get(way, LARGE))
    )
    # Two times and two unknowns, seconds = calls * call + multiply-adds / rate; noise must not make either negative.
    grown = many - few * many_calls / few_calls
    rate = grown / max(long - short * many_calls / few_calls, long / 4) if grown > 0 else many / long
    return Ceiling(max(short - few / rate, short / 4) / few_calls, rate)


def _probe(way: str, tokens: int, device: torch.device, dtype: torch.dtype) -> tuple[float, int, float]:
    """(multiply-adds, calls, seconds) of one attention of so many tokens, or of a linear layer on them."""
    if way == "linear":
        source, weight = torch.rand(tokens, WIDTH, device=device).to(dtype), torch.rand(WIDTH, WIDTH, device=device).to(dtype)
        return tokens * WIDTH**2, 1, least_time(lambda: functional.linear(source, weight), device)
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
    calls = BLOCKS if way == "gathered" else work.calls
    return work.multiply_adds, calls, least_time(lambda: torch.ops.rewrite.attend(query, key, value, given, text), device)


def _example(way: str, tokens: int) -> tuple[Attend, dict[str, torch.Tensor]]:
    """An attention that is computed in that way, and the tensors it reads."""
    score = HEAD_DIM**-0.5 * QK
    plain = ("out", "query", "key", "value")
    match way:
        case "banded":
            return Attend(*plain, score, mask=sympy.And(sympy.Le(J - I, tokens // 16), sympy.Le(I - J, tokens // 16))), {}
        case "gathered":
            block = tokens // BLOCKS
            routes = sympy.Ne(
                sympy.IndexedBase("routes")[sympy.Symbol("b", integer=True), sympy.floor(I / block), sympy.floor(J / block)], 0
            )
            near = (torch.arange(BLOCKS)[:, None] - torch.arange(BLOCKS)).abs() % (BLOCKS - 1) <= 1
            return Attend(*plain, score, mask=routes, choice=BlockChoice("routes", 3)), {"routes": near[None]}
        case "grouped":
            groups = Groups("groups", ("others", "chosen"), (1 + mass("chosen"), sympy.Rational(1, 2)))
            return Attend(*plain, score, groups=groups), {"groups": (torch.arange(tokens) % 2)[None].int()}
        case "blocks":
            return Attend(*plain, Sigmoid(score), normaliser="none"), {}
        case "state":
            return Attend(*plain, QK, normaliser="sum", mask=sympy.Le(J, I)), {}
        case _:
            return Attend(*plain, score), {}
