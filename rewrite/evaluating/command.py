"""``python -m rewrite evaluate``."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from rewrite.evaluating.evaluate import EVERY, Header, evaluate
from rewrite.evaluating.results import draw, results_table, write_csv
from rewrite.evaluating.settings import settings
from rewrite.evaluating.task import load_task

# Narrower than this, the table folds its numbers.
WIDTH = 130

EXAMPLE = """example:
  python -m rewrite evaluate --model examples/zoo/weights/classifier --task examples.zoo.tasks:classification \\
      --passes "evit(layers=(1, 3))" merge --sweep keep=1.0:0.1 r=0:24:7"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLE
    parser.add_argument("--model", type=Path, required=True, help="folder of the model, which the task's function loads it from")
    parser.add_argument("--task", required=True, metavar="MODULE:FUNCTION", help="makes a rewrite.evaluating.Task of (folder, samples)")
    parser.add_argument("--passes", nargs="+", required=True, metavar="METHOD", help='methods to measure; "a + b" is one of two passes')
    parser.add_argument("--sweep", nargs="*", default=(), metavar="NAME=RANGE", help="FIRST:LAST[:COUNT], or values between commas")
    parser.add_argument("--samples", type=int, default=1000, help="how many samples to ask for (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("evaluation"), help="folder for results.json, results.csv and accuracy.png")


def run(chosen: argparse.Namespace, console: Console) -> None:
    """Measure what is not in the folder's results.json yet, and write all of it."""
    console = Console(width=max(WIDTH, console.width))
    if not chosen.model.is_dir():
        raise NotADirectoryError(f"--model: there is no folder {chosen.model}")
    task = load_task(chosen.task, chosen.model, chosen.samples)
    points = settings(chosen.passes, chosen.sweep)
    rows = evaluate(task, points, Header.of(chosen.model, chosen.task, chosen.samples), chosen.out / "results.json", console)
    write_csv(rows, chosen.out / "results.csv")
    draw(rows, chosen.out / "accuracy.png")
    groups = list(dict.fromkeys(row["group"] for row in rows if row["group"] != EVERY))
    if groups:
        draw(rows, chosen.out / "accuracy_by_group.png", groups)
    console.print(results_table(rows))
    console.print(f"written to {chosen.out}: {', '.join(sorted(file.name for file in chosen.out.iterdir()))}", markup=False)
