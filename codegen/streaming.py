"""Triton source for an attention operation: the streaming skeleton.

A program owns a tile of queries of one head and walks over blocks of keys, so that nothing larger than a tile of scores is ever held. How
scores become weights is `codegen.normaliser_lines`; groups of keys take two walks, see `codegen.group_walks`. Where there are few queries,
as in decoding, the keys of a tile are cut into pieces that a program each walks over, see `codegen.split_keys`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from codegen.group_walks import add_masses, group_weights, weigh, zero_masses
from codegen.kernel_reads import KernelReads
from codegen.normaliser_lines import accumulate, end, factor_lines, score_lines, start, weight_lines
from codegen.split_keys import reason_against_split
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
    """The kernel of one emitted file; `lines` puts its pieces together. name: of its function."""

    attend: Attend
    name: str

    @cached_property
    def reads(self) -> KernelReads:
        return KernelReads(self.attend)

    @cached_property
    def listed(self) -> WalkedList:
        return WalkedList(self.attend)

    @cached_property
    def splits(self) -> bool:
        """Whether several programs may share the keys of a tile."""
        return reason_against_split(self.attend) is None

    def _arguments(self) -> list[str]:
        extra = [*self.reads.ids.values(), *self.listed.operands]
        sizes = ["H", "Nq", "Nk", *self.listed.sizes, *(["pieces"] if self.splits else [])]
        result = "pbhi" if self.splits else "bhi"
        operands = {"query": "bhi", "key": "bhj", "value": "bhj", "out": result, "lse": result}
        return [
            "    query, key, value, out, lse,",
            *([f"    {', '.join(extra)},"] if extra else []),
            *(f"    {', '.join(f'{operand}_stride_{axis}' for axis in axes)}," for operand, axes in operands.items()),
            *self.reads.arguments(),
            f"    {', '.join(sizes)},",
            "    HEADS_PER_KEY: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,",
            "    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,",
        ]

    def lines(self) -> list[str]:
        attend, reads = self.attend, self.reads
        sizes = ", ".join(f'"{size}"' for size in ["Nq", "Nk", *self.listed.sizes, *(["pieces"] if self.splits else [])])
        return [
            f"@triton.jit(do_not_specialize=[{sizes}])",
            f"def {self.name}(",
            *self._arguments(),
            "):",
            f"    # One program: BLOCK_Q queries of one head{' and a piece of their keys' if self.splits else ''}.",
            "    # Large offsets are taken in int64, those inside a tile in int32.",
            "    program = tl.program_id(0)",
            *(["    piece = (program % pieces).to(tl.int64)", "    program = program // pieces"] if self.splits else []),
            "    block = program % tl.cdiv(Nq, BLOCK_Q)",
            "    h = ((program // tl.cdiv(Nq, BLOCK_Q)) % H).to(tl.int64)",
            "    b = ((program // tl.cdiv(Nq, BLOCK_Q)) // H).to(tl.int64)",
            "    first = (block * BLOCK_Q).to(tl.int64)",
            "    rows, columns = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)",
            "    lanes, value_lanes = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)",
            "    i = block * BLOCK_Q + rows",
            "    in_rows, in_width, in_value_width = i < Nq, lanes < D, value_lanes < DV",
            "",
            "    query += b * query_stride_b + h * query_stride_h + first * query_stride_i",
            "    key += b * key_stride_b + (h // HEADS_PER_KEY) * key_stride_h",
            "    value += b * value_stride_b + (h // HEADS_PER_KEY) * value_stride_h",
            "    query_rows = query + rows[:, None] * query_stride_i + lanes[None, :]",
            "    query_tile = tl.load(query_rows, mask=in_rows[:, None] & in_width[None, :], other=0.0)",
            *reads.outside_loop("rows", attend.score, attend.mask, attend.weight),
            *(f"    {line}" for line in self.listed.found),
            "",
            *start(attend),
            *zero_masses(reads),
            "    accumulator = tl.zeros([BLOCK_Q, BLOCK_DV], tl.float32)",
            "",
            *self._walks(),
            "",
            *self._end(),
        ]

    def _walks(self) -> list[str]:
        attend, groups, reads = self.attend, self.attend.groups, self.reads
        scores = [*_KEY_TILE, *score_lines(attend, reads)]
        if groups is None:
            online = attend.normaliser == "softmax"
            return self._loop([*scores, *weight_lines(attend), *factor_lines(attend, reads), *_VALUE_TILE, accumulate(online)])
        return [
            "    # First walk: the normaliser, and the mass of every group.",
            *self._loop([*scores, *weight_lines(attend), *add_masses(groups, reads)]),
            "",
            "    # What every group counts, from the masses.",
            *group_weights(groups, reads),
            "",
            "    # Second walk: the values, each weighted as its group is.",
            *self._loop([*scores, *weigh(groups, reads), *_VALUE_TILE, accumulate(rescaled=False)]),
        ]

    def _loop(self, body: list[str]) -> list[str]:
        """A walk over the keys: blocks seen in full, then blocks that the mask or the end of the keys cuts."""
        if self.listed:
            ends = [f"tl.load({self.listed.start} + 2 * block{place})" for place in ("", " + 1", " + 2")]
            start = "(tl.load(blocks + slot) * BLOCK_K).to(tl.int64)"
        else:
            ends = ["0", "Nk // BLOCK_K", "tl.cdiv(Nk, BLOCK_K)"]
            start = "tl.full((), slot * BLOCK_K, tl.int64)"
        bounds = ["begin, end = full, cut", "if CHECKED:", "    begin, end = cut, last"]
        if self.splits:
            bounds += ["begin, end = tl.maximum(begin, low), tl.minimum(end, high)"]
        # What a cut block reads of its mask goes through the pipeline too: three of them in flight spill on sm_80 at head dim 128.
        stages = ", num_stages=2 if CHECKED else None" if self.listed.by_tile else ""
        lines = [f"start = {start}", "j = start.to(tl.int32) + columns", *body]
        return [
            f"    full, cut, last = {', '.join(ends)}",
            *(["    share = tl.cdiv(last - full, pieces)", *_PIECE] if self.splits else []),
            "    for CHECKED in tl.static_range(2):  # 0: key blocks seen in full; 1: those that the mask or the end of the keys cuts",
            *(f"        {line}" for line in bounds),
            f"        for slot in tl.range(begin, end{stages}):",
            *(f"            {line}".rstrip() for line in lines),
        ]

    def _end(self) -> list[str]:
        return [
            *end(self.attend, self.reads),
            *(["    out += piece * out_stride_p", "    lse += piece * lse_stride_p"] if self.splits else []),
            "    out += b * out_stride_b + h * out_stride_h + first * out_stride_i",
            "    out_rows = out + rows[:, None] * out_stride_i + value_lanes[None, :]",
            "    tl.store(out_rows, accumulator.to(out.dtype.element_ty), mask=in_rows[:, None] & in_value_width[None, :])",
            "    tl.store(lse + b * lse_stride_b + h * lse_stride_h + first * lse_stride_i + rows * lse_stride_i, lse_tile, mask=in_rows)",
        ]


_PIECE = ["    low = full + (piece * share).to(tl.int32)", "    high = tl.minimum(low + share, last)"]

_KEY_TILE = [
    "key_rows = key + start * key_stride_j + columns[None, :] * key_stride_j + lanes[:, None]",
    "in_keys = columns >= 0",
    "if CHECKED:",
    "    in_keys = j < Nk",
    "    key_tile = tl.load(key_rows, mask=in_width[:, None] & in_keys[None, :], other=0.0)",
    "else:",
    "    key_tile = tl.load(key_rows, mask=in_width[:, None], other=0.0)",
]

_VALUE_TILE = [
    "value_rows = value + start * value_stride_j + columns[:, None] * value_stride_j + value_lanes[None, :]",
    "if CHECKED:",
    "    value_tile = tl.load(value_rows, mask=in_keys[:, None] & in_value_width[None, :], other=0.0)",
    "else:",
    "    value_tile = tl.load(value_rows, mask=in_value_width[None, :], other=0.0)",
]
