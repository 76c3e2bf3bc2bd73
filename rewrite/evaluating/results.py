"""Results as a CSV file, a table and pictures: accuracy against cost, one line a method."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from rewrite.evaluating.evaluate import EVERY, ORIGINAL, Row
from rewrite.ir.errors import RewriteError

COLUMNS = (
    "method", "parameter", "value", "passes", "group", "samples", "accuracy", "low", "high", "agreement", "agreement_low", "agreement_high",
    "loss", "multiply_adds", "original_multiply_adds", "seconds", "original_seconds", "declined",
)  # fmt: skip


def write_csv(rows: Sequence[Row], file: Path) -> None:
    """All rows, a column for each figure."""
    with file.open("w", newline="") as out:
        writer = csv.DictWriter(out, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def results_table(rows: Sequence[Row]) -> Table:
    """The rows of all samples together."""
    table = Table(title="Accuracy with its 95 % interval", title_justify="left")
    for heading in ("method", "at", "accuracy", "agreement", "loss", "multiply-adds", "time"):
        table.add_column(heading, justify="left" if heading in ("method", "at") else "right", overflow="fold")
    declined: dict[str, str] = {}
    for row in (one for one in rows if one["group"] == EVERY):
        at = "" if row["value"] is None else f"{row['parameter']}={row['value']}"
        if "declined" in row:
            table.add_row(row["method"], at, "declined")
            declined.setdefault(row["method"], row["declined"])
            continue
        table.add_row(
            row["method"], at, f"{row['accuracy']:.1%} ({row['low']:.1%} to {row['high']:.1%})", f"{row['agreement']:.1%}",
            f"{row['loss']:.3f}", f"{row['multiply_adds'] / row['original_multiply_adds']:.0%}",
            f"{row['seconds'] / row['original_seconds']:.0%}",
        )  # fmt: skip
    table.caption = "\n".join(f"{method} is declined: {reason}" for method, reason in declined.items()) or None
    return table


def draw(rows: Sequence[Row], file: Path, groups: Sequence[str] = (EVERY,)) -> None:
    """Accuracy against multiply-adds of the original's, one panel a group and one line a method, as a picture.

    Raises `RewriteError` where matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RewriteError('drawing needs matplotlib: pip install "attention-rewrite[evaluate]"') from error
    measured = [row for row in rows if "accuracy" in row]
    methods = list(dict.fromkeys(row["method"] for row in measured if row["method"] != ORIGINAL))
    across = min(3, len(groups))
    down = -(-len(groups) // across)
    figure = Figure(figsize=(5.2 * across + 2.4, 3.9 * down), layout="constrained")
    panels: list[Any] = list(figure.subplots(down, across, squeeze=False).ravel())
    for panel in panels[len(groups) :]:
        panel.remove()
    for panel, group in zip(panels, groups, strict=False):
        of_group = [row for row in measured if row["group"] == group]
        for number, method in enumerate(methods):
            line = sorted((row for row in of_group if row["method"] == method), key=_share)
            shares = [_share(row) for row in line]
            colour, style = f"C{number % 10}", ("-", "--", ":", "-.")[number // 10 % 4]
            panel.plot(shares, [row["accuracy"] for row in line], marker=".", color=colour, linestyle=style, label=method)
            panel.fill_between(shares, [row["low"] for row in line], [row["high"] for row in line], color=colour, alpha=0.08, linewidth=0)
        for row in (one for one in of_group if one["method"] == ORIGINAL):
            panel.axhline(row["accuracy"], color="grey", linewidth=0.8, linestyle=(0, (4, 4)))
        panel.set(title=group, xlabel="multiply-adds, of the original's", ylabel="accuracy")
        panel.grid(alpha=0.25)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8)
    figure.savefig(file, dpi=90)


def _share(row: Row) -> float:
    return float(row["multiply_adds"] / row["original_multiply_adds"])
