"""Measure every pass on the shipped models: the results that docs/fidelity.md is written from.

python -m examples.zoo.measure                 # all, into examples/zoo/results; goes on where it was interrupted
python -m examples.zoo.measure classification  # one
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rewrite.__main__ import main as rewrite_main

from .attention import write_attention

ZOO = Path(__file__).parent
RESULTS = ZOO / "results"
# Where patches leave the towers of six layers: a third and two thirds of the way.
AT = "layers=(1, 3)"


@dataclass(frozen=True)
class Measurement:
    """One run of `python -m rewrite evaluate`, from the root: a task of `tasks.py` on a folder of `weights`, its methods and sweeps."""

    task: str
    model: str
    samples: int
    methods: tuple[str, ...]
    sweeps: tuple[str, ...]

    @property
    def arguments(self) -> list[str]:
        folder = (ZOO / "weights" / self.model).relative_to(ZOO.parents[1])
        out = (RESULTS / self.task).relative_to(ZOO.parents[1])
        task = f"examples.zoo.tasks:{self.task}"
        methods, sweeps = ["--passes", *self.methods], ["--sweep", *self.sweeps]
        return ["evaluate", "--model", str(folder), "--task", task, "--samples", str(self.samples), *methods, *sweeps, "--out", str(out)]

    @property
    def command(self) -> str:
        return "python -m rewrite " + shlex.join(self.arguments)


PRUNING = (
    "random_tokens", "matryoshka", "cls_prune", "cls_ensemble", "dominant_contextual(contextual=0.05)", "diverse", "fastv(layer=2)",
    "fastv(layer=4)",
)  # fmt: skip
KEEP = ("keep=0.5,0.25,0.1,0.05", "drop=0.5,0.75,0.9,0.95", "dominant=0.45,0.2,0.05", "tokens=49,4")
REDISTRIBUTING = ("sink_redistribution", "head_reinforce", "calibrate")
REDISTRIBUTED = ("p=0.9,0.6,0.3", "factor=1.2,1.5,2.0", "beta=0.8,0.4")

MEASUREMENTS = (
    Measurement(
        "classification", "classifier", 500,
        (f"random_patches({AT})", f"evit({AT})", "merge", "fuse", "neighborhood", "halo(block=7)", "agent"),
        ("keep=0.8,0.6,0.4,0.2", "r=8,16,24,32", "window=11,7,3", "halo=5,3,1", "tokens=100,49,16"),
    ),
    Measurement(
        "segmentation", "segmentation", 200,
        ("merge", "neighborhood", "halo(block=7)", "agent"),
        ("r=8,16,24,32", "window=11,7,3", "halo=5,3,1", "tokens=100,49,16"),
    ),
    Measurement(
        "events", "video", 500,
        ("random_patches(layers=(0, 2))", "evit(layers=(0, 2))", "merge", "fuse", "agent"),
        ("keep=0.8,0.6,0.4,0.2", "r=8,16,24,32", "tokens=100,49,16"),
    ),
    Measurement(
        "answering", "llava", 500, (*PRUNING, "token_exit", "pyramid(layers=(2, 4, 6))", "composite", *REDISTRIBUTING),
        (*KEEP, "token_exit.layer=1,2,3,4,5,6,7", *REDISTRIBUTED, "pyramid.keep=0.5,0.25"),
    ),
    Measurement("existence", "llava", 500, (*PRUNING, "outlier_tokens", *REDISTRIBUTING), (*KEEP, *REDISTRIBUTED)),
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Measure those of the given names; all where none is given."""
    wanted = list(sys.argv[1:] if argv is None else argv)
    for one in MEASUREMENTS:
        if one.task in (wanted or [each.task for each in MEASUREMENTS]) and (ZOO / "weights" / one.model).is_dir():
            print(one.command)
            if status := rewrite_main(one.arguments):
                return status
    if not wanted or "attention" in wanted:
        write_attention(RESULTS / "attention.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
