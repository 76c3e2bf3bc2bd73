"""Is the prediction of faster or slower right? Every pass on sites of several sizes, predicted and measured side by side, on the CPU.

    python -m benchmarks.prediction [--tokens 197 577 1024 4096] [--seconds 0.6]

A pass is applied to a site of the IR; its body runs as the CPU lowering runs it, and beside it the two ways in which models compute what it
replaces: PyTorch's fused attention, and matrix products with a softmax between them. A ratio is after / before, above 1 is slower; measured
is the median over rounds in turns. Batch 1, float32, no gradients. Results go to benchmarks/results/prediction.md as found.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from torch.nn import functional

from benchmarks.attention_cpu import CAUSAL, GRIDS, IN_A_TEXT, ON_A_GRID, Run, Values, body_run
from rewrite.ir import QK, Attend, Body, Program, Site, TokenLayout, parse_pass
from rewrite.machine import clock_of, machine_of
from rewrite.prediction import predict

RESULTS = Path(__file__).parent / "results" / "prediction.md"
HEADS = ((12, 64), (6, 32))
LINEAR = ("hedgehog(features=32)", "enhanced_linear", "lightning")
# A measured ratio nearer to 1 than this is a tie: repeated runs of one and the same attention differ by as much.
TIE = 0.05
MOST_ROUNDS = 9


class Row(NamedTuple):
    """One pass on one site, against one way of computing the original."""

    site: str
    original: str
    method: str
    predicted: float
    measured: float

    @property
    def right(self) -> bool:
        return (self.predicted > 1) == (self.measured > 1)

    @property
    def tie(self) -> bool:
        return abs(self.measured - 1) <= TIE


def site(tokens: int, heads: int, width: int, text: bool) -> Site:
    side, prefix, _ = GRIDS[tokens]
    attend = Attend("output", "query", "key", "value", width**-0.5 * QK, **({"mask": CAUSAL} if text else {}))
    dims = {"B": 1, "H": heads, "Hkv": heads, "Nq": tokens, "Nk": tokens, "D": width, "Dv": width, "C": heads * width}
    layout = TokenLayout(None, 0, True) if text else TokenLayout((side, side), prefix)
    given = ("query", "key", "value", *(("hidden", "visual") if text else ()))
    return Site("site", 3, 6, 0, "self", Body((attend,)), dims, layout, given)


def operands(tokens: int, heads: int, width: int) -> Values:
    """Half of the tokens are visual, from the eighth on, one of them a sink."""
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.randn(1, heads, tokens, width, generator=generator) for name in ("query", "key", "value")}
    values["hidden"] = torch.randn(1, tokens, heads * width, generator=generator)
    values["hidden"][:, tokens // 4, 7] = 1e3
    places = torch.arange(tokens)[None]
    values["visual"] = (places >= tokens // 8) & (places < tokens // 8 + tokens // 2)
    return values


def originals(values: Values, text: bool) -> dict[str, Run]:
    query, key, value = (values[name] for name in ("query", "key", "value"))
    mask = torch.full((query.shape[2],) * 2, -torch.inf).triu(1) if text else None
    scale = query.shape[3] ** -0.5

    def eager() -> torch.Tensor:
        scores = query @ key.transpose(-2, -1) * scale
        return (scores if mask is None else scores + mask).softmax(-1) @ value

    return {"fused": lambda: functional.scaled_dot_product_attention(query, key, value, is_causal=text), "eager": eager}


def measure(runs: dict[str, Run], seconds: float) -> dict[str, float]:
    """The median time of each, in turns; at least one round after one that is not counted, and no longer than asked."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    clock = clock_of(torch.device("cpu"))
    for run in runs.values():
        run()
    start = time.perf_counter()
    for number in range(MOST_ROUNDS):
        if number and time.perf_counter() - start > seconds:
            break
        for name, run in runs.items():
            began = clock()
            run()
            times[name].append(clock() - began)
    return {name: statistics.median(each) for name, each in times.items()}


def rows(tokens: int, heads: int, width: int, text: bool, seconds: float) -> Iterator[Row]:
    machine, place, values = (
        machine_of(torch.device("cpu"), torch.float32),
        site(tokens, heads, width, text),
        operands(tokens, heads, width),
    )
    part = GRIDS[tokens][2]
    for template in (*(IN_A_TEXT if text else ON_A_GRID), *LINEAR):
        method = template.format(part=part, eighth=max(8, tokens // 8))
        program = parse_pass(method).apply(Program((place,)))
        if not program.touched:
            continue
        after = program.sites[0]
        times = measure({"after": body_run(after.body, values), **originals(values, text)}, seconds)
        for original in ("fused", "eager"):
            told = predict(place, after, 4, original == "eager", machine)
            kind = f"{tokens} tokens{', causal' if text else ''}, {heads} heads of {width}"
            yield Row(kind, original, method, told.ratio, times["after"] / times[original])


def share(found: list[Row]) -> str:
    return f"{sum(row.right for row in found)} of {len(found)} ({sum(row.right for row in found) / len(found):.0%})" if found else "none"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=list(GRIDS), choices=list(GRIDS))
    parser.add_argument("--seconds", type=float, default=0.6, help="of measuring each pass on each site")
    options = parser.parse_args()
    console, load = Console(), os.getloadavg()[0]
    start = time.perf_counter()
    machine = machine_of(torch.device("cpu"), torch.float32)
    took = time.perf_counter() - start
    found: list[Row] = []
    with torch.no_grad():
        grid = [(tokens, *heads, text) for tokens in options.tokens for heads in HEADS for text in (False, True)]
        for case in track(grid, "sites", console=console):
            found += rows(*case, options.seconds)
    clear = [row for row in found if not row.tie]
    ceilings = ", ".join(f"{way} {each.call * 1e6:.0f} us + {each.rate / 1e9:.3g} G/s" for way, each in machine.ceilings.items())
    lines = [
        "# The prediction of faster or slower", "",
        f"{datetime.date.today()}; Python {platform.python_version()}, torch {version('torch')}; {platform.machine()}, {os.cpu_count()} "
        f"cores, {torch.get_num_threads()} threads; load average {load:.1f} when the run began.", "",
        f"Right about faster or slower: **{share(found)}**; without ties (measured within {TIE:.0%} of 1): {share(clear)}. "
        "Ratios are time after / before, above 1 is slower. Written by benchmarks/prediction.py.", "",
        f"Ceilings, measured in {took:.1f} s: {ceilings}; {machine.bandwidth / 1e9:.3g} GB/s, "
        f"{machine.plain_bandwidth / 1e9:.3g} through a plain operation.", "",
        "| site | original | pass | predicted | measured | right |", "|---|---|---|---:|---:|---|",
        *(
            f"| {row.site} | {row.original} | {row.method} | {row.predicted:.2f} | {row.measured:.2f} | "
            f"{'yes' if row.right else 'tie' if row.tie else '**no**'} |"
            for row in found
        ),
    ]  # fmt: skip
    RESULTS.write_text("\n".join(lines) + "\n")
    console.print(f"right: {share(found)}; without ties: {share(clear)}; written to {RESULTS}")


if __name__ == "__main__":
    main()
