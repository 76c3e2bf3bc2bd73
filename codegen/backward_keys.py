"""The backward kernel whose programs own keys: their gradients, those of the values, and those of tensors that are read by key.

A program walks over the queries of its block of keys, for one after the other of the query heads that share its key head, so that all sums
stay in registers and have one order. Tiles stand [keys, queries].
"""

from __future__ import annotations

from codegen.backward_block import BackwardBlock, row_facts
from codegen.backward_text import QUERY_TILES, indented, signature, walk
from codegen.base_two import LOG2_E
from codegen.triton_printer import triton_text
from codegen.walked_list import WalkedList
from rewrite.ir.expression import letters
from rewrite.ir.operations import Attend


class KeysKernel:
    """The kernel `name`; `lines` is its text, `operands` and `strided` what it is launched with."""

    def __init__(self, attend: Attend, name: str) -> None:
        self.attend, self.name = attend, name
        self.block = BackwardBlock(attend, "keys")
        self.reads = self.block.reads
        self.listed = WalkedList(attend)
        self.row_facts = row_facts(attend)
        # Of the other tensors nothing is summed by key.
        self.gradients = {
            name: gradient for name, gradient in self.block.gradients.items() if "j" in (letters(attend.tensors()[name]) or "")
        }

    def operands(self) -> list[str]:
        """Pointers, in order."""
        known = ["lse"] if self.attend.normaliser == "softmax" else []
        facts = [f"row_{fact}" for fact in self.row_facts]
        return [
            "query",
            "key",
            "value",
            "d_out",
            *known,
            *facts,
            "d_key",
            "d_value",
            *self.reads.ids.values(),
            *self.gradients.values(),
            *self.listed.operands,
        ]

    def strided(self) -> dict[str, str]:
        """Operands addressed by strides: name -> axes. The others are contiguous."""
        return {"query": "bhi", "key": "bhj", "value": "bhj", "d_out": "bhi"}

    def lines(self) -> list[str]:
        ways = [f"{gradient}_by" for gradient in self.gradients.values()]
        head = signature(self.name, self.operands(), self.strided(), self.reads.arguments(), ["H", "Nq", "Nk"], ways, self.listed)
        return [*head, *indented([*_SETUP, *indented(self._of_one_head()), "", *self._end()])]

    def _of_one_head(self) -> list[str]:
        block = self.block
        body = [
            *QUERY_TILES,
            *self._known(),
            *block.scores(),
            "",
            *block.weights(),
            *block.factors(),
            f"d_value_tile = tl.dot({block.counted}.to(d_out_tile.dtype), d_out_tile, d_value_tile, input_precision=PRECISION)",
            *block.score_gradients(),
            *block.dot_gradients(),
            "d_key_tile = tl.dot(d_dot.to(query_tile.dtype), query_tile, d_key_tile, input_precision=PRECISION)",
        ]
        for name, gradient in self.gradients.items():
            change = block.change(name)
            body += [] if change is None else [f'if {gradient}_by == "keys":', f"    {gradient}_keys += tl.sum({change}, 1)"]
        lines = [
            "h = (hk * HEADS_PER_KEY + member).to(tl.int64)",
            "row = (b * H + h) * Nq",
            "query_head = query + b * query_stride_b + h * query_stride_h",
            "d_out_head = d_out + b * d_out_stride_b + h * d_out_stride_h",
            *block.read_before(),
            *self.listed.found,
            *(f"{gradient}_keys = tl.zeros([BLOCK_K], tl.float32)" for gradient in self.gradients.values()),
            *walk("keys", self.listed, body),
        ]
        for gradient in self.gradients.values():
            store = f"tl.store({gradient} + (b * H + h) * Nk + start + columns, {gradient}_keys, mask=in_keys)"
            lines += [f'if {gradient}_by == "keys":', f"    {store}"]
        return lines

    def _known(self) -> list[str]:
        """What the kernel that owns queries left of each query."""
        facts = [f"{fact} = tl.load(row_{fact} + row + first + rows, mask=in_rows, other=0.0)" for fact in self.row_facts]
        if self.attend.normaliser != "softmax":
            return facts
        return [
            *facts,
            "lse_rows = tl.load(lse + row + first + rows, mask=in_rows, other=0.0)",
            f'shift = tl.where(lse_rows == float("-inf"), 0.0, lse_rows * {LOG2_E!r})  # a row that sees no key',
        ]

    def _end(self) -> list[str]:
        slope = self.block.slope
        return [
            *([f"d_key_tile *= {triton_text(slope, {})}"] if slope.is_number else []),
            "keys = (b * (H // HEADS_PER_KEY) + hk) * Nk + start",
            "d_key_rows = d_key + keys * D + columns[:, None] * D + lanes[None, :]",
            "tl.store(d_key_rows, d_key_tile.to(d_key.dtype.element_ty), mask=in_keys[:, None] & in_width[None, :])",
            "d_value_rows = d_value + keys * DV + columns[:, None] * DV + value_lanes[None, :]",
            "tl.store(d_value_rows, d_value_tile.to(d_value.dtype.element_ty), mask=in_keys[:, None] & in_value_width[None, :])",
        ]


def _own_tile(name: str, lanes: str, in_width: str) -> list[str]:
    return [
        f"{name}_rows = {name} + b * {name}_stride_b + hk * {name}_stride_h + start * {name}_stride_j",
        f"{name}_rows += columns[:, None] * {name}_stride_j + {lanes}[None, :]",
        f"{name}_tile = tl.load({name}_rows, mask=in_keys[:, None] & {in_width}[None, :], other=0.0)",
    ]


_SETUP = [
    "# One program: BLOCK_K keys of one key head. Large offsets are taken in int64, those inside a tile in int32.",
    "program = tl.program_id(0)",
    "block = program % tl.cdiv(Nk, BLOCK_K)",
    "hk = ((program // tl.cdiv(Nk, BLOCK_K)) % (H // HEADS_PER_KEY)).to(tl.int64)",
    "b = ((program // tl.cdiv(Nk, BLOCK_K)) // (H // HEADS_PER_KEY)).to(tl.int64)",
    "start = (block * BLOCK_K).to(tl.int64)",
    "rows, columns = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)",
    "lanes, value_lanes = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)",
    "j = block * BLOCK_K + columns",
    "in_keys, in_width, in_value_width = j < Nk, lanes < D, value_lanes < DV",
    "",
    *_own_tile("key", "lanes", "in_width"),
    *_own_tile("value", "value_lanes", "in_value_width"),
    "d_key_tile = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)",
    "d_value_tile = tl.zeros([BLOCK_K, BLOCK_DV], tl.float32)",
    "for member in tl.range(0, HEADS_PER_KEY):  # the query heads that share the key head",
]
