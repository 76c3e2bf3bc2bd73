"""Write docs/fidelity.md from the shipped results: python -m examples.zoo.write_fidelity"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .attention import SAMPLES, SINK
from .measure import MEASUREMENTS, RESULTS, Measurement

PAGE = Path(__file__).parents[2] / "docs" / "fidelity.md"
Row = dict[str, Any]

OPENING = """# What each pass does to answers

Written by `python -m examples.zoo.write_fidelity` from the results that `python -m examples.zoo.measure` leaves in examples/zoo/results.

The models are small and were trained here, on drawn scenes ([examples/zoo](../examples/zoo)): no weights can be downloaded where this is
built. They can show whether a pass does what its formula says to a model that works, what it costs in answers at a given saving, and how
methods compare at equal cost on pictures where what matters is small and known. They cannot show how a published model of a hundred or
ten thousand times the size fares: its attention is spread otherwise, its towers have the artefacts that some methods are made for, and
photographs hold more than a few things. Where a method that works for its authors does not here, that is told as found.

Accuracies are on held-out scenes, with their 95 % score intervals; agreement is with the unmodified model's own answers. Multiply-adds and
time are of the unmodified model's (time of one batch on the CPU that measured, the least of three runs; it had other work, so times are
rough). Methods that need training
(`agent`, `matryoshka`, `sparsifiner`) are measured without any.
"""


def page() -> str:
    """The page, of what has been measured."""
    parts = [OPENING]
    for one in MEASUREMENTS:
        if (RESULTS / one.task / "results.json").exists():
            parts.append(_measured(one))
    attention = RESULTS / "attention.json"
    if attention.exists():
        parts.append(_attention(json.loads(attention.read_text())))
    missing = [one.task for one in MEASUREMENTS if not (RESULTS / one.task / "results.json").exists()]
    if missing:
        parts.append(f"Not measured yet, because their models are not shipped yet: {', '.join(missing)}.\n")
    findings = [found for find in FINDINGS if (found := find())]
    if findings:
        parts.insert(1, "## Findings\n\n" + "\n".join(f"- {one}" for one in findings) + "\n")
    return "\n".join(parts)


def rows_of(task: str, group: str = "all") -> list[Row]:
    """What was measured of a task for one group; nothing where it was not."""
    file = RESULTS / task / "results.json"
    rows = json.loads(file.read_text())["rows"] if file.exists() else []
    return [row for row in rows if row["group"] == group and "accuracy" in row]


def _measured(one: Measurement) -> str:
    rows = rows_of(one.task)
    lines = [
        f"## {one.task}\n",
        f"Model: [{one.model}](../examples/zoo/weights/{one.model}), {rows[0]['samples']} samples. {PICTURE.format(task=one.task)}\n",
        f"    {one.command}\n",
        "| method | | accuracy | | agreement | multiply-adds | time |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        at = "" if row["value"] is None else f"`{row['parameter']}={row['value']!r}`".replace("'", '"')
        lines.append(
            f"| `{row['method']}` | {at} | {row['accuracy']:.1%} | {row['low']:.1%} to {row['high']:.1%} | {row['agreement']:.1%} "
            f"| {share(row):.0%} | {row['seconds'] / row['original_seconds']:.0%} |"
        )
    return "\n".join(lines) + "\n"


PICTURE = "[Accuracy against cost](../examples/zoo/results/{task}/accuracy.png)."


def share(row: Row) -> float:
    """Multiply-adds, of the original's."""
    return float(row["multiply_adds"] / row["original_multiply_adds"])


def _attention(found: dict[str, Any]) -> str:
    lines = [
        "## Attention sinks\n",
        f"Over {SAMPLES} samples, by layer: what a token receives of the layer's attention, in times of the mean of all tokens. Under\n"
        "a causal mask even attention gives the first of 200 tokens 6.\n",
    ]
    for name, model in found.items():
        what = "tower" if "tower" in model else "language model"
        lines += [
            f"### {name}, {what}\n",
            f"| layer | first token | greatest other | samples with another token above {SINK:g} |",
            "|---|---|---|---|",
        ]
        for layer, row in enumerate(model[what]):
            lines.append(f"| {layer} | {row['first token']:.1f} | {row['greatest other']:.1f} | {row['samples with another sink']:.0%} |")
        lines.append("")
        if "last word" in model:
            lines += [
                "What the last word of the question looks at, by layer:\n",
                "| layer | `<s>` | picture | question |",
                "|---|---|---|---|",
            ]
            for layer, row in enumerate(model["last word"]):
                lines.append(f"| {layer} | {row['<s>']:.1%} | {row['picture']:.1%} | {row['question']:.1%} |")
            lines.append("")
    return "\n".join(lines)


def _at(rows: list[Row], method: str, value: Any) -> Row | None:
    return next((row for row in rows if row["method"].split("(")[0] == method.split("(", maxsplit=1)[0] and row["value"] == value), None)


WORSE = "worse than"


