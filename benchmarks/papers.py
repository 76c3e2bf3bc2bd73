"""Multiply-adds of published backbones with a linear attention, beside what its paper says.

    python -m benchmarks.papers [--only Agent-Swin]

Each backbone is built from its config with random weights, as the paper's own code builds it: the dimensions, the resolution, the windows.
The pass is planned on it with the paper's settings, nothing is run but the one forward that is captured, and the report's count for one
picture is put beside the paper's. It leaves elementwise work out. So does the counter of most papers, fvcore, but for a few operators whose
elements it counts (`FVCORE`): a second number has these added, as they are met in a call of the rewritten model. The papers' numbers are
those of their repositories' tables:

    Agent   github.com/LeapLabTHU/Agent-Attention, agent_transformer/README.md, with agent_transformer/cfgs for the settings
    InLine  github.com/LeapLabTHU/InLine, README.md, with models/inline_*.py for the settings

Results go to benchmarks/results/papers.md as found.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from examples.torchvision_or_not import let_transformers_import
from rewrite import SlowerWarning, rewrite

RESULTS = Path(__file__).parent / "results" / "papers.md"

# Layers of each stage, by size of the model.
PVT_DEPTHS = {"T": (2, 2, 2, 2), "S": (3, 4, 6, 3), "M": (3, 4, 18, 3), "L": (3, 8, 27, 3)}
SWINS = {"T": "tiny", "S": "small", "B": "base"}

# What replaces each other attention of the Swin backbones: stages with the whole of their map as window, and blocks of stage three, which
# is mixed in Swin-B.
SWIN_WIDE = {"T": (0, 1, 2), "S": (0, 1), "B": (0, 1)}
SWIN_MIXED = {"B": 2}
WHOLE, WINDOW = 56, 7

# What fvcore counts beside multiply-adds: operator -> operations for an element of its input and for one of its output.
# Source: fvcore 0.1.5, nn/flop_count.py, _DEFAULT_SUPPORTED_OPS.
FVCORE = {
    "aten::native_layer_norm": (5, 0),
    "aten::upsample_bilinear2d": (0, 4),
    "aten::_adaptive_avg_pool2d": (1, 0),
}


@dataclass(frozen=True)
class Row:
    """One model of a paper: how it is built, the pass, the input size, and the paper's multiply-adds in units of 10^9."""

    name: str
    build: Callable[[], nn.Module]
    text: str
    published: float
    image: int = 224
    argument: str = "x"


def deit(width: int, heads: int, image: int = 224) -> Callable[[], nn.Module]:
    """A DeiT of 12 layers and patches of 16 x 16."""
    import timm

    options = {"embed_dim": width, "num_heads": heads, "img_size": image}
    return lambda: timm.create_model("deit_tiny_patch16_224", **options)


def pvt(size: str, heads: tuple[int, ...]) -> Callable[[], nn.Module]:
    """A PVT whose keys are not spatially reduced, as both papers have it."""
    from transformers import PvtConfig, PvtForImageClassification

    config = PvtConfig(
        depths=PVT_DEPTHS[size], hidden_sizes=[64, 128, 320, 512], num_attention_heads=heads, mlp_ratios=[8, 8, 4, 4],
        sequence_reduction_ratios=[1, 1, 1, 1], num_labels=1000,
    )  # fmt: skip
    return lambda: PvtForImageClassification(config)


def swin(size: str) -> Callable[[], nn.Module]:
    """A Swin whose window is the whole map in the stages (and blocks) whose attention is replaced, and 7 x 7 in the others."""
    import timm

    def build() -> nn.Module:
        name = f"swin_{SWINS[size]}_patch4_window7_224"
        model, wide = timm.create_model(name, window_size=WINDOW), timm.create_model(name, window_size=WHOLE)
        for stage in SWIN_WIDE[size]:
            model.layers[stage] = wide.layers[stage]
        for block in range(SWIN_MIXED.get(size, 0)):
            model.layers[2].blocks[block] = wide.layers[2].blocks[block]
        return model

    return build


def swin_sites(size: str) -> str:
    """The stages and layers of a Swin that a pass works on, as its parameters."""
    if size in SWIN_MIXED:
        return f"stacks=(0, 1, 2), layers={tuple(range(SWIN_MIXED[size]))}"
    return f"stacks={SWIN_WIDE[size]}"


