"""Writes docs/passes.md from the registry of passes:  python docs/write_passes.py  (or ``make docs``).

What a pass says of the sites it meets is asked of the pass itself, on the sites that its tests are generated from.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "passes"))

from synthetic_sites import SITES

from rewrite.ir import PHASES, Fits, Pass, Program, available_passes

PAGE = Path(__file__).parents[1] / "docs" / "passes.md"
# Written by benchmarks/linear_cpu.py.
MEASURED = Path(__file__).parents[1] / "benchmarks" / "results" / "linear_cpu.md"


def page() -> str:
    """The text of docs/passes.md."""
    passes = [cls for cls in available_passes() if cls.__module__.startswith("passes.")]
    lines = ["# Passes", "", "Written by `make docs` from the registry of passes; `python -m rewrite pass NAME` shows one.", ""]
    lines += ["Passes run in this order of families, whatever order they are asked in:", ""]
    lines += [f"{number}. {', '.join(sorted(families))}" for number, families in enumerate(PHASES, 1)]
    lines += ["", "| pass | family | training-free | what it computes |", "|---|---|---|---|"]
    lines += [f"| [`{c.name}`](#{c.name}) | {c.family} | {'yes' if c.training_free else 'no'} | {_cell(_summary(c))} |" for c in passes]
    for cls in passes:
        lines += ["", *_section(cls)]
    return "\n".join(lines) + "\n"


def _summary(cls: type[Pass]) -> str:
    """The first line of the file that the method has to itself."""
    return (inspect.getdoc(sys.modules[cls.__module__]) or "").split("\n\n")[0]


def _pays(name: str) -> str:
    """From which length on a pass was measured to be faster, by setting and kind of site; empty where it was not measured."""
    found, kind = [], ""
    for line in MEASURED.read_text().splitlines():
        if line.startswith("## "):
            kind = line[3:].split(",")[0].lower()
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0].split("(")[0] == name and len(cells) > 3:
            pays = cells[-2] if cells[-2].endswith("tokens") else "no length that was tried"
            found.append(f"{kind}, `{cells[0]}` from {pays}" if pays[0].isdigit() else f"{kind}, `{cells[0]}` at {pays}")
    return "; ".join(found)


def _section(cls: type[Pass]) -> Iterator[str]:
    yield f"## {cls.name}"
    yield ""
    yield from (_summary(cls), "", inspect.getdoc(cls) or "", "")
    yield f"- Formula: `{cls.formula}`"
    yield f"- Paper: {cls.paper}"
    identity = cls.identity()
    yield f"- Changes nothing at: {'no setting' if identity is None else f'`{identity}`'}"
    yield f"- Fits: {_fits(cls.fits)}"
    pays = _pays(cls.name)
    if pays:
        yield f"- Faster than PyTorch's fused attention on a CPU: {pays} ([measured](../benchmarks/results/linear_cpu.md))"
    if cls.excludes:
        yield f"- Not together with: {', '.join(f'`{name}`' for name in cls.excludes)}"
    yield ""
    yield from ["| parameter | default | meaning |", "|---|---|---|"]
    yield from (f"| `{field.name}` | `{field.default!r}` | {_cell(field.metadata.get('help', ''))} |" for field in cls.parameters())
    yield ""
    declined = _declined(cls)
    if declined:
        yield f"What `{cls()}` says of the sites that its tests are generated from and that it leaves alone:"
        yield ""
        yield from (f"- {'; '.join(cases)}: {reason}" for reason, cases in declined.items())


def _fits(fits: Fits) -> str:
    """The facts of a `Fits` in words."""
    causal = {None: "causal or not", True: "causal", False: "not causal"}[fits.causal]
    needs = [
        *(["a 2-D grid of tokens"] if fits.grid else []),
        *(["visual tokens among its keys"] if fits.visual else []),
        *(["the hidden states that enter its layer"] if fits.hidden else []),
    ]
    text = f"{' or '.join(sorted(fits.kinds))}-attention, {causal}{', with ' + ' and '.join(needs) if needs else ''}"
    text += "" if fits.cached else ", without a KV cache"
    text += ", with a KV cache of fixed length (a static cache) too" if fits.fixed else ""
    return text + (
        "; also sites beyond plain softmax attention" if fits.unusual else "; plain softmax attention, masks and biases included"
    )


def _declined(cls: type[Pass]) -> dict[str, list[str]]:
    """Reason -> the kinds of sites that the pass, as it is by default, leaves alone for it."""
    reasons: dict[str, list[str]] = {}
    for case, site in SITES.items():
        for _, _, reason in cls().apply(Program((site,))).declined:
            reasons.setdefault(_cell(reason), []).append(case)
    return reasons


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "/")


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"written to {PAGE}")