def compared(one: Row, other: Row) -> str:
    """Which of two is better, as far as their intervals tell."""
    if one["low"] > other["high"]:
        return "better than"
    return WORSE if one["high"] < other["low"] else "not to be told apart from"


def _told(row: Row) -> str:
    return f"{row['accuracy']:.1%} ({row['low']:.1%} to {row['high']:.1%})"


def _cls_against_text() -> str:
    """FasterVLM's claim."""
    rows, lines, worse = rows_of("answering"), [], False
    for keep, drop in ((0.25, 0.75), (0.1, 0.9), (0.05, 0.95)):
        cls, text = _at(rows, "cls_prune", keep), _at(rows, "fastv", drop)
        if cls and text:
            worse |= compared(cls, text) == WORSE
            lines.append(f"at {keep:.0%} of the tokens {_told(cls)} is {compared(cls, text)} {_told(text)}")
    claim = "**Pruning by CLS against pruning by the text's attention** (FasterVLM: CLS is better at high ratios; FastV from layer 2): "
    why = " Not so here: this tower's CLS was trained to name the largest thing, and looks at little else." if worse else ""
    return claim + "; ".join(lines) + "." + why if lines else ""


def _sinks_and_existence() -> str:
    """VAR's claim."""
    rows = rows_of("existence")
    of_pass = [row for row in rows if row["method"].startswith("sink_redistribution")]
    if not of_pass:
        return ""
    lines = [f"p={row['value']}: {_told(row)}, {compared(row, rows[0])}" for row in of_pass]
    claim = f"**Sink redistribution and existence** (VAR: accuracy on POPE does not fall; here without it {_told(rows[0])}): "
    same = " No answer changed: there are no sinks to take from." if all(row["agreement"] == 1.0 for row in of_pass) else ""
    return claim + "; ".join(lines) + " the original." + same


def _after_fading() -> str:
    """Pruning behind the layer at which visual attention fades."""
    rows = rows_of("answering")
    exits = [row for row in rows if row["method"] == "token_exit"]
    if not exits:
        return ""
    free = [row["value"] for row in exits if compared(row, rows[0]) != WORSE]
    told = ", ".join(f"{row['value']}: {row['accuracy']:.1%}" for row in exits)
    first = f"from layer {min(free)} on, all visual tokens can leave without a loss that is told apart" if free else "no layer is free"
    return f"**Visual tokens leave at one layer** (without it {_told(rows[0])}; accuracy by layer {told}): {first}."


# Two settings cost the same where their shares of the original's multiply-adds are this close.
SAME_COST = 0.02


def _against_random() -> str:
    """Which methods are better than chance at equal cost."""
    lines = []
    for task, floor in (("answering", "random_tokens"), ("classification", "random_patches"), ("events", "random_patches")):
        rows = [row for row in rows_of(task) if share(row) < 1]
        floors = [row for row in rows if row["method"].startswith(floor)]
        for method in dict.fromkeys(row["method"] for row in rows if row not in floors):
            told = [
                f"{row['accuracy']:.1%} is {compared(row, other)} {other['accuracy']:.1%} at {share(row):.0%}"
                for row in rows
                for other in floors
                if row["method"] == method and abs(share(row) - share(other)) < SAME_COST
            ]
            if told:
                lines.append(f"`{method}` ({task}): {', '.join(told)}")
    return "**Against pruning at random**, at the same share of the multiply-adds: " + "; ".join(lines) + "." if lines else ""


def _cheapest() -> str:
    """How much each method saves before its loss shows."""
    lines = []
    for one in MEASUREMENTS:
        rows = rows_of(one.task)
        told = []
        for method in dict.fromkeys(row["method"] for row in rows if share(row) < 1):
            free = [row for row in rows if row["method"] == method and compared(row, rows[0]) != WORSE]
            if free:
                told.append(f"`{method}` {min(map(share, free)):.0%}")
        if told:
            lines.append(f"{one.task}: {', '.join(told)}")
    return "**The fewest multiply-adds at which a loss does not show**, of the original's: " + "; ".join(lines) + "." if lines else ""


def _sinks() -> str:
    file = RESULTS / "attention.json"
    if not file.exists():
        return ""
    told = []
    for name, model in json.loads(file.read_text()).items():
        rows = model["tower" if "tower" in model else "language model"]
        first = max(range(len(rows)), key=lambda layer: rows[layer]["first token"])
        other = max(range(len(rows)), key=lambda layer: rows[layer]["greatest other"])
        told.append(
            f"{name}: the first token receives up to {rows[first]['first token']:.1f} times the mean (layer {first}), another token "
            f"up to {rows[other]['greatest other']:.1f} times (layer {other}; above {SINK:g} in "
            f"{rows[other]['samples with another sink']:.0%} of samples)"
        )
    return "**Attention sinks**: " + "; ".join(told) + "."


FINDINGS: tuple[Callable[[], str], ...] = (_cls_against_text, _sinks_and_existence, _after_fading, _against_random, _cheapest, _sinks)


if __name__ == "__main__":
    PAGE.write_text(page())
