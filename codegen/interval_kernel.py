"""The kernels that carry a state, where a query sees an interval of the keys in an order of their own (`codegen.intervals`).

Chunks are cut along the places of the sorted keys, whatever lengths the segments have. Of a chunk's keys those go into its state that are
of its last key's segment, since no other goes on behind it; so the state before a chunk is of one segment, and is carried on through chunks
that this one fills. The intervals of a tile's queries may end in several chunks, which are gone through one by one: queries whose segment
begins before the chunk read the state, and all see pair by pair what of the chunk is in their interval. Tiles go through as many chunks
together as there are tiles and chunks at most, whatever the lengths are, and every size is known beforehand.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import sympy

from codegen.backward_text import indented
from codegen.kernel_reads import KernelReads, Owner
from codegen.state_kernel import StateKernels
from codegen.triton_printer import triton_text
from rewrite.ir.operations import Attend


class IntervalKernels(StateKernels):
    """The kernels of one emitted file, of any limit and any segments."""

    limited = True

    @cached_property
    def within(self) -> Attend:
        """The operation with what its mask says of a query and a key together left to the intervals."""
        return replace(self.attend, mask=sympy.And(self.form.seen_keys, self.form.seen_queries))

    def reads(self, owner: Owner) -> KernelReads:
        return KernelReads(self.within, owner)

    def orders(self, kernel: str) -> list[str]:
        return ["key_order", "query_order", "begins", "ends"] if kernel == "outputs" else ["key_order", "chunk_begins"]

    def keys_of_a_chunk(self) -> tuple[list[str], str, list[str], str]:
        chunk = [
            "    slots = tl.arange(0, BLOCK_K)",
            "    key_order += b * Nk",
            "    begin = tl.load(chunk_begins + b * chunks + chunk)  # where the segment of its last key does",
            *(["    last_key = tl.load(key_order + tl.minimum(chunk * CHUNK + CHUNK, Nk) - 1)"] if self.decays else []),
        ]
        tile = [
            "place = chunk * CHUNK + slot * BLOCK_K + slots",
            "in_keys = (place >= begin) & (place < Nk)",
            "j = tl.load(key_order + place, mask=in_keys, other=0)",
            "start, columns = 0, j.to(tl.int64)",
        ]
        return chunk, "tl.maximum(begin - chunk * CHUNK, 0) // BLOCK_K", tile, "last_key"

    def between_chunks(self, rate: str) -> tuple[list[str], list[str]]:
        before = ["    key_order += b * Nk", "    chunk_begins += b * chunks"]
        inside = ["goes_on = tl.load(chunk_begins + chunk) < chunk * CHUNK"]
        if self.decays:
            before.append("    previous = 0")
            inside += [
                "last_key = tl.load(key_order + tl.minimum(chunk * CHUNK + CHUNK, Nk) - 1)",
                f"state = state * tl.exp((previous - last_key) * ({rate}))",
                "previous = last_key",
            ]
        return before, [*inside, "state = tl.where(goes_on, state, 0.0) + own"]

    def outputs(self) -> list[str]:
        form, reads = self.form, self.reads("queries")
        names = reads.inside_names
        kinds = list(enumerate(form.features))
        exponent = f"({triton_text(form.rate, names)}) * (last_key - {self.shift} - i)[:, None]"
        decay = ["last_key = tl.load(key_order + before - 1, mask=before > 0, other=0)", f"decay = tl.exp({exponent})"]
        in_interval = "(begin[:, None] <= place[None, :]) & (place[None, :] < end[:, None])"
        keys = [
            "place = slot * BLOCK_K + slots",
            "in_keys = (place >= before) & (place < Nk)",
            "j = tl.load(key_order + place, mask=in_keys, other=0)",
            "start, columns = 0, j.to(tl.int64)",
            *self.pairs(reads, ["own[:, None] & in_keys[None, :]", in_interval]),
        ]
        part = [
            "own = left == chunk",
            "before = chunk * CHUNK",
            "",
            "# What the state gives.",
            "states = head_states + chunk.to(tl.int64) * FEATURES * DV",
            *(["sums = head_sums + chunk.to(tl.int64) * FEATURES"] if form.totals else []),
            f"seen = {self.seen_queries('(own & (begin < before))', names)}",
            *(decay if self.decays else []),
            *self.QUERY_TILE,
            *(line for place, feature in kinds for line in self.from_state(place, feature, names)),
            "",
            "# What the chunk gives itself.",
            "low = tl.maximum(tl.min(tl.where(own, begin, Nk), 0), before)",
            "high = tl.max(tl.where(own, end, 0), 0)",
            "for slot in tl.range(low // BLOCK_K, tl.cdiv(high, BLOCK_K)):",
            *indented(keys, 1),
            "",
            "left = tl.where(own, chunks, left)",
            "chunk = tl.min(left, 0)",
        ]
        return [
            *self.signature(
                "outputs",
                {"query": "bhi", "key": "bhj", "value": "bhj", "head_states": "", "head_sums": "", "out": "bhi", "lse": "bhi"},
                "H, Nq, Nk, chunks, tiles",
                "HEADS_PER_KEY: tl.constexpr, HEADS_PER_STATE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,\n"
                "FEATURES: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_Q: tl.constexpr,\n"
                "BLOCK_K: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr",
            ),
            "    # One program: BLOCK_Q queries of one head, in the order of where their keys end, some columns of their results.",
            "    program = tl.program_id(0)",
            "    h = (program // tiles % H).to(tl.int64)",
            "    b = (program // tiles // H).to(tl.int64)",
            "    slots, lanes = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D)",
            "    value_lanes = tl.program_id(1) * BLOCK_DV + tl.arange(0, BLOCK_DV)",
            "    places = program % tiles * BLOCK_Q + tl.arange(0, BLOCK_Q)",
            "    in_rows, in_width, in_value_width = places < Nq, lanes < D, value_lanes < DV",
            "    i = tl.load(query_order + b * Nq + places, mask=in_rows, other=0)",
            "    begin = tl.load(begins + b * Nq + places, mask=in_rows, other=0)",
            "    end = tl.load(ends + b * Nq + places, mask=in_rows, other=0)",
            "    first, rows = 0, i.to(tl.int64)",
            *self.queries_of_a_tile(reads, ()),
            "    key_order += b * Nk",
            "    head = (b * (H // HEADS_PER_STATE) + h // HEADS_PER_STATE) * chunks",
            "    head_states += head * FEATURES * DV",
            *(["    head_sums += head * FEATURES"] if form.totals else []),
            *self.KEYS_OF_A_HEAD,
            "    left = tl.where(begin < end, (end - 1) // CHUNK, chunks)  # the chunk in which each ends, until it is done",
            "    chunk = tl.min(left, 0)",
            "    while chunk < chunks:",
            *(f"        {line}" if line else "" for line in part),
            "",
            *self.results(reads),
        ]
