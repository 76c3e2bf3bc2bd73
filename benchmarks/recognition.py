"""What recognition costs beside the capture it follows, and what it finds beside Inductor's attention patterns, for models of the corpus.

    python -m benchmarks.recognition [--rounds 3] [--fresh] [--report] [NAME ...]

A round captures a model twice in one process, with attention written out, at batch 2: with a backend that does nothing, which gives the
time of Dynamo's capture alone, and with one that recognises and proves every attention, no proof being known before. The ratio of a model
is the median over rounds of recognition / capture. Results go to benchmarks/results/recognition.md as found; what was measured is kept in
.cache, so that an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch._dynamo.utils import compilation_time_metrics

from benchmarks.coverage import MODELS_PER_WORKER, PATTERNS, ROOT, Row, keep, kept

RESULTS = Path(__file__).parent / "results" / "recognition.md"
TIMES = ROOT / ".cache" / "recognition.jsonl"
GOAL = 0.5
BATCHES = (1, 2)


def measure(name: str, rounds: int, counted: dict[str, int] | None) -> Row:
    """One model: its seconds by round, the sites found, and Inductor's counts by batch unless they are known."""
    import tests.conftest  # noqa: F401  a torchvision that imports
    from benchmarks.inductor_patterns import replaced_by_inductor
    from tests.models.corpus.cases import BY_NAME
    from tests.models.corpus.survey import captured, survey

    torch.set_num_threads(1)
    entry = BY_NAME[name]
    written_out = entry.implementations[-1]
    capture, recognition, found = [], [], 0
    for _ in range(rounds):
        model, inputs = entry.build(written_out), dict(entry.inputs(2))
        compilation_time_metrics.clear()
        captured(model, inputs, lambda module, _: module.forward)
        capture.append(sum(compilation_time_metrics["_compile.compile_inner"]))
        seen = survey(entry, written_out, 2)
        recognition.append(seen.seconds)
        found = len(seen.found)
    if counted is None:
        surveys = {batch: survey(entry, written_out, batch, also=replaced_by_inductor) for batch in BATCHES}
        counted = {str(batch): sum(each.also * each.runs for each in seen.readings) for batch, seen in surveys.items()}
    return {"name": name, "truth": entry.truth, "found": found, "capture": capture, "recognition": recognition, "inductor": counted}


def ratio(row: Row) -> float:
    return statistics.median(own / base for own, base in zip(row["recognition"], row["capture"], strict=True))


def columns(row: Row) -> tuple[str, ...]:
    counts = (str(row["inductor"].get(str(batch), "-")) for batch in BATCHES)
    seconds = (f"{statistics.median(row[what]):.2f}" for what in ("capture", "recognition"))
    return (row["name"], str(row["truth"]), str(row["found"]), *counts, *seconds, f"{ratio(row):.2f}")


HEADINGS = ("model", "sites", "recognised", "Inductor, batch 1", "Inductor, batch 2", "capture s", "recognition s", "ratio")


def total(rows: list[Row]) -> tuple[str, ...]:
    """The sums of all rows; the ratio is that of all seconds."""
    counts = [sum(row["inductor"].get(str(batch), 0) for row in rows) for batch in BATCHES]
    capture, recognition = (sum(statistics.median(row[what]) for row in rows) for what in ("capture", "recognition"))
    sums = (sum(row["truth"] for row in rows), sum(row["found"] for row in rows), *counts)
    return (f"{len(rows)} models", *map(str, sums), f"{capture:.1f}", f"{recognition:.1f}", f"{recognition / capture:.2f}")


def page(rows: list[Row]) -> str:
    model = next((line.split(":")[1] for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "timm", "transformers"))
    ratios = sorted(map(ratio, rows))
    over = [row["name"] for row in rows if ratio(row) > GOAL]
    quartiles = ", ".join(f"{ratios[int(part * (len(ratios) - 1))]:.2f}" for part in (0, 0.25, 0.5, 0.75, 0.95, 1))
    lines = [
        "# Recognition: what it finds and what it costs",
        "",
        f"{datetime.date.today()}; Python {platform.python_version()}, {packages}; {model.strip() or platform.processor()}, "
        f"{os.cpu_count()} cores, 1 thread; load average {os.getloadavg()[0]:.1f} at the end (shared machine where that is much above 1).",
        "",
        "Attention written out, float32. Recognised: sites found and proved at batch 2. Inductor: attentions that one of PyTorch's",
        "patterns replaces. Capture: seconds that Dynamo takes at batch 2 with a backend that does nothing; recognition: seconds of",
        "recognition and proof on the same graphs, with no proof known before; the ratio is the median over rounds. Written by",
        "benchmarks/recognition.py.",
        "",
        f"Ratio: least, quartiles, 95%, most: {quartiles}. Above the goal of {GOAL}: {', '.join(over) or 'none'}.",
        "",
        "| " + " | ".join(HEADINGS) + " |",
        "|---" + "|---:" * (len(HEADINGS) - 1) + "|",
        "| " + " | ".join(f"**{cell}**" for cell in total(rows)) + " |",
        *("| " + " | ".join(columns(row)) + " |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def shown(rows: list[Row]) -> Table:
    table = Table(*HEADINGS[:1])
    for heading in HEADINGS[1:]:
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*columns(row), style="bold" if ratio(row) > GOAL else "")
    table.add_section()
    table.add_row(*total(rows))
    return table


def main() -> None:
    """Measure what is asked for, print the table and write the results."""
    from tests.models.corpus.cases import ENTRIES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="models to measure; all where none is named")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--fresh", action="store_true", help="measure again what is kept")
    parser.add_argument("--report", action="store_true", help="measure nothing, write the results from what is kept")
    options = parser.parse_args()
    console = Console()
    done: dict[str, Any] = {} if options.fresh else kept(TIMES)
    names = [entry.name for entry in ENTRIES if not options.names or entry.name in options.names]
    wanted = [] if options.report else [name for name in names if name not in done]
    # One model at a time: two would slow each other down.
    with get_context("spawn").Pool(1, maxtasksperchild=MODELS_PER_WORKER) as pool:
        for name in track(wanted, "models", console=console):
            counted = kept(PATTERNS).get(name, {}).get("counts")
            try:
                keep(TIMES, pool.apply(measure, (name, options.rounds, counted)))
            except Exception as error:
                console.print(f"{name}: {error!r}", markup=False)
    order = {entry.name: place for place, entry in enumerate(ENTRIES)}
    rows = sorted(kept(TIMES).values(), key=lambda row: order[row["name"]])
    console.print(shown([row for row in rows if row["name"] in names]))
    RESULTS.write_text(page(rows))
    console.print(f"written to {RESULTS}")


if __name__ == "__main__":
    main()