def rows() -> list[Row]:
    agent, inline = "agent(tokens={}, learnable=True{})", "inline_attention(local=True{})"
    stages = "(9, 16, 49, 49)"
    table = [
        Row("Agent-DeiT-T", deit(192, 3), agent.format(49, ""), 1.2),
        Row("Agent-DeiT-S", deit(384, 6), agent.format(49, ""), 4.4),
        Row("Agent-DeiT-S, 448 px", deit(384, 6, 448), agent.format(49, ""), 17.7, 448),
        Row("Agent-DeiT-B", deit(768, 12), agent.format(81, ", layers=(0, 1, 2, 3)"), 17.6),
        Row("InLine-DeiT-T", deit(192, 6), inline.format(""), 1.1),
        Row("InLine-DeiT-S, 288 px", deit(320, 10, 288), inline.format(""), 5.0, 288),
        Row("InLine-DeiT-B, 448 px", deit(384, 12, 448), inline.format(""), 17.2, 448),
    ]
    for size, agents, inlined in (("T", 2.0, 2.0), ("S", 4.0, 3.9), ("M", 7.0, 6.9), ("L", 10.4, 10.2)):
        table.append(Row(f"Agent-PVT-{size}", pvt(size, (1, 2, 5, 8)), agent.format(stages, ""), agents, argument="pixel_values"))
        table.append(Row(f"InLine-PVT-{size}", pvt(size, (2, 4, 10, 16)), inline.format(""), inlined, argument="pixel_values"))
    for size, published in (("T", 4.5), ("S", 8.7), ("B", 15.4)):
        where = f", drop_bias=True, {swin_sites(size)}"
        table.append(Row(f"Agent-Swin-{size}", swin(size), agent.format(stages, where), published))
        table.append(Row(f"InLine-Swin-{size}", swin(size), inline.format(where), published))
    return table


@dataclass(frozen=True)
class Measured:
    """In units of 10^9, for one picture: multiply-adds before and after, and what fvcore adds to the latter; numbers of sites."""

    before: float
    after: float
    beside: float
    rewritten: int
    sites: int

    @property
    def as_fvcore(self) -> float:
        return self.after + self.beside


class BesideMultiplyAdds(TorchDispatchMode):
    """Adds up what fvcore counts for the elements of `FVCORE`'s operators."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        of_input, of_output = FVCORE.get(func.name().partition(".")[0], (0, 0))
        if of_input:
            self.operations += of_input * args[0].numel()
        if of_output:
            self.operations += of_output * result.numel()
        return result


def measured(row: Row) -> Measured:
    torch.manual_seed(0)
    model, inputs = row.build().eval(), {row.argument: torch.randn(1, 3, row.image, row.image)}
    with torch.no_grad(), warnings.catch_warnings():
        # Some are slower on this machine, which is not the question here.
        warnings.simplefilter("ignore", SlowerWarning)
        rewritten = rewrite(model, [row.text], inputs)
        with BesideMultiplyAdds() as beside:
            rewritten(**inputs)
    report = rewritten.rewrite_report
    before, after, counts = report.total_before.multiply_adds, report.total_after.multiply_adds, report.counts()
    return Measured(before / 1e9, after / 1e9, beside.operations / 1e9, counts["rewritten"], sum(counts.values()))


def line(row: Row, found: Measured) -> str:
    """The table's row."""
    published = f"{row.published:.1f}"
    equal = "yes" if f"{found.as_fvcore:.1f}" == published else "multiply-adds" if f"{found.after:.1f}" == published else "no"
    cells = (row.name, f"`{row.text}`", f"{found.rewritten} of {found.sites}", f"{found.before:.2f}", f"{found.after:.3f}")
    return f"| {' | '.join((*cells, f'{found.as_fvcore:.3f}', published, equal))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--only", default="", help="names of models that begin so")
    only = parser.parse_args().only
    let_transformers_import()
    lines = [
        "# Multiply-adds of published backbones",
        "",
        "Written by `python -m benchmarks.papers`, which says where the papers' numbers and settings are from. Units of 10^9, one picture.",
        f"torch {version('torch')}, timm {version('timm')}, transformers {version('transformers')}.",
        "",
        "| model | pass | sites | softmax | rewritten | as fvcore counts | paper | equal at the paper's precision |",
        "|---|---|---|---|---|---|---|---|",
    ]
    console = Console(stderr=True)
    for row in track([row for row in rows() if row.name.startswith(only)], console=console):
        lines.append(line(row, measured(row)))
        print(lines[-1], flush=True)
    if not only:
        RESULTS.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
