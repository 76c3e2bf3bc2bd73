"""Triton source for linear attention through its state: three kernels, each parallel over what the others leave sequential.

`states` sums a chunk of keys into a state of its own, a program each. `carry` walks over the chunks of a head, every entry of the state by
itself, and leaves before each chunk the state of all keys before it, as it decays. `outputs` owns a tile of queries: their features times
the state before their chunk, and pair by pair the keys of the chunk. Without a limit there is one state, the sum of all, and no `carry`.

Chunks are cut along the keys; a query lies where the last key that it sees does, so that lengths of queries and keys need not agree. Here
a query sees all keys or those up to a fixed distance of its own position; any other limit, and segments, are `codegen.interval_kernel`'s.
"""

from __future__ import annotations

from collections.abc import Sequence

import sympy

from codegen.backward_text import indented
from codegen.kernel_reads import KernelReads, Owner
from codegen.normaliser_lines import end
from codegen.state_features import StateFeatures, mask_terms
from codegen.state_form import StateForm
from codegen.triton_printer import triton_text
from rewrite.ir.expression import NK, NQ, QK, I


def offset_of(form: StateForm) -> sympy.Expr | None:
    """n of a limit  j <= i + n, an expression in Nq and Nk; None without one, or for any other limit."""
    if form.limit is None or form.sorts_keys:
        return None
    parts = [part for part in (form.limit.args if isinstance(form.limit, sympy.Min) else (form.limit,)) if part != NK]
    offset = sympy.expand(parts[0] - I - 1)
    return offset if len(parts) == 1 and offset.free_symbols <= {NQ, NK} and offset.is_polynomial(NQ, NK) else None


