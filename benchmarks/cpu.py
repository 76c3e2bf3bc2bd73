"""Forward passes on the CPU: unmodified and rewritten models side by side, each eager and compiled by Inductor.

    python benchmarks/cpu.py

Every variant of a model is run in turns in one process, so that whatever else the machine does hits all alike; a ratio is the median over
rounds of (time of the unmodified model / time of the variant) within a round. Results go to benchmarks/results/cpu.md as found.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from torch import nn

from rewrite import rewrite

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from demo_models import FULL, llava, prompt
from torchvision_or_not import let_transformers_import

RESULTS = Path(__file__).parent / "results" / "cpu.md"
DEIT_S = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
# A model's rounds end after this many seconds, but not before the least number of rounds.
SECONDS, LEAST_ROUNDS, MOST_ROUNDS = 15.0, 5, 25
EAGER, COMPILED = "unmodified, eager", "unmodified, inductor"

Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """A model, its inputs, and the pass lists to try on it."""

    name: str
    build: Callable[[], tuple[nn.Module, Inputs]]
    passes: tuple[str, ...]


def vision(model: str, **sizes: int) -> Callable[[], tuple[nn.Module, Inputs]]:
    """A model of transformers for one image, with random weights."""

    def build() -> tuple[nn.Module, Inputs]:
        let_transformers_import()
        import transformers

        torch.manual_seed(0)
        config = getattr(transformers, f"{model}Config")(**{**DEIT_S, **sizes})
        return getattr(transformers, f"{model}Model")(config).eval(), {
            "pixel_values": torch.randn(1, 3, config.image_size, config.image_size)
        }

    return build


def multimodal() -> tuple[nn.Module, Inputs]:
    """The demo's LLaVA: 576 visual tokens among 608, 8 layers of width 512."""
    return llava(FULL), {**prompt(FULL), "pixel_values": torch.randn(1, 3, FULL.llava_image, FULL.llava_image)}


CASES = (
    Case("DeiT-S, 224 px, 198 tokens", vision("DeiT", image_size=224), ("agent", "neighborhood(window=7)")),
    Case("DeiT-S, 384 px, 578 tokens", vision("DeiT", image_size=384), ("agent", "neighborhood(window=7)")),
    Case(
        "ViT-S/16, 1024 px, 4097 tokens, 4 of its 12 layers",
        vision("ViT", image_size=1024, num_hidden_layers=4),
        ("agent", "neighborhood(window=7)", "neighborhood(window=13)"),
    ),
    Case("LLaVA-shaped, prefill of 608 tokens, 576 of them visual", multimodal, ("token_exit",)),
)


def variants(case: Case) -> dict[str, Callable[[], object]]:
    """Every way to run the case, by name."""
    model, inputs = case.build()
    compiled = torch.compile(model)
    calls: dict[str, Callable[[], object]] = {EAGER: lambda: model(**inputs), COMPILED: lambda: compiled(**inputs)}
    for one in case.passes:
        for backend in ("eager", "inductor"):
            changed = rewrite(model, passes=one, example_inputs=inputs, backend=backend)
            calls[f"{one}, {backend}"] = lambda changed=changed: changed(**inputs)
    return calls


def measure(calls: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Seconds of every round by variant; each variant is run twice before anything counts, and rounds start at another one each time."""
    names = list(calls)
    for name in track(names, description="compiling", transient=True):
        calls[name]()
        calls[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    started = time.perf_counter()
    for done in range(MOST_ROUNDS):
        if done >= LEAST_ROUNDS and time.perf_counter() - started > SECONDS:
            break
        first = done % len(names)
        for name in names[first:] + names[:first]:
            begun = time.perf_counter()
            calls[name]()
            seconds[name].append(time.perf_counter() - begun)
    return seconds


def rows(seconds: dict[str, list[float]]) -> list[str]:
    """The lines of one model's table."""
    lines = ["| variant | median ms | x of unmodified eager | x of unmodified inductor |", "|---|---:|---:|---:|"]
    for name, spent in seconds.items():
        ratios = (
            statistics.median(base / own for base, own in zip(seconds[baseline], spent, strict=True)) for baseline in (EAGER, COMPILED)
        )
        lines.append(f"| {name} | {statistics.median(spent) * 1e3:.1f} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")
    return lines


def heading(threads: int, load: float) -> list[str]:
    """What was measured, when, with what and on what."""
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), ""
    )
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    return [
        "# CPU: forward passes, rewritten against unmodified",
        "",
        f"{datetime.date.today()}; Python {platform.python_version()}, {packages}; {model or platform.processor()}, {os.cpu_count()} "
        f"cores, {threads} threads; load average {load:.1f} when the run began (shared machine where that is much above 0).",
        "",
        "Batch 1, float32, no gradients, random weights. The unmodified model uses PyTorch's scaled_dot_product_attention. A ratio above",
        "1 is faster than that baseline: the median over rounds of baseline / variant within a round. Written by benchmarks/cpu.py.",
    ]


def main() -> None:
    """Measure every case and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of PyTorch")
    threads = parser.parse_args().threads
    torch.set_num_threads(threads)
    console = Console()
    text = heading(threads, os.getloadavg()[0])
    with torch.no_grad():
        for case in CASES:
            torch._dynamo.reset()
            seconds = measure(variants(case))
            text += ["", f"## {case.name}", "", *rows(seconds), "", f"{len(seconds[EAGER])} rounds."]
            console.print("\n".join(text[-len(seconds) - 6 :]), markup=False)
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text("\n".join(text) + "\n")
    console.print(f"written to {RESULTS}")


if __name__ == "__main__":
    main()
