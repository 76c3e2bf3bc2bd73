"""Which visual tokens each method keeps of a photograph, and what that costs: predicted and measured.

    python -m examples.prune_vlm --output kept.png

The model has the shape of LLaVA-1.5 (a CLIP tower at 336 px, 576 visual tokens, a LLaMA), narrower and shallower, with random weights:
nothing is downloaded, what CLS or the last word looks at is noise, and no method is judged by what it keeps. Costs are not noise.
"""

from __future__ import annotations

import argparse
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from skimage import data, transform
from torch import nn

from rewrite import NotApplicableError, Report, SlowerWarning, available_passes, rewrite

from .demo_models import FULL, SMALL, Shapes, llava, pixels, prompt
from .demo_pictures import Panel, draw_kept
from .patches_seen import patches_seen

# What is shown, in this order, of what is registered. A quarter of the visual tokens stays where that is the method's choice.
METHODS = (
    "cls_prune(keep=0.25)",
    "cls_ensemble(keep=0.25)",
    "hired(keep=0.25)",
    "dominant_contextual(dominant=0.2, contextual=0.05)",
    "diverse(keep=0.25)",
    "fastv(layer=2, drop=0.75)",
    "pyramid(layers=(1, 2, 3))",
    "token_exit(layer=2)",
    "outlier_tokens",
    "merge(r=48)",
    "fuse",
    "matryoshka(tokens=144)",
)

Inputs = dict[str, torch.Tensor]

# Narrower than this, the table folds its numbers.
WIDTH = 140


@dataclass(frozen=True)
class Shown:
    """One method on the model: the report, and for each patch the share of the language model's layers that see it, [grid, grid]."""

    method: str
    report: Report
    seen: np.ndarray
    groups: np.ndarray | None


def main(arguments: list[str] | None = None) -> None:
    """Every method, one after the other: a picture and a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("kept.png"), help="where the picture goes")
    parser.add_argument("--methods", nargs="+", default=METHODS, help="pass lists to show, as text; by default all that are registered")
    parser.add_argument("--small", action="store_true", help="a tiny model, for a quick look")
    chosen = parser.parse_args(arguments)
    shapes, console = SMALL if chosen.small else FULL, Console(width=max(WIDTH, Console().width))
    photo = transform.resize(data.astronaut(), (768, 768), anti_aliasing=True).astype(np.float32)
    model, inputs = llava(shapes), {**prompt(shapes), "pixel_values": pixels(photo, shapes.llava_image)}
    registered = {cls.name for cls in available_passes()}
    console.print("Random weights: this shows how methods choose and what they cost, not how well they choose.", style="bold")
    shown = []
    for method in (one for one in chosen.methods if one.split("(")[0] in registered):
        with console.status(method):
            try:
                shown.append(show(method, model, inputs, shapes))
            except NotApplicableError as error:
                console.print(f"{method} is left out: {error}")
    console.print(costs(shown, shapes))
    panels = [Panel(one.method, one.seen, one.groups) for one in shown]
    heading = "The patches that the language model sees: bright in all layers, pale in none (random weights)"
    console.print(f"picture: {draw_kept(photo, panels, chosen.output, heading)}")


def show(method: str, model: nn.Module, inputs: Inputs, shapes: Shapes) -> Shown:
    """The model under one method: costs, measured ones too, and which patches are seen where."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", SlowerWarning)  # the table says so
        rewritten = rewrite(model, [method], example_inputs=inputs, measure=True)
    return Shown(method, rewritten.rewrite_report, *patches_seen(rewritten, inputs, shapes.llava_grid))


def costs(shown: list[Shown], shapes: Shapes) -> Table:
    """What each method costs: counted, predicted and measured."""
    table = Table(title=f"Tower and prefill on the CPU, float32, {torch.get_num_threads()} threads; before / after where there is an x")
    for heading in ("method", "visual tokens a layer sees, mean", "multiply-adds", "predicted", "measured", "measured ms"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for one in shown:
        before, after = one.report.total_before.multiply_adds, one.report.total_after.multiply_adds
        predicted, measured = one.report.predicted, one.report.measured
        assert predicted is not None
        assert measured is not None
        table.add_row(
            one.method, f"{one.seen.mean() * shapes.llava_grid**2:.0f} of {shapes.llava_grid**2}", f"{before / after:.2f}x",
            f"{predicted.before / predicted.after:.2f}x", f"{measured.before / measured.after:.2f}x",
            f"{measured.before * 1e3:.0f} → {measured.after * 1e3:.0f}",
        )  # fmt: skip
    return table


if __name__ == "__main__":
    main()
