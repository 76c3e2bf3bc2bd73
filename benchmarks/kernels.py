"""What the emitted kernels use, compiled ahead of time without a GPU: registers, spills, shared memory, tensor cores, instructions.

    python -m benchmarks.kernels

Writes docs/kernels.md: every variant at head dims 64 and 128 in bfloat16, forward and backward, for sm_80 and sm_90. *Loop* counts the
machine instructions of the walk over blocks that the mask does not cut, as a ratio to the plain softmax kernel's of the same head dim and
target; tiles differ where a variant has one of its own, so that the ratio is per pair of query and key.
"""

from __future__ import annotations

import datetime
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import torch
from rich.progress import track

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "codegen"))

import attention_forms as forms

from codegen import TARGETS as CAPABILITIES
from codegen import CompiledKernel, emit, emit_backward, has_triton_backward
from codegen.backward_block import crowding
from codegen.kernel_reads import gathers
from codegen.received_kernel import LSE, WIDTH, exchanged
from codegen.tiles import Tile, backward_tiles, tile_for
from rewrite.ir import Attend
from rewrite.ir.statistic import Statistic

PAGE = Path(__file__).parents[1] / "docs" / "kernels.md"
HEAD_DIMS, TARGETS = (64, 128), ("sm_80", "sm_90")
STATISTIC = "statistic: received"
VARIANTS: dict[str, Attend] = {
    "plain": forms.plain(),
    "causal": forms.causal(),
    "bias [h, i, j]": forms.biased("hij"),
    "mask [b, i, j]": forms.masked("bij"),
    "packed sequences": forms.packed(),
    "soft-cap, causal": forms.softcap(),
    "window 7 x 7 of 32 x 32": forms.neighbourhood_2d(32, 32, 7),
    "decomposed position": forms.decomposed_position(32),
    "sink logits, causal": forms.sinks("h"),
    "groups of keys, causal": forms.grouped(),
    "sigmoid": forms.flash_sigmoid(),
    "ReLU over its sum": forms.rectified(),
    "temperature by row": forms.row_temperature(),
    "gate [h]": forms.gated("h"),
    STATISTIC: exchanged(Statistic("received", forms.plain())).attend,
}
# A line of machine code: its address and what stands there.
_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?);")
_TENSOR_CORE = ("HMMA", "HGMMA")


def walk_of(compiled: CompiledKernel) -> int:
    """Machine instructions of the first loop that multiplies matrices: the walk over blocks that are seen in full."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.cubin)
        file.flush()
        said = subprocess.run([knobs.nvidia.cuobjdump.path, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    lines = [(int(found[1], 16), found[2]) for found in map(_LINE.search, said.splitlines()) if found]
    loops = []
    for address, text in lines:
        branch = re.search(r"\bBRA 0x([0-9a-f]+)", text)
        if branch and int(branch[1], 16) < address:
            inside = [each for place, each in lines if int(branch[1], 16) <= place <= address]
            if any(unit in each for each in inside for unit in _TENSOR_CORE):
                loops.append(len(inside))
    return loops[0] if loops else 0


def kernels(attend: Attend, head_dim: int, target: str) -> Iterator[tuple[str, CompiledKernel, Tile]]:
    """(which, compiled, its tile) of the forward, and of both backward kernels where there are any."""
    # The statistic's kernel has a column of signs for values, and the attention's own log-sum-exp, which is float32.
    value_dim, types = (WIDTH, {LSE: torch.float32}) if attend == VARIANTS[STATISTIC] else (head_dim, {})
    yield (
        "forward",
        emit(attend).compile(target, torch.bfloat16, head_dim, value_dim, types),
        tile_for(head_dim, value_dim, 2, CAPABILITIES[target], gathers=gathers(attend)),
    )
    # A statistic's gradients are torch operators: the backward of its exchanged attention is never called.
    if attend != VARIANTS[STATISTIC] and has_triton_backward(attend) is None:
        tiles = backward_tiles(head_dim, head_dim, 2, crowding(attend), CAPABILITIES[target])
        for owner, compiled in emit_backward(attend).compile(target, torch.bfloat16, head_dim).items():
            yield f"backward, {owner}", compiled, getattr(tiles, owner)


def page() -> str:
    """The text of docs/kernels.md."""
    lines = [
        "# Kernels", "",
        f"Written by `python -m benchmarks.kernels` on {datetime.date.today()}: triton {version('triton')}, bfloat16, compiled ahead of "
        "time; no GPU was at hand. Registers and spills (bytes) are per thread, shared memory is in KiB per program; *loop* is the number "
        "of machine instructions per pair of query and key in the walk over uncut blocks, relative to the plain kernel of the same kind.",
    ]  # fmt: skip
    plain: dict[tuple[str, int, str], float] = {}
    for target in TARGETS:
        for head_dim in HEAD_DIMS:
            lines += ["", f"## {target}, head dim {head_dim}", ""]
            lines += ["| variant | kernel | registers | spills | shared | wgmma | loop |", "|---|---|---:|---:|---:|---|---:|"]
            for name, attend in track(VARIANTS.items(), f"{target}, {head_dim}"):
                for which, compiled, tile in kernels(attend, head_dim, target):
                    per_pair = walk_of(compiled) * tile.warps / (tile.block_q * tile.block_k)
                    base = plain.setdefault((which, head_dim, target), per_pair)
                    lines.append(
                        f"| {name} | {which} | {compiled.registers} | {compiled.spills} | {compiled.shared_memory / 1024:.0f} | "
                        f"{'yes' if 'wgmma' in compiled.ptx else 'no'} | {per_pair / base:.2f} |"
                    )
    without = {name: reason for name, attend in VARIANTS.items() if (reason := has_triton_backward(attend))}
    lines += ["", "## Without a backward kernel", "", *[f"- {name}: {reason}" for name, reason in without.items()]]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"written to {PAGE}")
