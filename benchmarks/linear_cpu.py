"""Linear attention on the CPU beside PyTorch's own: from which length on it pays, and a whole model of 4,096 tokens.

    python -m benchmarks.linear_cpu [--rounds 5]

One attention of 12 heads of 64 at batch 1 in float32 without gradients, as `benchmarks.attention_cpu` runs it, per pass and length; a ratio
is the median over rounds of SDPA / pass within a round (above 1 is faster), and the crossover the first length from which on it stays
above 1. The model is a ViT-B/16 at 1024 px (4,097 tokens, 12 layers). Results go to benchmarks/results/linear_cpu.md as found.
"""

from __future__ import annotations

import argparse
import datetime
import math
import os
import platform
import statistics
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from torch.nn import functional

from benchmarks.attention_cpu import CAUSAL, CHANNELS, HEAD_DIM, HEADS, Run, body_run, peak
from benchmarks.cpu import EAGER, vision
from rewrite import rewrite
from rewrite.ir import QK, Attend, Body, Program, Site, TokenLayout, parse_pass

RESULTS = Path(__file__).parent / "results" / "linear_cpu.md"
# Squares, which have a grid.
IMAGES = (256, 576, 1024, 2304, 4096, 9216)
TEXTS = (256, 512, 1024, 2048, 4096, 16384)
ON_A_GRID = ("agent", "hedgehog", "enhanced_linear", "inline_attention", "rala")
IN_A_TEXT = ("lightning", "hedgehog", "hedgehog(window=64)")
BASE = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}
MODEL_PASSES = ("agent", "hedgehog")


def site(tokens: int, text: bool) -> Site:
    """A site of a model without class tokens, or of a language model."""
    side = math.isqrt(tokens)
    attend = Attend("output", "query", "key", "value", HEAD_DIM**-0.5 * QK, **({"mask": CAUSAL} if text else {}))
    dims = {"B": 1, "H": HEADS, "Hkv": HEADS, "Nq": tokens, "Nk": tokens, "D": HEAD_DIM, "Dv": HEAD_DIM, "C": CHANNELS}
    layout = TokenLayout() if text else TokenLayout((side, side))
    return Site("site", 3, 6, 0, "self", Body((attend,)), dims, layout, ("query", "key", "value", "hidden", "input"))


def variants(tokens: int, text: bool) -> dict[str, Run | str]:
    """What to run by name, or why the pass leaves such a site alone; SDPA is the first."""
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.randn(1, HEADS, tokens, HEAD_DIM, generator=generator) for name in ("query", "key", "value")}
    values["hidden"] = values["input"] = torch.randn(1, tokens, CHANNELS, generator=generator)
    three = (values["query"], values["key"], values["value"])
    found: dict[str, Run | str] = {"SDPA": lambda: functional.scaled_dot_product_attention(*three, is_causal=text)}
    for made in IN_A_TEXT if text else ON_A_GRID:
        program = parse_pass(made).apply(Program((site(tokens, text),)))
        found[made] = body_run(program.sites[0].body, values) if program.touched else program.declined[0][2]
    return found


def timed(calls: Mapping[str, Run], rounds: int) -> dict[str, list[float]]:
    """Seconds of every round, variants in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, run in calls.items():
            begun = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begun)
    return seconds


def speed_ups(seconds: Mapping[str, list[float]], baseline: str) -> dict[str, float]:
    """By name, the median over rounds of baseline / variant."""
    pairs = {name: zip(seconds[baseline], spent, strict=True) for name, spent in seconds.items()}
    return {name: statistics.median(base / own for base, own in both) for name, both in pairs.items()}


def table(text: bool, rounds: int, console: Console) -> list[str]:
    """A row a pass: its speed-up at every length, the crossover, and what a call at the greatest length adds to memory."""
    lengths, ratios, memory, told = TEXTS if text else IMAGES, dict[str, list[float]](), dict[str, float](), dict[str, str]()
    for tokens in track(lengths, "causal" if text else "not causal", console=console):
        found = variants(tokens, text)
        calls = {name: run for name, run in found.items() if not isinstance(run, str)}
        told |= {name: reason for name, reason in found.items() if isinstance(reason, str)}
        for name, run in calls.items():
            run()
            memory[name] = peak(run)
        for name, ratio in speed_ups(timed(calls, rounds), "SDPA").items():
            ratios.setdefault(name, []).append(ratio)
    lines = [f"| pass | {' | '.join(map(str, lengths))} | pays from | MiB at {lengths[-1]} |", "|---|" + "---:|" * (len(lengths) + 2)]
    for name, row in ratios.items():
        slower = [place for place, ratio in enumerate(row) if ratio < 1]
        first = (slower[-1] if slower else -1) + 1
        pays = "" if name == "SDPA" else f"{lengths[first]} tokens" if first < len(lengths) else "not here"
        lines.append(f"| {name} | {' | '.join(f'{ratio:.2f}' for ratio in row)} | {pays} | {memory[name]:.0f} |")
    return [*lines, *(f"| {name} | declined: {reason} |" for name, reason in told.items())]


def whole_model(rounds: int, console: Console) -> list[str]:
    """A ViT-B/16 at 1024 px, unmodified with SDPA and rewritten, both eager."""
    model, inputs = vision("ViT", image_size=1024, **BASE)()
    calls: dict[str, Run] = {EAGER: lambda: model(**inputs)}
    for one in MODEL_PASSES:
        changed = rewrite(model, passes=one, example_inputs=inputs)
        calls[one] = lambda changed=changed: changed(**inputs)
    for run in track(list(calls.values()), "ViT-B", console=console):
        run()
    seconds = timed(calls, rounds)
    lines = ["| variant | median s | x of unmodified |", "|---|---:|---:|"]
    ratios = speed_ups(seconds, EAGER)
    return [*lines, *(f"| {name} | {statistics.median(spent):.2f} | {ratios[name]:.2f} |" for name, spent in seconds.items())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds, console, load = parser.parse_args().rounds, Console(), os.getloadavg()[0]
    lines = [
        "# CPU: linear attention, and from which length on it pays", "",
        f"{datetime.date.today()}; Python {platform.python_version()}, torch {version('torch')}; {platform.machine()}, {os.cpu_count()} "
        f"cores, {torch.get_num_threads()} threads; load average {load:.1f} when the run began.", "",
        f"Batch 1, {HEADS} heads of {HEAD_DIM}, float32, no gradients, {rounds} rounds. Numbers by length are speed-ups over torch's fused "
        "attention: the median over rounds of SDPA / pass, above 1 is faster. *MiB*: what a call adds at its peak. What a pass adds beside "
        "the attention (feature maps, convolutions) is in it. Written by benchmarks/linear_cpu.py.",
    ]  # fmt: skip
    with torch.no_grad():
        lines += ["", "## Not causal, on a square grid", "", *table(False, rounds, console)]
        lines += ["", "## Causal", "", *table(True, rounds, console)]
        lines += ["", "## ViT-B/16 at 1024 px, 4,097 tokens, 12 layers", "", *whole_model(max(3, rounds // 2), console)]
    RESULTS.write_text("\n".join(lines) + "\n")
    console.print(f"written to {RESULTS}")


if __name__ == "__main__":
    main()
