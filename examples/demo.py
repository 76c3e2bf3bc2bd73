"""One photograph, published methods: what a trained model answers before and after, what is rewritten, what it costs, and pictures.

Run it with `make demo`, or `python -m examples.demo`. Nothing is downloaded. The model that answers is a small one that ships with the
project; what passes cost is shown on two real architectures at real sizes, with random weights.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from skimage import data, transform
from torch import nn

from rewrite import cached_tokens, kernels, rewrite

from .demo_answers import PASSES, answers
from .demo_models import FULL, SMALL, deit, llava, pixels, prompt
from .demo_pictures import draw_costs, draw_patches, draw_token_exit

# Narrower than this, the report's table folds its numbers.
WIDTH = 150


@dataclass(frozen=True)
class Shown:
    """One model before and after its passes: multiply-adds of the attention sites and of the whole model, and seconds of each run."""

    label: str
    model: nn.Module
    attention: tuple[int, int]
    total: tuple[int, int]
    seconds: tuple[list[float], list[float]]


def main(arguments: list[str] | None = None) -> None:
    """The whole demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for the pictures")
    parser.add_argument("--small", action="store_true", help="tiny models, for a quick look")
    chosen = parser.parse_args(arguments)
    shapes = SMALL if chosen.small else FULL
    console = Console(width=max(WIDTH, Console().width))
    chosen.out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    answers(console, chosen.out, PASSES[:1] if chosen.small else PASSES)
    console.print("Two models at real sizes with random weights, for what changes and what it costs:", style="bold")

    photo = transform.resize(data.astronaut(), (768, 768), anti_aliasing=True).astype(np.float32)
    vision = {"pixel_values": pixels(photo, shapes.deit_image)}
    text_and_image = {**prompt(shapes), "pixel_values": pixels(photo, shapes.llava_image)}
    shown = []
    with torch.no_grad():
        for passes in ([f"agent(tokens={shapes.agents})"], [f"neighborhood(window={shapes.window})"]):
            shown.append(show(console, "DeiT-S", deit(shapes), vision, passes=passes, runs=shapes.runs))
        for passes in ([f"agent(tokens={shapes.agents})", "token_exit"], ["sink_redistribution"]):
            shown.append(show(console, "LLaVA", llava(shapes), text_and_image, passes=passes, runs=shapes.runs))
        generate(console, llava(shapes), shown[2].model, text_and_image, shapes.new_tokens)
        kept = visual_tokens_kept(shown[2].model, text_and_image)

    console.print(times(shown))
    console.print(emitted(shown))
    pictures = (
        draw_token_exit(photo, kept, shapes.llava_grid, chosen.out / "token_exit.png"),
        draw_patches(photo, shapes.deit_grid, shapes.window, shapes.agents, chosen.out / "neighborhood_and_agents.png"),
        draw_costs([(one.label, one.attention, one.total) for one in shown], chosen.out / "multiply_adds.png"),
    )
    for picture in pictures:
        console.print(f"picture: {picture}")
    console.print(f"{time.perf_counter() - started:.0f} s")


def show(console: Console, name: str, model: nn.Module, inputs: dict[str, torch.Tensor], *, passes: list[str], runs: int) -> Shown:
    """Rewrite a model, print its report and time both."""
    label = f"{name}: {', '.join(one.split('(')[0] for one in passes)}"
    console.rule(label)
    with console.status("capturing, proving and rewriting"):
        started = time.perf_counter()
        rewritten = rewrite(model, passes=passes, example_inputs=inputs)
        spent = time.perf_counter() - started
    report = rewritten.rewrite_report
    console.print(report)
    console.print(f"rewritten in {spent:.1f} s")
    with console.status("timing"):
        seconds = paired(lambda: model(**inputs), lambda: rewritten(**inputs), runs)
    attention = (sum(site.cost_before.multiply_adds for site in report.sites), sum(site.cost_after.multiply_adds for site in report.sites))
    return Shown(label, rewritten, attention, (report.total_before.multiply_adds, report.total_after.multiply_adds), seconds)


def paired(before: Callable[[], object], after: Callable[[], object], runs: int) -> tuple[list[float], list[float]]:
    """Seconds of each run of both, in turns so that what else the machine does hits both alike; the first run of each is not counted."""
    before(), after()
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(runs):
        for call, spent in zip((before, after), seconds, strict=True):
            started = time.perf_counter()
            call()
            spent.append(time.perf_counter() - started)
    return seconds


def generate(console: Console, model: nn.Module, rewritten: nn.Module, inputs: dict[str, torch.Tensor], new_tokens: int) -> None:
    """Greedy decoding by both, and how many tokens each layer's KV cache holds at the end."""
    console.rule("LLaVA: generate()")
    for label, one in (("before", model), ("after", rewritten)):
        result = one.generate(**inputs, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, return_dict_in_generate=True)
        lengths = cached_tokens(result.past_key_values)
        count = result.sequences.shape[1] - inputs["input_ids"].shape[1]
        console.print(f"{label}: {count} tokens generated; tokens in the KV cache of each layer: {' '.join(map(str, lengths))}")


def visual_tokens_kept(model: nn.Module, inputs: dict[str, torch.Tensor]) -> list[int]:
    """How many visual tokens each layer of the language model works on, read off its KV cache."""
    visual = int((inputs["input_ids"] == model.config.image_token_id).sum())
    text = inputs["input_ids"].shape[1] - visual
    return [tokens - text for tokens in cached_tokens(model(**inputs).past_key_values)]


def times(shown: list[Shown]) -> Table:
    """Measured time of a forward pass, before and after."""
    threads = torch.get_num_threads()
    table = Table(title=f"Forward pass on the CPU, float32, {threads} threads, medians of {len(shown[0].seconds[0])} paired runs")
    for heading in ("model: passes", "before (unmodified, eager, SDPA)", "after (rewritten, eager)", "before / after"):
        table.add_column(heading, justify="left" if heading.startswith("model") else "right")
    for one in shown:
        before, after = (statistics.median(seconds) for seconds in one.seconds)
        table.add_row(one.label, f"{before * 1e3:.0f} ms", f"{after * 1e3:.0f} ms", f"{before / after:.2f}")
    return table


def emitted(shown: list[Shown]) -> Table:
    """The Triton kernels that were emitted, compiled for an H100 without one."""
    table = Table(title="Emitted Triton kernels, compiled ahead of time for sm_90 in bfloat16")
    for heading in ("kernel", "for", "sites", "registers", "spilled bytes", "shared memory", "file"):
        table.add_column(heading, overflow="fold", justify="right" if heading in ("sites", "registers", "spilled bytes") else "left")
    for one in shown:
        heads = {site.qualified_name: site.head_dim for site in one.model.rewrite_report.sites}
        for kernel in kernels(one.model):
            sites = kernel.site.split(", ")
            compiled = kernel.compile("sm_90", torch.bfloat16, head_dim=heads[sites[0]])
            used = (str(compiled.registers), str(compiled.spills), f"{compiled.shared_memory / 1024:.0f} KiB")
            table.add_row(kernel.name, ", ".join(kernel.passes), str(len(sites)), *used, kernel.path.name)
            table.caption = f"The files are in {kernel.path.parent}"
    return table


if __name__ == "__main__":
    main()
