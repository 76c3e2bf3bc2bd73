"""What is recognised in every model of the corpus, written to docs/coverage.md beside what Inductor's attention patterns find.

    python -m benchmarks.coverage [--fresh] [--report] [NAME ...]

Every model runs at batch 1 and 2 with its attention written out, and at batch 2 with PyTorch's fused attention where it knows that. What
was measured is kept in .cache, a line per model, so that a run that was interrupted goes on where it stopped; --fresh measures the named
models (or all) again, but for Inductor's counts, which change with torch only. --report writes the page from what is kept. With names,
only those are measured.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from rich.console import Console
from rich.progress import track

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "coverage.md"
READ = ROOT / ".cache" / "coverage.jsonl"
PATTERNS = ROOT / ".cache" / f"inductor-{torch.__version__}.jsonl"
WORKERS = 2
# A worker is replaced after so many models, which gives back what they left in memory.
MODELS_PER_WORKER = 20

Row = dict[str, Any]


def measure(task: tuple[str, dict[str, int] | None]) -> tuple[Row, dict[str, int]]:
    """One model's row, and Inductor's counts by batch; the task is its name and the counts where they are known already."""
    import tests.conftest  # noqa: F401  a torchvision that imports
    from benchmarks.inductor_patterns import replaced_by_inductor
    from tests.models.corpus.cases import BY_NAME
    from tests.models.corpus.layouts import layout_differences
    from tests.models.corpus.survey import size_differences, survey

    torch.set_num_threads(1)
    name, counted = task
    entry = BY_NAME[name]
    written_out = entry.implementations[-1]
    counts = dict(counted or {})
    runs: list[Row] = []
    for implementation, batch in ((written_out, 1), (written_out, 2), *((each, 2) for each in entry.implementations[:-1])):
        counting = not counted and implementation == written_out
        run: Row = {"implementation": implementation, "batch": batch}
        try:
            seen = survey(entry, implementation, batch, also=replaced_by_inductor if counting else None)
        except Exception as error:
            told = str(error).strip().splitlines()
            run |= {"found": 0, "unproved": 0, "misses": {}, "error": f"{type(error).__name__}: {told[0] if told else ''}"}
        else:
            run |= {
                "found": len(seen.found),
                "unproved": seen.unproved,
                "misses": dict(Counter(miss.reason for miss in seen.misses)),
                "sizes": size_differences(entry, seen.found, batch),
                # The tables are written for a batch of two; frames on the batch axis look different at one.
                "layout": layout_differences(entry, seen.whole) if batch == 2 else [],
                "graphs": len(seen.readings),
                "seconds": round(seen.seconds, 3),
                "retried": seen.retried,
            }
            if counting:
                counts[str(batch)] = sum(reading.also * reading.runs for reading in seen.readings)
        runs.append(run)
    return {"name": name, "truth": entry.truth, "runs": runs}, counts


def kept(path: Path) -> dict[str, Row]:
    """What was measured so far, by model; a later line replaces an earlier one."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {row["name"]: row for row in map(json.loads, lines)}


def keep(path: Path, row: Row) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def measure_all(names: Iterable[str], console: Console) -> None:
    """Measure the named models, `WORKERS` at a time, and keep each as soon as it is done."""
    counted = kept(PATTERNS)
    tasks = [(name, counted.get(name, {}).get("counts")) for name in names]
    # Not concurrent.futures, whose workers are not replaced once all tasks are handed out (cpython issue 115634).
    with get_context("spawn").Pool(WORKERS, maxtasksperchild=MODELS_PER_WORKER) as pool:
        for row, counts in track(pool.imap_unordered(measure, tasks), "models", total=len(tasks), console=console):
            keep(READ, row)
            if row["name"] not in counted and counts:
                keep(PATTERNS, {"name": row["name"], "counts": counts})


