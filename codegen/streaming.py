"""Triton source for an attention operation: the streaming skeleton.

A program owns a tile of queries of one head and walks over blocks of keys, so that nothing larger than a tile of scores is ever held. How
scores become weights is `codegen.normaliser_lines`; groups of keys take two walks, see `codegen.group_walks`. Where there are few tiles, as
in decoding, programs share the key blocks of all of them: the same walk between other bounds, see `codegen.split_kernel`.

Without values, the sum of every row of scores is all that is kept: what statistics are made of, see `codegen.statistic_kernel`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from codegen.group_walks import add_masses, group_weights, weigh, zero_masses
from codegen.kernel_reads import KernelReads
from codegen.normaliser_lines import accumulate, end, factor_lines, score_lines, start, weight_lines
from codegen.walked_list import WalkedList
from codegen.weight_form import weight_factor
from rewrite.ir.operations import Attend


def reason_against(attend: Attend) -> str | None:
    """Why an operation cannot stream over the keys one head at a time, in words, or None."""
    if attend.mixes:
        return "it mixes heads, and a program of a kernel holds one head"
    if attend.renormalised:
        return "its weights are normalised again, by a sum that is known only after all keys were seen"
    if weight_factor(attend.weight) is None:
        return f"its weight {attend.weight} is not w times a factor, and w is known only after all keys were seen"
    return None


@dataclass(frozen=True)
class StreamingKernel:
    """The kernel of one emitted file; `lines` puts its pieces together.

    name: of its function. values: whether values are weighted and summed; else `lse` is the log-sum-exp of a softmax, and with any other
    normaliser the sum of the scores.
    """

    attend: Attend
    name: str
    values: bool = True

    @cached_property
    def reads(self) -> KernelReads:
        return KernelReads(self.attend)

    @cached_property
    def listed(self) -> WalkedList:
        return WalkedList(self.attend)

    def signature(self, name: str, operands: Sequence[str], strided: Mapping[str, str], sizes: Sequence[str], constants: str) -> list[str]:
        """The head of a function of the file. strided: operand -> its axes; sizes: numbers that change from launch to launch."""
        return [
            f"@triton.jit(do_not_specialize=[{', '.join(f'{chr(34)}{size}{chr(34)}' for size in sizes)}])",
            f"def {name}(",
            f"    {', '.join([*operands, *self.reads.ids.values()])},",
            *(f"    {', '.join(f'{operand}_stride_{axis}' for axis in axes)}," for operand, axes in strided.items()),
            *self.reads.arguments(),
            f"    H, {', '.join(sizes)},",
            *constants.splitlines(),
            "):",
        ]

    def strides(self, *operands: str) -> dict[str, str]:
        """The axes of those of these operands that the kernel has."""
        axes = {"query": "bhi", "key": "bhj", "value": "bhj", "out": "bhi", "lse": "bhi"}
        return {operand: axes[operand] for operand in operands if self.values or operand not in ("value", "out")}

    def lines(self) -> list[str]:
        strided = self.strides("query", "key", "value", "out", "lse")
        operands, sizes = [*strided, *self.listed.operands], ["Nq", "Nk", *self.listed.sizes]
        return [
            *self.signature(self.name, operands, strided, sizes, CONSTANTS if self.values else SUM_CONSTANTS),
            "    # One program: BLOCK_Q queries of one head. Large offsets are taken in int64, those inside a tile in int32.",
            "    tile = tl.program_id(0)",
            *self.lanes(),
            *PLACE,
            "",
            *self.queries(),
            *(f"    {line}" for line in self.listed.found),
            "",
            *self._begin(),
            "",
            *self._walks(),
            "",
            *end(self.attend, self.reads, self.values),
            *self.results(),
        ]

    def lanes(self) -> list[str]:
        return [
            "    rows, columns = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)",
            "    lanes = tl.arange(0, BLOCK_D)",
            "    in_width = lanes < D",
            *(VALUE_LANES if self.values else []),
        ]

    def queries(self) -> list[str]:
        """The tile of queries, and what is read by query."""
        return [
            "    query_head = query + b * query_stride_b + h * query_stride_h + first * query_stride_i",
            "    key_head = key + b * key_stride_b + (h // HEADS_PER_KEY) * key_stride_h",
            *(["    value_head = value + b * value_stride_b + (h // HEADS_PER_KEY) * value_stride_h"] if self.values else []),
            "    query_rows = query_head + rows[:, None] * query_stride_i + lanes[None, :]",
            "    query_tile = tl.load(query_rows, mask=in_rows[:, None] & in_width[None, :], other=0.0)",
            *self.reads.outside_loop("rows", self.attend.score, self.attend.mask, self.attend.weight),
        ]

    def _begin(self) -> list[str]:
        accumulator = ["    accumulator = tl.zeros([BLOCK_Q, BLOCK_DV], tl.float32)"] if self.values else []
        return [*start(self.attend, self.values), *zero_masses(self.reads), *accumulator]

    def scores(self) -> list[str]:
        """The scores of one block of keys."""
        return [*_KEY_TILE, *score_lines(self.attend, self.reads)]

    def weights(self) -> list[str]:
        """Those of one block of keys, in a walk that gathers what divides them."""
        return [*self.scores(), *weight_lines(self.attend, self.values), *factor_lines(self.attend, self.reads)]

    def _walks(self) -> list[str]:
        groups, reads = self.attend.groups, self.reads
        if groups is None:
            values = [*VALUE_TILE, accumulate(self.attend.normaliser == "softmax")] if self.values else []
            return self.loop([*self.weights(), *values])
        return [
            "    # First walk: the normaliser, and the mass of every group.",
            *self.loop([*self.weights(), *add_masses(groups, reads)]),
            "",
            "    # What every group counts, from the masses.",
            *group_weights(groups, reads),
            "",
            "    # Second walk: the values, each weighted as its group is.",
            *self.loop([*self.scores(), *weigh(groups, reads), *VALUE_TILE, accumulate(rescaled=False)]),
        ]

    def loop(self, body: Sequence[str], bounds: Sequence[str] = (), listed: bool = True) -> list[str]:
        """A walk over the keys: blocks seen in full, then blocks that the mask or the end of the keys cuts.

        bounds: lines that move `begin` and `end`, made of `full` and `last`, the first block of the tile and the one behind its last.
        listed: whether the list is walked, if the kernel has one; else every block, looked at pair by pair.
        """
        if self.listed and listed:
            ends = [f"tl.load({self.listed.start} + 2 * block{place})" for place in ("", " + 1", " + 2")]
            start = "(tl.load(blocks + slot) * BLOCK_K).to(tl.int64)"
        else:
            ends = ["0", "0" if self.listed else "Nk // BLOCK_K", "tl.cdiv(Nk, BLOCK_K)"]
            start = "tl.full((), slot * BLOCK_K, tl.int64)"
        # What a cut block reads of its mask goes through the pipeline too: three of them in flight spill on sm_80 at head dim 128.
        stages = ", num_stages=2 if CHECKED else None" if self.listed.by_tile else ""
        lines = [f"start = {start}", "j = start.to(tl.int32) + columns", *body]
        return [
            f"    full, cut, last = {', '.join(ends)}",
            "    for CHECKED in tl.static_range(2):  # 0: key blocks seen in full; 1: those that the mask or the end of the keys cuts",
            *(f"        {line}" for line in ["begin, end = full, cut", "if CHECKED:", "    begin, end = cut, last", *bounds]),
            f"        for slot in tl.range(begin, end{stages}):",
            *(f"            {line}".rstrip() for line in lines),
        ]

    def constants(self, warps: str = "tile.warps") -> list[str]:
        """The arguments of a launch that `CONSTANTS` names, and how it is run."""
        value, block_value = (" DV=DV,", " BLOCK_DV=power_of_two(DV),") if self.values else ("", "")
        return [
            f"        HEADS_PER_KEY=H // key.shape[1], D=D,{value} BLOCK_D=power_of_two(D),{block_value}",
            "        BLOCK_Q=tile.block_q, BLOCK_K=tile.block_k, PRECISION=dot_precision(query.dtype),",
            f"        num_warps={warps}, num_stages=tile.stages,",
        ]

    def results(self) -> list[str]:
        return [
            *(_OUT if self.values else []),
            "    tl.store(lse + b * lse_stride_b + h * lse_stride_h + first * lse_stride_i + rows * lse_stride_i, lse_tile, mask=in_rows)",
        ]


CONSTANTS = """\
    HEADS_PER_KEY: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,"""

SUM_CONSTANTS = """\
    HEADS_PER_KEY: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,"""

# Where a tile lies.
PLACE = [
    "    block = tile % tl.cdiv(Nq, BLOCK_Q)",
    "    h = ((tile // tl.cdiv(Nq, BLOCK_Q)) % H).to(tl.int64)",
    "    b = ((tile // tl.cdiv(Nq, BLOCK_Q)) // H).to(tl.int64)",
    "    first = (block * BLOCK_Q).to(tl.int64)",
    "    i = block * BLOCK_Q + rows",
    "    in_rows = i < Nq",
]

VALUE_LANES = ["    value_lanes = tl.arange(0, BLOCK_DV)", "    in_value_width = value_lanes < DV"]

_KEY_TILE = [
    "key_rows = key_head + start * key_stride_j + columns[None, :] * key_stride_j + lanes[:, None]",
    "in_keys = columns >= 0",
    "if CHECKED:",
    "    in_keys = j < Nk",
    "    key_tile = tl.load(key_rows, mask=in_width[:, None] & in_keys[None, :], other=0.0)",
    "else:",
    "    key_tile = tl.load(key_rows, mask=in_width[:, None], other=0.0)",
]

VALUE_TILE = [
    "value_rows = value_head + start * value_stride_j + columns[:, None] * value_stride_j + value_lanes[None, :]",
    "if CHECKED:",
    "    value_tile = tl.load(value_rows, mask=in_keys[:, None] & in_value_width[None, :], other=0.0)",
    "else:",
    "    value_tile = tl.load(value_rows, mask=in_value_width[None, :], other=0.0)",
]

_OUT = [
    "    out += b * out_stride_b + h * out_stride_h + first * out_stride_i",
    "    out_rows = out + rows[:, None] * out_stride_i + value_lanes[None, :]",
    "    tl.store(out_rows, accumulator.to(out.dtype.element_ty), mask=in_rows[:, None] & in_value_width[None, :])",
]
