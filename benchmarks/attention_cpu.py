"""One attention on the CPU, as each pass makes it, beside eager attention and PyTorch's own: time and peak memory.

    python -m benchmarks.attention_cpu [--tokens 197 577 1024 4096] [--rounds 9]

Batch 1, 12 heads of 64, float32, no gradients. A pass is applied to a site of the IR and its body run as the CPU lowering runs it. Every
variant is run in turns, round by round, in one process, calls of a millisecond several times in a turn; a ratio is the median over rounds
of variant / SDPA within a round (above 1 is slower). Memory is what a call adds to the process at its peak (VmHWM). Statistics are
measured with the attention that they are read off.
Results go to benchmarks/results/attention_cpu.md as found.
"""

from __future__ import annotations

import argparse
import datetime
import math
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from torch.nn import functional

import codegen
from rewrite.ir import NK, NQ, QK, Attend, Body, I, J, Operation, Program, Site, TokenLayout, parse_pass
from rewrite.ir.semantics import evaluate_operation
from rewrite.ir.statistic import Statistic

RESULTS = Path(__file__).parent / "results" / "attention_cpu.md"
HEADS, HEAD_DIM, CHANNELS = 12, 64, 768
CAUSAL = J <= I + NK - NQ
# tokens -> (side of the grid, class tokens, a size that divides it): DeiT at 224 and 384 px, and grids of 32 and 64.
GRIDS = {197: (14, 1, 7), 577: (24, 1, 8), 1024: (32, 0, 8), 4096: (64, 0, 8)}
ON_A_GRID = (
    "agent", "grid(size={part}, kind='block')", "grid(size={part}, kind='grid')", "halo(block={part})", "neighborhood(window=7)",
    "window(window={eighth})", "routed(regions={part})", "temperature", "sigmoid", "relu_attention",
)  # fmt: skip
IN_A_TEXT = ("window(window={eighth})", "sink_redistribution", "calibrate", "head_reinforce", "composite", "modality_mutual")
STATISTICS = {
    "received by every key": {},
    "row of the class token": {"rows": (0, 1)},
    "row of the last query": {"rows": (-1, None)},
    "rows of a question of 32 tokens": {"rows": (-32, None)},
}

# A variant's turn in a round: calls of a millisecond are made as often as SDPA can be called in this time.
SECONDS_OF_A_TIMING = 0.02

Run = Callable[[], object]
Values = dict[str, torch.Tensor]


def site(tokens: int, text: bool) -> Site:
    """A site of the model in the middle of a stack: an image, or text with an image in it."""
    side, prefix, _ = GRIDS[tokens]
    attend = Attend("output", "query", "key", "value", HEAD_DIM**-0.5 * QK, **({"mask": CAUSAL} if text else {}))
    dims = {"B": 1, "H": HEADS, "Hkv": HEADS, "Nq": tokens, "Nk": tokens, "D": HEAD_DIM, "Dv": HEAD_DIM, "C": CHANNELS}
    layout = TokenLayout(None, 0, True) if text else TokenLayout((side, side), prefix)
    operands = ("query", "key", "value", *(("hidden", "visual") if text else ()))
    return Site("site", 3, 6, 0, "self", Body((attend,)), dims, layout, operands)