class StateKernels(StateFeatures):
    """The kernels of one emitted file."""

    @property
    def limited(self) -> bool:
        """Whether there is a state before each chunk, or one of all keys."""
        return offset_of(self.form) is not None

    def reads(self, owner: Owner) -> KernelReads:
        return KernelReads(self.attend, owner)

    def orders(self, kernel: str) -> list[str]:
        """Pointers among a kernel's arguments to the order of keys and queries, where that is not their own."""
        return []

    def signature(self, kernel: str, operands: dict[str, str], sizes: str, constants: str) -> list[str]:
        reads = self.reads("queries")
        strided = [f"    {', '.join(f'{name}_stride_{axis}' for axis in axes)}," for name, axes in operands.items() if axes]
        return [
            '@triton.jit(do_not_specialize=["Nq", "Nk", "offset", "base", "chunks", "tiles"])',
            f"def {self.name}_{kernel}(",
            f"    {', '.join([*operands, *self.orders(kernel)])},",
            *([f"    {', '.join(reads.ids.values())},"] if reads.ids else []),
            *strided,
            *reads.arguments(),
            f"    {sizes},",
            *(f"    {line.rstrip(chr(44))}," for line in constants.split("\n")),
            "):",
        ]

    # ---- states -------------------------------------------------------------------------------------------------------------------

    def states(self) -> list[str]:
        form, reads = self.form, self.reads("keys")
        names = reads.inside_names
        kinds = list(enumerate(form.features))
        of_keys = (*(feature.key for feature in form.features), form.value, form.seen_keys, form.rate)
        loads = [line.removeprefix("    ") for line in reads.outside_loop("keys", *of_keys)]
        seen = " & ".join(["in_keys[:, None]", *(f"({text})" for text in mask_terms(form.seen_keys, names))])
        chunk, first_slot, tile, last = self.keys_of_a_chunk()
        decay = [f"decay = tl.exp(({triton_text(form.rate, names)}) * (j - {last})[:, None])"] if self.decays else []
        body = [
            *tile,
            "key_rows = key + start * key_stride_j + columns[:, None] * key_stride_j + lanes[None, :]",
            "value_rows = value + start * value_stride_j + columns[:, None] * value_stride_j + value_lanes[None, :]",
            "key_tile = tl.load(key_rows, mask=in_keys[:, None] & in_width[None, :], other=0.0)",
            "value_tile = tl.load(value_rows, mask=in_keys[:, None] & in_value_width[None, :], other=0.0)",
            *loads,
            f"seen = {seen}",
            *decay,
            *(line for place, feature in kinds for line in self.summed(place, feature, names)),
        ]
        start = [
            *(f"    state_{place} = tl.zeros({self.extent(feature)}, tl.float32)" for place, feature in kinds),
            *(
                f"    sum_{place} = tl.zeros({'[BLOCK_D]' if feature.dot else '[1]'}, tl.float32)"
                for place, feature in kinds
                if form.totals
            ),
        ]
        return [
            *self.signature(
                "states",
                {"key": "bhj", "value": "bhj", "states": "", "sums": ""},
                "H, Nq, Nk, chunks",
                "HEADS_PER_STATE: tl.constexpr, STATES_PER_KEY: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,\n"
                "FEATURES: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_K: tl.constexpr,\n"
                "CHUNK: tl.constexpr, PRECISION: tl.constexpr",
            ),
            "    # One program: a chunk of keys of one head, some columns of its state.",
            "    program = tl.program_id(0)",
            "    chunk = program % chunks",
            "    state_head = (program // chunks) % (H // HEADS_PER_STATE)",
            "    h = (state_head * HEADS_PER_STATE).to(tl.int64)",
            "    b = (program // chunks // (H // HEADS_PER_STATE)).to(tl.int64)",
            "    lanes = tl.arange(0, BLOCK_D)",
            "    value_lanes = tl.program_id(1) * BLOCK_DV + tl.arange(0, BLOCK_DV)",
            "    in_width, in_value_width = lanes < D, value_lanes < DV",
            *chunk,
            "    key += b * key_stride_b + (state_head // STATES_PER_KEY) * key_stride_h",
            "    value += b * value_stride_b + (state_head // STATES_PER_KEY) * value_stride_h",
            *start,
            f"    for slot in tl.range({first_slot}, CHUNK // BLOCK_K):",
            *indented(body, 2),
            "    states += program.to(tl.int64) * FEATURES * DV",
            *(line for place, feature in kinds for line in self.store_state(place, feature)),
            *self.store_sums(kinds),
        ]

    def keys_of_a_chunk(self) -> tuple[list[str], str, list[str], str]:
        """(lines in front of the walk over a chunk, its first tile, lines that read where the keys of a tile are, the last key)."""
        tile = [
            "start = (chunk * CHUNK + slot * BLOCK_K).to(tl.int64)",
            "j = start.to(tl.int32) + columns",
            "in_keys = j < Nk",
        ]
        return ["    columns = tl.arange(0, BLOCK_K)"], "0", tile, "(chunk * CHUNK + CHUNK - 1)"

    # ---- carry --------------------------------------------------------------------------------------------------------------------

    def carry(self) -> list[str]:
        """The walk over chunks: what lies in `states`, of each chunk, becomes what comes before it."""
        reads = self.reads("queries")
        before, inside = self.between_chunks(triton_text(self.form.rate, reads.inside_names))
        return [
            *self.signature(
                "carry",
                {"states": ""},
                "H, Nq, Nk, chunks",
                "HEADS_PER_STATE: tl.constexpr, SIZE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr",
            ),
            "    # One program: some entries of the state of one head.",
            "    program = tl.program_id(0)",
            "    h = (program % (H // HEADS_PER_STATE) * HEADS_PER_STATE).to(tl.int64)",
            "    b = (program // (H // HEADS_PER_STATE)).to(tl.int64)",
            "    entries = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)",
            "    states += program.to(tl.int64) * chunks * SIZE + entries",
            *(reads.outside_loop("rows", self.form.rate) if self.decays else []),
            *before,
            "    state = tl.zeros([BLOCK], tl.float32)",
            "    for chunk in tl.range(0, chunks):",
            "        own = tl.load(states, mask=entries < SIZE, other=0.0)",
            "        tl.store(states, state, mask=entries < SIZE)",
            *(f"        {line}" for line in inside),
            "        states += SIZE",
        ]

    def between_chunks(self, rate: str) -> tuple[list[str], list[str]]:
        """(lines in front of the walk over chunks, lines that make the state after a chunk)."""
        if not self.decays:
            return [], ["state = state + own"]
        return [f"    decay = tl.exp(-CHUNK * ({rate}))"], ["state = state * decay + own"]

    # ---- outputs ------------------------------------------------------------------------------------------------------------------

    def outputs(self) -> list[str]:
        form, reads = self.form, self.reads("queries")
        names = reads.inside_names
        kinds = list(enumerate(form.features))
        exponent = f"({triton_text(form.rate, names)}) * (before - 1 - {self.shift} - i)[:, None]"
        return [
            *self.signature(
                "outputs",
                {"query": "bhi", "key": "bhj", "value": "bhj", "states": "", "sums": "", "out": "bhi", "lse": "bhi"},
                "H, Nq, Nk, chunks, tiles, base, offset",
                "HEADS_PER_KEY: tl.constexpr, HEADS_PER_STATE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,\n"
                "FEATURES: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_Q: tl.constexpr,\n"
                "BLOCK_K: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr",
            ),
            "    # One program: BLOCK_Q queries of one head, some columns of their results.",
            "    program = tl.program_id(0)",
            "    place = base + program % tiles * BLOCK_Q  # the last key that the first of them sees",
            "    h = (program // tiles % H).to(tl.int64)",
            "    b = (program // tiles // H).to(tl.int64)",
            "    first = (place - offset).to(tl.int64)",
            "    rows, columns, lanes = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D)",
            "    value_lanes = tl.program_id(1) * BLOCK_DV + tl.arange(0, BLOCK_DV)",
            "    i = place - offset + rows",
            "    in_rows, in_width, in_value_width = (i >= 0) & (i < Nq), lanes < D, value_lanes < DV",
            f"    chunk = {'tl.maximum(place, 0) // CHUNK' if self.limited else '0'}",
            "    before = chunk * CHUNK",
            *self.queries_of_a_tile(reads),
            "",
            "    # What the state gives.",
            "    state_place = (b * (H // HEADS_PER_STATE) + h // HEADS_PER_STATE) * chunks + chunk",
            "    states += state_place * FEATURES * DV",
            *(["    sums += state_place * FEATURES"] if form.totals else []),
            f"    seen = {self.seen_queries('in_rows', names)}",
            *([f"    decay = tl.exp({exponent})"] if self.decays else []),
            *(f"    {line}" for place, feature in kinds for line in self.from_state(place, feature, names)),
            *(["", "    # What the chunk gives itself.", *self._own_keys(reads)] if self.limited else []),
            "",
            *self.results(reads),
        ]

    @property
    def shift(self) -> str:
        return f"({triton_text(self.form.shift, {'Nq': 'Nq', 'Nk': 'Nk'})})"

    def seen_queries(self, rows: str, names: dict[str, str]) -> str:
        """[BLOCK_Q, 1]: which of some rows take part."""
        return " & ".join([f"{rows}[:, None]", *(f"({text})" for text in mask_terms(self.form.seen_queries, names))])

    QUERY_TILE = (
        "query_rows = query + rows[:, None] * query_stride_i + lanes[None, :]",
        "query_tile = tl.load(query_rows, mask=in_rows[:, None] & in_width[None, :], other=0.0)",
    )

    def queries_of_a_tile(self, reads: KernelReads, query_tile: Sequence[str] = QUERY_TILE) -> list[str]:
        """What is read of the queries, and what is summed for them. query_tile: the lines that load these, if they are wanted here."""
        return [
            "    query += b * query_stride_b + h * query_stride_h + first * query_stride_i",
            *indented(query_tile),
            *reads.outside_loop("rows", reads.attend.score, reads.attend.mask, reads.attend.weight),
            "    accumulator = tl.zeros([BLOCK_Q, BLOCK_DV], tl.float32)",
            *(["    row_sum = tl.zeros([BLOCK_Q], tl.float32)"] if self.form.totals else []),
        ]

    def _own_keys(self, reads: KernelReads) -> list[str]:
        body = [
            "start = tl.full((), slot * BLOCK_K, tl.int64)",
            "j = slot * BLOCK_K + columns",
            "in_keys = j < Nk",
            *self.pairs(reads, ["in_keys[None, :]"]),
        ]
        return [
            *self.KEYS_OF_A_HEAD,
            "    for slot in tl.range(before // BLOCK_K, tl.cdiv(tl.maximum(tl.minimum(place + BLOCK_Q, Nk), 0), BLOCK_K)):",
            *indented(body, 2),
        ]

    KEYS_OF_A_HEAD = (
        "    key += b * key_stride_b + (h // HEADS_PER_KEY) * key_stride_h",
        "    value += b * value_stride_b + (h // HEADS_PER_KEY) * value_stride_h",
    )

    def pairs(self, reads: KernelReads, seen: list[str]) -> list[str]:
        """A tile of keys, pair by pair. seen: which pairs count, beside what the mask of the operation that is read says."""
        attend, names = reads.attend, reads.inside_names
        value = self.form.value
        return [
            "key_rows = key + start * key_stride_j + columns[None, :] * key_stride_j + lanes[:, None]",
            "value_rows = value + start * value_stride_j + columns[:, None] * value_stride_j + value_lanes[None, :]",
            "key_tile = tl.load(key_rows, mask=in_width[:, None] & in_keys[None, :], other=0.0)",
            "value_tile = tl.load(value_rows, mask=in_keys[:, None] & in_value_width[None, :], other=0.0)",
            *reads.inside_loop(attend.score, attend.mask, attend.weight),
            "qk = tl.dot(query_tile, key_tile, input_precision=PRECISION)",
            f"score = {triton_text(attend.score, names)}",
            *([] if attend.score.has(QK) else ["score += tl.zeros_like(qk)"]),
            *(f"score = tl.where({term}, score, 0.0)" for term in [*seen, *mask_terms(attend.mask, names)]),
            *(["row_sum += tl.sum(score, 1)"] if self.form.totals else []),
            "weight = score",
            *([] if value == 1 else [f"weight = tl.where(weight != 0, weight * ({triton_text(value, names)}), 0.0)"]),
            "accumulator = tl.dot(weight.to(value_tile.dtype), value_tile, accumulator, input_precision=PRECISION)",
        ]

    def results(self, reads: KernelReads) -> list[str]:
        """From the sums of a tile of queries to what is stored of them."""
        result = self.form.result
        return [
            *([] if result == 1 else [f"    accumulator *= {triton_text(result, reads.inside_names)}"]),
            *end(self.attend, reads),
            "    out += b * out_stride_b + h * out_stride_h + first * out_stride_i",
            "    out_rows = out + rows[:, None] * out_stride_i + value_lanes[None, :]",
            "    tl.store(out_rows, accumulator.to(out.dtype.element_ty), mask=in_rows[:, None] & in_value_width[None, :])",
            "    lse += b * lse_stride_b + h * lse_stride_h + first * lse_stride_i + rows * lse_stride_i",
            "    tl.store(lse, lse_tile, mask=in_rows & (tl.program_id(1) == 0))",
        ]