def page() -> str:
    """The page, from what is kept."""
    from tests.models.corpus.cases import ENTRIES
    from tests.models.corpus.exceptions import LAYOUTS, MISSED

    rows, counted = kept(READ), kept(PATTERNS)
    known = [entry for entry in ENTRIES if entry.name in rows]
    table = []
    right = 0
    totals: Counter[str] = Counter()
    for entry in known:
        runs = rows[entry.name]["runs"]
        counts = counted.get(entry.name, {}).get("counts", {})
        one, two = counts.get("1", 0), counts.get("2", 0)
        # Sites that are there once for each picture are fewer at batch 1; none of those is missing.
        absent = [entry.truth - entry.truth_at(run["batch"]) for run in runs]
        proved = min(run["found"] + fewer for run, fewer in zip(runs, absent, strict=True))
        recognised = min(run["found"] + run["unproved"] + fewer for run, fewer in zip(runs, absent, strict=True))
        wrong = next((run.get("error") or "; ".join(run["layout"]) for run in runs if run.get("error") or run["layout"]), "")
        right += not wrong
        totals.update(truth=entry.truth, recognised=recognised, proved=proved, one=one, two=two)
        layout = "-" if not entry.truth else _cell(wrong) if wrong else "yes"
        table.append(f"| {entry.name} | {entry.truth} | {recognised} | {proved} | {layout} | {one} | {two} |")
    return "\n".join(
        [
            "# Coverage",
            "",
            f"Written by `make coverage` on {datetime.date.today()}: torch {torch.__version__}, timm {version('timm')}, "
            f"transformers {version('transformers')}.",
            "",
            f"**{totals['proved']} of the {totals['truth']} attention sites of {len(known)} architectures are recognised and proved**; "
            f"the tokens of {right} of them lie as their tables say. Inductor's attention patterns find {totals['one']} sites at batch 1 "
            f"and {totals['two']} at batch 2.",
            "",
            "A row counts the attentions of one forward, from a table (`tests/models/corpus`) that is read off the model's source and "
            "checked by counting calls in the untouched model. *Recognised*: read as attention. *Proved*: the reading agrees with the "
            "graph in float64 on random inputs; only these are ever rewritten. Both are the least of what was found at batch 1 and 2 "
            "with attention written out, and at batch 2 with fused attention where the model has it. *Layout*: for every site the token "
            "grid, prefix and window are those of the table. *Inductor*: attentions that one of PyTorch's patterns replaces in the model "
            "with its attention written out.",
            "",
            "| architecture | sites | recognised | proved | layout | Inductor, batch 1 | Inductor, batch 2 |",
            "|---|---:|---:|---:|---|---:|---:|",
            f"| **{len(known)} architectures** | **{totals['truth']}** | **{totals['recognised']}** | **{totals['proved']}** | "
            f"**{right} right** | **{totals['one']}** | **{totals['two']}** |",
            *table,
            "",
            "## What is not recognised, and why",
            "",
            *_explained(MISSED),
            "",
            "## Layouts that are not found, and why",
            "",
            *([f"- {name}: {reason}" for name, reason in LAYOUTS.items()] or ["None."]),
            "",
        ]
    )


def _explained(missed: Any) -> Iterator[str]:
    for name, (count, reason) in missed.items():
        yield f"- {name}: {count}, because {reason}"


def _cell(text: str, longest: int = 160) -> str:
    text = text.replace("|", "/")
    return text if len(text) <= longest else text[:longest] + " ..."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="models to measure; all where none is named")
    parser.add_argument("--fresh", action="store_true", help="measure again what is kept")
    parser.add_argument("--report", action="store_true", help="measure nothing, write the page")
    options = parser.parse_args()
    console = Console()
    if not options.report:
        from tests.models.corpus.cases import ENTRIES

        wanted = [entry.name for entry in ENTRIES if not options.names or entry.name in options.names]
        done = {} if options.fresh else kept(READ)
        measure_all([name for name in wanted if name not in done], console)
    PAGE.write_text(page())
    console.print(f"written to {PAGE}")


if __name__ == "__main__":
    main()