def operands(tokens: int) -> Values:
    """Half of the tokens are visual, from the eighth on, one of them a sink."""
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.randn(1, HEADS, tokens, HEAD_DIM, generator=generator) for name in ("query", "key", "value")}
    values["hidden"] = torch.randn(1, tokens, CHANNELS, generator=generator)
    values["hidden"][:, tokens // 4, 7] = 1e3
    places = torch.arange(tokens)[None]
    values["visual"] = (places >= tokens // 8) & (places < tokens // 8 + tokens // 2)
    return values


def _step(operation: Operation) -> Callable[[Values, Values], None]:
    """One operation, as a call of a lowered graph: what its text says is worked out beforehand. It adds to the values, and to the lse."""
    if isinstance(operation, Attend):
        attend, text, names = operation, operation.to_json(), list(operation.tensors())

        def attention(held: Values, lse: Values) -> None:
            tensors = [held[name] for name in names]
            held[attend.result], lse[text] = torch.ops.rewrite.attend(
                held[attend.query], held[attend.key], held[attend.value], tensors, text
            )

        return attention
    if isinstance(operation, Statistic):
        read, own, made, wanted = operation, operation.to_json(), operation.attend.to_json(), list(operation.tensors())

        def sums(held: Values, lse: Values) -> None:
            operands = held[read.attend.query], held[read.attend.key], [held[name] for name in wanted]
            held[read.result] = torch.ops.rewrite.attention_statistic(*operands, lse.get(made), own)

        return sums
    return lambda held, _: evaluate_operation(operation, held)


def body_run(body: Body, values: Values) -> Run:
    """The body as the CPU lowering computes it; an attention's log-sum-exp is handed to the statistics of the same attention."""
    with_parameters = dict(values)
    for parameter in body.parameters:
        with_parameters[parameter.name] = torch.zeros(parameter.shape)
    steps = [_step(operation) for operation in body.operations]

    def run() -> torch.Tensor:
        held, lse = dict(with_parameters), {}
        for step in steps:
            step(held, lse)
        return held[body.result]

    return run


def beside_sdpa(read: Statistic, values: Values, causal: bool) -> Run:
    """The model's own attention, and the statistic beside it: what a pass that only reads makes of a site."""
    query, key, value, text = values["query"], values["key"], values["value"], read.to_json()

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        out = functional.scaled_dot_product_attention(query, key, value, is_causal=causal)
        return out, torch.ops.rewrite.attention_statistic(query, key, [], None, text)

    return run


def eager(values: Values, mask: torch.Tensor | None) -> torch.Tensor:
    """The map written out."""
    scores = values["query"] @ values["key"].transpose(-2, -1) * HEAD_DIM**-0.5
    return (scores if mask is None else scores + mask).softmax(-1) @ values["value"]


def variants(tokens: int, text: bool) -> Iterator[tuple[str, str, Run | None]]:
    """(name, share of the pairs that the mask leaves or why the pass declines, what to run) of every variant; SDPA is the first."""
    _, _, part = GRIDS[tokens]
    values, place = operands(tokens), site(tokens, text)
    three = (values["query"], values["key"], values["value"])
    mask = torch.full((tokens, tokens), -torch.inf).triu(1) if text else None
    yield "SDPA", "", lambda: functional.scaled_dot_product_attention(*three, is_causal=text)
    yield "eager", "", lambda: eager(values, mask)
    yield "as it is, our operator", "", body_run(place.body, values)
    for name, facts in STATISTICS.items():
        read = Statistic("statistic", place.attend, **facts)
        yield f"SDPA and {name}", "", beside_sdpa(read, values, text)
        if "rows" not in facts:
            yield f"our operator and {name}", "", body_run(Body((place.attend, read)), values)
    for template in IN_A_TEXT if text else ON_A_GRID:
        made = template.format(part=part, eighth=max(8, tokens // 8))
        program = parse_pass(made).apply(Program((place,)))
        if not program.touched:
            yield made, program.declined[0][2], None
            continue
        body = program.sites[0].body
        pairs = [codegen.visible_pairs(attend.mask, tokens, tokens) for attend in body.attends()] if body.attends() else []
        density = f"{max(pairs) / tokens**2:.0%}" if len(body.attends()) == 1 else ""
        yield made, density, body_run(body, values)


def peak(run: Run) -> float:
    """MiB that one call adds at its peak."""
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmHWM")
    kept = run()
    after = _status("VmHWM")
    del kept
    return max(0.0, (after - before) / 1024)


def _status(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1])


def seconds_of(run: Run, calls: int) -> float:
    """Of one call, in the mean of some in a row."""
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def measure(tokens: int, text: bool, rounds: int) -> Iterator[str]:
    """Rows of a table."""
    entries = list(variants(tokens, text))
    running = [(name, run) for name, _, run in entries if run is not None]
    memory = {}
    for name, run in running:
        run()
        memory[name] = peak(run)
    calls = max(1, math.ceil(SECONDS_OF_A_TIMING / seconds_of(running[0][1], 3)))
    times: dict[str, list[float]] = {name: [] for name, _ in running}
    for _ in range(rounds):
        for name, run in running:
            times[name].append(seconds_of(run, calls))
    for name, told, run in entries:
        if run is None:
            yield f"| {name} | declined: {told} | | | |"
            continue
        ratio = statistics.median(own / base for own, base in zip(times[name], times["SDPA"], strict=True))
        yield f"| {name} | {told} | {statistics.median(times[name]) * 1e3:.1f} | {ratio:.2f} | {memory[name]:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=list(GRIDS), choices=list(GRIDS))
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    console = Console()
    load = os.getloadavg()[0]
    lines = [
        "# CPU: one attention, as each pass makes it", "",
        f"{datetime.date.today()}; Python {platform.python_version()}, torch {version('torch')}; {platform.machine()}, {os.cpu_count()} "
        f"cores, {torch.get_num_threads()} threads; load average {load:.1f} when the run began.", "",
        f"Batch 1, {HEADS} heads of {HEAD_DIM}, float32, no gradients. *x SDPA*: the median over {options.rounds} rounds of variant / "
        "SDPA, above 1 is slower. *MiB*: what a call adds at its peak. *pairs*: what the mask leaves of the pairs of query and key. "
        "Written by benchmarks/attention_cpu.py.",
    ]  # fmt: skip
    with torch.no_grad():
        for tokens in track(options.tokens, "tokens", console=console):
            for text in (False, True):
                side, prefix, _ = GRIDS[tokens]
                grid = f"grid of {side} x {side}{', class token' if prefix else ''}"
                what = "text, half of it visual, causal" if text else grid
                lines += ["", f"## {tokens} tokens: {what}", "", "| variant | pairs | ms | x SDPA | MiB |", "|---|---|---:|---:|---:|"]
                lines += measure(tokens, text, options.rounds)
    RESULTS.write_text("\n".join(lines) + "\n")
    console.print(f"written to {RESULTS}")


if __name__ == "__main__":
    main()
