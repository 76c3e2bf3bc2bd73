"""Triton source for linear attention through its state: three kernels, each parallel over what the others leave sequential.

`states` sums a chunk of keys into a state of its own, a program each. `carry` walks over the chunks of a head, every entry of the state by
itself, and leaves before each chunk the state of all keys before it, as it decays. `outputs` owns a tile of queries: their features times
the state before their chunk, and pair by pair the keys of the chunk. Without a limit there is one state, the sum of all, and no `carry`.

Chunks are cut along the keys; a query lies where the last key that it sees does, so that lengths of queries and keys need not agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import sympy
from sympy.logic.boolalg import Boolean

from codegen.backward_text import indented
from codegen.kernel_reads import KernelReads, Owner
from codegen.normaliser_lines import end
from codegen.state_form import Feature, StateForm, state_form
from codegen.triton_printer import triton_text
from rewrite.ir.errors import RewriteError
from rewrite.ir.expression import NK, NQ, QK, I, W, conjuncts
from rewrite.ir.operations import Attend

# Every term has a state of its own in a program's registers, under a name that `codegen.names` reserves.
MOST_FEATURES = 8


def offset_of(form: StateForm) -> sympy.Expr | None:
    """n of a limit  j <= i + n, an expression in Nq and Nk; None without a limit. Raises `RewriteError` for any other limit."""
    if form.limit is None:
        return None
    parts = [part for part in (form.limit.args if isinstance(form.limit, sympy.Min) else (form.limit,)) if part != NK]
    offset = sympy.expand(parts[0] - I - 1)
    if len(parts) != 1 or not offset.free_symbols <= {NQ, NK} or not offset.is_polynomial(NQ, NK):
        raise RewriteError(f"its queries see the first {form.limit} keys, and kernels carry a state over j <= i + n only")
    return offset


@dataclass(frozen=True)
class StateKernels:
    """The kernels of one emitted file. name: what their names begin with."""

    attend: Attend
    name: str

    @cached_property
    def form(self) -> StateForm:
        form = state_form(self.attend)
        if isinstance(form, str):
            raise RewriteError(f"it has no state form: {form}")
        if len(form.features) > MOST_FEATURES:
            raise RewriteError(f"its score has {len(form.features)} terms, and a program holds the states of {MOST_FEATURES} at most")
        return form

    @cached_property
    def limited(self) -> bool:
        return offset_of(self.form) is not None

    @cached_property
    def decays(self) -> bool:
        return bool(self.form.rate != 0)

    def reads(self, owner: Owner) -> KernelReads:
        return KernelReads(self.attend, owner)

    def rows_before(self, feature: int) -> str:
        """Where the rows of a feature begin in a state."""
        dots = sum(each.dot for each in self.form.features[:feature])
        return f"{dots} * D + {feature - dots}"

    def _signature(self, kernel: str, operands: dict[str, str], sizes: str, constants: str) -> list[str]:
        reads = self.reads("queries")
        strided = [f"    {', '.join(f'{name}_stride_{axis}' for axis in axes)}," for name, axes in operands.items() if axes]
        return [
            '@triton.jit(do_not_specialize=["Nq", "Nk", "offset", "base", "chunks"])',
            f"def {self.name}_{kernel}(",
            f"    {', '.join(operands)},",
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
        seen = " & ".join(["in_keys[:, None]", *(f"({text})" for text in _terms(form.seen_keys, names))])
        decay = [f"decay = tl.exp(({triton_text(form.rate, names)}) * (j - (chunk * CHUNK + CHUNK - 1))[:, None])"] if self.decays else []
        body = [
            "start = (chunk * CHUNK + slot * BLOCK_K).to(tl.int64)",
            "j = start.to(tl.int32) + columns",
            "in_keys = j < Nk",
            "key_rows = key + start * key_stride_j + columns[:, None] * key_stride_j + lanes[None, :]",
            "value_rows = value + start * value_stride_j + columns[:, None] * value_stride_j + value_lanes[None, :]",
            "key_tile = tl.load(key_rows, mask=in_keys[:, None] & in_width[None, :], other=0.0)",
            "value_tile = tl.load(value_rows, mask=in_keys[:, None] & in_value_width[None, :], other=0.0)",
            *loads,
            f"seen = {seen}",
            *decay,
            *(line for place, feature in kinds for line in self._summed(place, feature, names)),
        ]
        start = [
            *(f"    state_{place} = tl.zeros({self._extent(feature)}, tl.float32)" for place, feature in kinds),
            *(
                f"    sum_{place} = tl.zeros({'[BLOCK_D]' if feature.dot else '[1]'}, tl.float32)"
                for place, feature in kinds
                if form.totals
            ),
        ]
        return [
            *self._signature(
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
            "    columns, lanes = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D)",
            "    value_lanes = tl.program_id(1) * BLOCK_DV + tl.arange(0, BLOCK_DV)",
            "    in_width, in_value_width = lanes < D, value_lanes < DV",
            "    key += b * key_stride_b + (state_head // STATES_PER_KEY) * key_stride_h",
            "    value += b * value_stride_b + (state_head // STATES_PER_KEY) * value_stride_h",
            *start,
            "    for slot in tl.range(0, CHUNK // BLOCK_K):",
            *indented(body, 2),
            "    states += program.to(tl.int64) * FEATURES * DV",
            *(line for place, feature in kinds for line in self._store_state(place, feature)),
            *self._store_sums(kinds),
        ]

    @staticmethod
    def _extent(feature: Feature) -> str:
        return "[BLOCK_D, BLOCK_DV]" if feature.dot else "[BLOCK_DV]"

    def _summed(self, place: int, feature: Feature, names: dict[str, str]) -> list[str]:
        """One feature of a tile of keys, added to its state."""
        form = self.form
        plain = feature.key == 1 and form.value == 1 and form.seen_keys == sympy.true and not self.decays
        if feature.dot and plain:
            totals = [f"sum_{place} += tl.sum(key_tile.to(tl.float32), 0)"] if form.totals else []
            return [f"state_{place} = tl.dot(tl.trans(key_tile), value_tile, state_{place}, input_precision=PRECISION)", *totals]
        factor = triton_text(feature.key, names) + (" * decay" if self.decays else "")
        term = f"key_tile.to(tl.float32) * ({factor})" if feature.dot else f"{factor} + tl.zeros([BLOCK_K, 1], tl.float32)"
        values = "value_tile.to(tl.float32)"
        if form.value != 1:
            values = f"tl.where(seen, {values} * ({triton_text(form.value, names)}), 0.0)"
        lines = [f"feature = tl.where(seen, {term}, 0.0)"]
        if feature.dot:
            lines.append(f"state_{place} = tl.dot(tl.trans(feature), {values}, state_{place}, input_precision=PRECISION)")
        else:
            lines.append(f"state_{place} += tl.sum(feature * {values}, 0)")
        return [*lines, *([f"sum_{place} += tl.sum(feature, 0)"] if form.totals else [])]

    def _state_rows(self, place: int, feature: Feature) -> tuple[str, str]:
        """(address, mask) of a feature's part of a state."""
        rows = self.rows_before(place)
        if feature.dot:
            return f"states + ({rows} + lanes[:, None]) * DV + value_lanes[None, :]", "in_width[:, None] & in_value_width[None, :]"
        return f"states + ({rows}) * DV + value_lanes", "in_value_width"

    def _sum_rows(self, place: int, feature: Feature) -> tuple[str, str]:
        lanes = "lanes" if feature.dot else "tl.arange(0, 1)"
        return f"sums + {self.rows_before(place)} + {lanes}", "in_width" if feature.dot else "tl.arange(0, 1) < 1"

    def _store_state(self, place: int, feature: Feature) -> list[str]:
        address, mask = self._state_rows(place, feature)
        return [f"    tl.store({address}, state_{place}, mask={mask})"]

    def _store_sums(self, kinds: list[tuple[int, Feature]]) -> list[str]:
        if not self.form.totals:
            return []
        stores = [(place, *self._sum_rows(place, feature)) for place, feature in kinds]
        return [
            "    sums += program.to(tl.int64) * FEATURES",
            "    if tl.program_id(1) == 0:",
            *(f"        tl.store({address}, sum_{place}, mask={mask})" for place, address, mask in stores),
        ]

    # ---- carry --------------------------------------------------------------------------------------------------------------------

    def carry(self) -> list[str]:
        """The walk over chunks: what lies in `states`, of each chunk, becomes what comes before it."""
        reads, decayed = self.reads("queries"), "state * decay" if self.decays else "state"
        rate = triton_text(self.form.rate, reads.inside_names)
        return [
            *self._signature(
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
            *([f"    decay = tl.exp(-CHUNK * ({rate}))"] if self.decays else []),
            "    state = tl.zeros([BLOCK], tl.float32)",
            "    for chunk in tl.range(0, chunks):",
            "        own = tl.load(states, mask=entries < SIZE, other=0.0)",
            "        tl.store(states, state, mask=entries < SIZE)",
            f"        state = {decayed} + own",
            "        states += SIZE",
        ]

    # ---- outputs ------------------------------------------------------------------------------------------------------------------

    def outputs(self) -> list[str]:
        form, reads = self.form, self.reads("queries")
        names = reads.inside_names
        kinds = list(enumerate(form.features))
        weight_of_state = triton_text(form.result, names)
        seen = " & ".join(["in_rows[:, None]", *(f"({text})" for text in _terms(form.seen_queries, names))])
        exponent = f"({triton_text(form.rate, names)}) * (before - 1 - {_shift(form)} - i)[:, None]"
        return [
            *self._signature(
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
            "    query += b * query_stride_b + h * query_stride_h + first * query_stride_i",
            "    query_rows = query + rows[:, None] * query_stride_i + lanes[None, :]",
            "    query_tile = tl.load(query_rows, mask=in_rows[:, None] & in_width[None, :], other=0.0)",
            *reads.outside_loop("rows", self.attend.score, self.attend.mask, self.attend.weight),
            "    accumulator = tl.zeros([BLOCK_Q, BLOCK_DV], tl.float32)",
            *(["    row_sum = tl.zeros([BLOCK_Q], tl.float32)"] if form.totals else []),
            "",
            "    # What the state gives.",
            "    state_place = (b * (H // HEADS_PER_STATE) + h // HEADS_PER_STATE) * chunks + chunk",
            "    states += state_place * FEATURES * DV",
            *(["    sums += state_place * FEATURES"] if form.totals else []),
            f"    seen = {seen}",
            *([f"    decay = tl.exp({exponent})"] if self.decays else []),
            *(f"    {line}" for place, feature in kinds for line in self._from_state(place, feature, names)),
            *([f"    accumulator *= {weight_of_state}"] if form.result != 1 else []),
            *(["", "    # What the chunk gives itself.", *self._own_keys(reads)] if self.limited else []),
            "",
            *end(self.attend, reads),
            "    out += b * out_stride_b + h * out_stride_h + first * out_stride_i",
            "    out_rows = out + rows[:, None] * out_stride_i + value_lanes[None, :]",
            "    tl.store(out_rows, accumulator.to(out.dtype.element_ty), mask=in_rows[:, None] & in_value_width[None, :])",
            "    lse += b * lse_stride_b + h * lse_stride_h + first * lse_stride_i + rows * lse_stride_i",
            "    tl.store(lse, lse_tile, mask=in_rows & (tl.program_id(1) == 0))",
        ]

    def _from_state(self, place: int, feature: Feature, names: dict[str, str]) -> list[str]:
        factor = triton_text(feature.query, names) + (" * decay" if self.decays else "")
        term = f"query_tile.to(tl.float32) * ({factor})" if feature.dot else f"{factor} + tl.zeros([BLOCK_Q, 1], tl.float32)"
        address, mask = self._state_rows(place, feature)
        totals, total_mask = self._sum_rows(place, feature)
        # In float32: a state outgrows float16.
        lines = [f"feature = tl.where(seen, {term}, 0.0)", f"state = tl.load({address}, mask={mask}, other=0.0)"]
        if feature.dot:
            lines.append("accumulator = tl.dot(feature, state, accumulator, input_precision=PRECISION)")
        else:
            lines.append("accumulator += feature * state[None, :]")
        if self.form.totals:
            lines.append(f"row_sum += tl.sum(feature * tl.load({totals}, mask={total_mask}, other=0.0)[None, :], 1)")
        return lines

    def _own_keys(self, reads: KernelReads) -> list[str]:
        attend, names = self.attend, reads.inside_names
        body = [
            "start = tl.full((), slot * BLOCK_K, tl.int64)",
            "j = slot * BLOCK_K + columns",
            "in_keys = j < Nk",
            "key_rows = key + start * key_stride_j + columns[None, :] * key_stride_j + lanes[:, None]",
            "value_rows = value + start * value_stride_j + columns[:, None] * value_stride_j + value_lanes[None, :]",
            "key_tile = tl.load(key_rows, mask=in_width[:, None] & in_keys[None, :], other=0.0)",
            "value_tile = tl.load(value_rows, mask=in_keys[:, None] & in_value_width[None, :], other=0.0)",
            *reads.inside_loop(attend.score, attend.mask, attend.weight),
            "qk = tl.dot(query_tile, key_tile, input_precision=PRECISION)",
            f"score = {triton_text(attend.score, names)}",
            *([] if attend.score.has(QK) else ["score += tl.zeros_like(qk)"]),
            "score = tl.where(in_keys[None, :], score, 0.0)",
            *(f"score = tl.where({term}, score, 0.0)" for term in _terms(attend.mask, names)),
            *(["row_sum += tl.sum(score, 1)"] if self.form.totals else []),
            "weight = score",
            *([] if attend.weight == W else [f"weight = tl.where(weight != 0, {triton_text(attend.weight, names)}, 0.0)"]),
            "accumulator = tl.dot(weight.to(value_tile.dtype), value_tile, accumulator, input_precision=PRECISION)",
        ]
        return [
            "    key += b * key_stride_b + (h // HEADS_PER_KEY) * key_stride_h",
            "    value += b * value_stride_b + (h // HEADS_PER_KEY) * value_stride_h",
            "    for slot in tl.range(before // BLOCK_K, tl.cdiv(tl.maximum(tl.minimum(place + BLOCK_Q, Nk), 0), BLOCK_K)):",
            *indented(body, 2),
        ]


def _shift(form: StateForm) -> str:
    return f"({triton_text(form.shift, {'Nq': 'Nq', 'Nk': 'Nk'})})"


def _terms(mask: Boolean, names: dict[str, str]) -> list[str]:
    """The text of each term of a mask."""
    return [] if mask == sympy.true else [triton_text(term, names) for term in conjuncts(mask)]
