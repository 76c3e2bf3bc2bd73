"""The backward kernel whose programs own queries: their gradients, and those of tensors that are read by query or by pair.

A program walks over the keys of its block of queries, as forward does, and sums the gradient of the queries in registers. Of a tensor read
by query it sums over the keys it walks over. Of a tensor read by pair every cell belongs to one program, which writes it; where the tensor
is the same for several batches or heads, these are taken in turns, a launch each, and a later one adds to what an earlier one wrote
(`codegen.backward_sums`): no two programs of a launch meet in a cell, so that every sum has one order. (A loop over them in the program
would cost some ninety registers.) A program leaves what the kernel that owns keys needs to know of each query.
"""

from __future__ import annotations

import sympy

from codegen.backward_block import BackwardBlock, read_of, row_facts
from codegen.backward_groups import add_sums, group_changes, group_weights, zero_sums
from codegen.backward_text import KEY_TILES, indented, signature, walk
from codegen.base_two import LOG2_E
from codegen.tensor_reads import derivative
from codegen.triton_printer import triton_text
from codegen.walked_list import WalkedList
from rewrite.ir.expression import TOTAL, letters
from rewrite.ir.operations import Attend, Groups


class QueriesKernel:
    """The kernel `name`; `lines` is its text, `arguments` and `given` what it is launched with."""

    def __init__(self, attend: Attend, name: str) -> None:
        self.attend, self.name = attend, name
        self.block = BackwardBlock(attend, "queries")
        self.reads = self.block.reads
        self.listed = WalkedList(attend)
        self.row_facts = row_facts(attend)

    def by_pair(self, name: str) -> bool:
        """Whether the tensor may be read by pair, and its gradient written cell by cell."""
        return {"i", "j"} <= set(letters(self.attend.tensors()[name]) or "")

    @property
    def takes_turns(self) -> bool:
        """Whether there may be several launches: only cells of a tensor read by pair ask for it."""
        return any(self.by_pair(name) for name in self.block.gradients)

    @property
    def reads_out(self) -> bool:
        """Whether sum_j weight d_weight is read off the output."""
        return self.attend.normaliser != "none" and self.attend.groups is None

    def operands(self) -> list[str]:
        """Pointers, in order."""
        known = {"softmax": ["lse", "d_lse"], "sum": ["d_lse"], "none": []}[self.attend.normaliser]
        known += ["out"] if self.reads_out else []
        tensors = [*self.reads.ids.values(), *self.block.gradients.values()]
        return [
            "query",
            "key",
            "value",
            "d_out",
            *known,
            "d_query",
            *(f"row_{fact}" for fact in self.row_facts),
            *tensors,
            *self.listed.operands,
        ]

    def strided(self) -> dict[str, str]:
        """Operands addressed by strides: name -> axes. The others are contiguous."""
        out = {"out": "bhi"} if self.reads_out else {}
        return {"query": "bhi", "key": "bhj", "value": "bhj", "d_out": "bhi", **out}

    def sums(self) -> list[str]:
        """What says how each tensor's gradient is summed: runtime arguments."""
        by_pair = [gradient for name, gradient in self.block.gradients.items() if self.by_pair(name)]
        return [f"{gradient}_{what}" for gradient in by_pair for what in ("stride_i", "every_b", "every_h")]

    def turns(self) -> list[str]:
        return ["TURNS_B", "TURNS_H", "turn_b", "turn_h"] if self.takes_turns else []

    def lines(self) -> list[str]:
        setup = [
            "# One program: BLOCK_Q queries of one head. Large offsets are taken in int64, those inside a tile in int32.",
            "program = tl.program_id(0)",
            "block = program % tl.cdiv(Nq, BLOCK_Q)",
            "first = (block * BLOCK_Q).to(tl.int64)",
            "rows, columns = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)",
            "lanes, value_lanes = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)",
            "i = block * BLOCK_Q + rows",
            "in_rows, in_width, in_value_width = i < Nq, lanes < D, value_lanes < DV",
        ]
        if self.takes_turns:
            place = [
                "# Batches and heads that share cells are taken in turns, a launch each: of TURNS_B and TURNS_H the one whose turn it is.",
                "heads = tl.cdiv(H - turn_h, TURNS_H)",
                "h = (((program // tl.cdiv(Nq, BLOCK_Q)) % heads) * TURNS_H + turn_h).to(tl.int64)",
                "b = (((program // tl.cdiv(Nq, BLOCK_Q)) // heads) * TURNS_B + turn_b).to(tl.int64)",
            ]
        else:
            place = [
                "h = ((program // tl.cdiv(Nq, BLOCK_Q)) % H).to(tl.int64)",
                "b = ((program // tl.cdiv(Nq, BLOCK_Q)) // H).to(tl.int64)",
            ]
        tensors = [*self.reads.arguments(), *([f"    {', '.join(self.sums())},"] if self.sums() else [])]
        how = [f"{gradient}_by" for gradient in self.block.gradients.values()]
        sizes = ["H", "Nq", "Nk", *self.turns()]
        head = signature(self.name, self.operands(), self.strided(), tensors, sizes, how, self.listed)
        return [*head, *indented([*setup, *place, *self._head()])]

    def _head(self) -> list[str]:
        """Everything once b and h are known."""
        block = self.block
        body = [*KEY_TILES, *block.scores(), "", *block.weights(), *block.factors(), *block.score_gradients(), *block.dot_gradients()]
        body.append("d_query_tile = tl.dot(d_dot.to(key_tile.dtype), key_tile, d_query_tile, input_precision=PRECISION)")
        for name in block.gradients:
            body += self._gather(name)
        starts = [f"{gradient}_rows = tl.zeros([BLOCK_Q], tl.float32)" for gradient in block.gradients.values()]
        return [
            "row = (b * H + h) * Nq + first",
            "key_head = key + b * key_stride_b + (h // HEADS_PER_KEY) * key_stride_h",
            "value_head = value + b * value_stride_b + (h // HEADS_PER_KEY) * value_stride_h",
            *_load_rows("query", "lanes", "in_width"),
            *_load_rows("d_out", "value_lanes", "in_value_width"),
            *block.read_before(),
            *self.listed.found,
            *starts,
            *self._known(),
            "",
            "d_query_tile = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)",
            *self._walk(body),
            "",
            *self._end(),
        ]

    def _walk(self, body: list[str]) -> list[str]:
        return walk("queries", self.listed, body)

    def _known(self) -> list[str]:
        """What has to be known of a query before its pairs: shift, share, delta."""
        normaliser = self.attend.normaliser
        if normaliser == "none":
            return []
        counted = [
            *_load_rows("out", "value_lanes", "in_value_width"),
            "counted = tl.sum(out_tile.to(tl.float32) * d_out_tile.to(tl.float32), 1)  # sum_j weight d_weight",
            "d_lse_rows = tl.load(d_lse + row + rows, mask=in_rows, other=0.0)",
        ]
        if self.attend.groups is not None:
            counted = [*self._of_groups(self.attend.groups), counted[-1]]
        if normaliser == "softmax":
            return [
                "lse_rows = tl.load(lse + row + rows, mask=in_rows, other=0.0)",
                f'shift = tl.where(lse_rows == float("-inf"), 0.0, lse_rows * {LOG2_E!r})  # a row that sees no key',
                *counted,
                "delta = counted - d_lse_rows",
                *self._leave(),
            ]
        names = {**self.reads.end_names, "total": "row_sum"}
        slope = sympy.sympify(derivative(self.attend.denominator, TOTAL))
        times = "" if slope == 1 else f" * ({triton_text(slope, names)})"
        return [
            "",
            "# First walk: the sum that the scores were divided by.",
            "row_sum = tl.zeros([BLOCK_Q], tl.float32)",
            *self._walk([*KEY_TILES, *self.block.scores(), "row_sum += tl.sum(score, 1)"]),
            "",
            f"total = {triton_text(self.attend.denominator, names)} + tl.zeros([BLOCK_Q], tl.float32)",
            "share = tl.where(total != 0, 1.0 / tl.where(total != 0, total, 1.0), 0.0)",
            *counted,
            f"delta = counted * share{times} - tl.where(row_sum > 0, d_lse_rows / tl.where(row_sum > 0, row_sum, 1.0), 0.0)",
            *self._leave(),
        ]

    def _of_groups(self, groups: Groups) -> list[str]:
        """The first walk, and what follows from it: the groups' weights, and counted."""
        block, reads = self.block, self.reads
        lines = [
            "",
            "# First walk: the masses of the groups, and what their weights receive.",
            *zero_sums(reads),
            *self._walk([*KEY_TILES, *block.scores(), *block.weights(), *block.weight_gradients(), *add_sums(groups, reads)]),
            "",
            *group_weights(groups, reads),
        ]
        for name, gradient in block.gradients.items():
            lines += group_changes(groups, reads, read_of(name, self.attend.tensors()[name]), gradient)
        return lines

    def _leave(self) -> list[str]:
        return [f"tl.store(row_{fact} + row + rows, {fact}, mask=in_rows)" for fact in self.row_facts]

    def _gather(self, name: str) -> list[str]:
        """In the walk: what the tile gives to a tensor."""
        change, gradient = self.block.change(name), self.block.gradients[name]
        if change is None:
            return []
        rows = [f'if {gradient}_by == "rows":', f"    {gradient}_rows += tl.sum({change}, 1)"]
        if not self.by_pair(name):
            return rows
        return [
            f'if ({gradient}_by == "pairs") | ({gradient}_by == "turns"):',
            f"    shared = (b // {gradient}_every_b) * tl.cdiv(H, {gradient}_every_h) + h // {gradient}_every_h",
            f"    cells = {gradient} + (shared * Nq + first) * {gradient}_stride_i + start",
            f"    cells += rows[:, None] * {gradient}_stride_i + columns[None, :]",
            "    inside = in_rows[:, None] & in_keys[None, :]",
            f"    change = {change}",
            f'    if {gradient}_by == "turns":',
            f"        again = (b % {gradient}_every_b != 0) | (h % {gradient}_every_h != 0)",
            "        change += tl.load(cells, mask=inside & again, other=0.0)",
            f"    tl.store(cells, change.to({gradient}.dtype.element_ty), mask=inside)",
            *rows,
        ]

    def _end(self) -> list[str]:
        slope = self.block.slope
        scaled = [f"d_query_tile *= {triton_text(slope, {})}"] if slope.is_number else []
        lines = [
            *scaled,
            "d_query_rows = d_query + row * D + rows[:, None] * D + lanes[None, :]",
            "tl.store(d_query_rows, d_query_tile.to(d_query.dtype.element_ty), mask=in_rows[:, None] & in_width[None, :])",
            *self._sink(),
        ]
        for gradient in self.block.gradients.values():
            lines += [f'if {gradient}_by == "rows":', f"    tl.store({gradient} + row + rows, {gradient}_rows, mask=in_rows)"]
        return lines

    def _sink(self) -> list[str]:
        """The sink's logit gets  exp(sink - lse) (d_lse - c), and its tensors their part of it."""
        sink = self.attend.sink
        if sink is None:
            return []
        names = self.reads.end_names
        lines = []
        for name, gradient in self.block.gradients.items():
            slope = sympy.sympify(derivative(sink, read_of(name, self.attend.tensors()[name])))
            if slope != 0:
                times = "" if slope == 1 else f" * ({triton_text(slope, names)})"
                lines.append(f"{gradient}_rows += d_sink{times}")
        if not lines:
            return []
        return [
            *(line.removeprefix("    ") for line in self.reads.outside_loop("end", sink)),
            f"sink = {triton_text(sympy.Float(LOG2_E) * sink, names)} + tl.zeros([BLOCK_Q], tl.float32)",
            'd_sink = tl.where(lse_rows == float("-inf"), 0.0, -tl.exp2(sink - shift) * delta)',
            *lines,
        ]


def _load_rows(name: str, lanes: str, inside: str) -> list[str]:
    return [
        f"{name}_rows = {name} + b * {name}_stride_b + h * {name}_stride_h + first * {name}_stride_i",
        f"{name}_rows += rows[:, None] * {name}_stride_i + {lanes}[None, :]",
        f"{name}_tile = tl.load({name}_rows, mask=in_rows[:, None] & {inside}[None, :], other=0.0)",
    ]
