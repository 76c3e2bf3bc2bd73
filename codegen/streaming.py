"""Triton source for an attention operation: the streaming skeleton.

A program owns a tile of queries of one head and walks over blocks of keys with an online softmax (Milakov & Gimelshein 2018; Dao 2022):
it keeps the running maximum m and the sum l of exp(score - m), and rescales both and the accumulator when m grows. Scores are kept in
base 2.

With groups of keys the output is  sum_j weight_g(j)(mass_1 .. mass_n) a[i,j] v[j], a closed form in the masses, which are known only
after all keys were seen. A program then walks twice: first for m, l and the mass of every group, then for the values. That costs
three matrix products where plain attention takes two; one walk with an accumulator per distinct weight would take 1 + (number of
weights), four for sink redistribution, and its accumulators do not fit the registers at head dim 128.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import sympy
from sympy.logic.boolalg import Boolean

from codegen.masks import split_mask
from codegen.names import identifiers
from codegen.triton_printer import triton_text
from rewrite.ir.expression import QK, conjuncts, letters, tensors_in
from rewrite.ir.operations import Attend, Groups

LOG2_E = math.log2(math.e)


def shared_weights(groups: Groups) -> tuple[tuple[sympy.Expr, tuple[str, ...]], ...]:
    """(weight, the groups that share it), leaving out weights of zero: keys of no listed group count for nothing."""
    shared: dict[sympy.Expr, list[str]] = {}
    for name, weight in zip(groups.names, groups.weights, strict=True):
        shared.setdefault(sympy.sympify(weight), []).append(name)
    return tuple((weight, tuple(names)) for weight, names in shared.items() if weight != 0)


@dataclass(frozen=True)
class StreamingKernel:
    """The kernel of one emitted file; `lines` puts its pieces together. name: of its function."""

    attend: Attend
    name: str

    @cached_property
    def tensors(self) -> dict[str, str]:
        return {name: letters(indices) or "" for name, indices in self.attend.tensors().items()}

    @cached_property
    def ids(self) -> dict[str, str]:
        """Tensor name -> identifier."""
        return identifiers(self.tensors)

    @cached_property
    def group_ids(self) -> dict[str, str]:
        """Group name -> the end of the identifiers that belong to it."""
        groups = self.attend.groups
        return {} if groups is None else identifiers(groups.names)

    @cached_property
    def listed(self) -> bool:
        """Whether the kernel walks a block list: only a static mask gives one."""
        return bool(split_mask(self.attend.mask)[0] != sympy.true)

    def _strides(self) -> list[str]:
        operands = {"query": "bhi", "key": "bhj", "value": "bhj", "out": "bhi", "lse": "bhi"}
        operands |= {self.ids[name]: axes for name, axes in self.tensors.items()}
        return [f"    {', '.join(f'{operand}_stride_{axis}' for axis in axes)}," for operand, axes in operands.items() if axes]

    def _arguments(self) -> list[str]:
        extra = [*self.ids.values(), *(["starts", "blocks"] if self.listed else [])]
        return [
            "    query, key, value, out, lse,",
            *([f"    {', '.join(extra)},"] if extra else []),
            *self._strides(),
            "    H, Nq, Nk,",
            "    HEADS_PER_KEY: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,",
            "    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,",
        ]

    def _load(self, name: str, part: str) -> str:
        """The load of a tensor: part "tile" ([BLOCK_Q, BLOCK_K]) and "columns" ([BLOCK_K]) inside the loop over keys, "rows"
        before it ([BLOCK_Q, 1]), "end" after it ([BLOCK_Q])."""
        operand, axes = self.ids[name], self.tensors[name]
        across = {"tile": "[:, None]", "rows": "[:, None]", "end": "", "columns": ""}[part]
        along = "[None, :]" if part == "tile" else ""
        terms = {
            "b": f"b * {operand}_stride_b",
            "h": f"h * {operand}_stride_h",
            "i": f"first * {operand}_stride_i + rows{across} * {operand}_stride_i",
            "j": f"start * {operand}_stride_j + columns{along} * {operand}_stride_j",
        }
        address = " + ".join([operand, *(terms[axis] for axis in axes)])
        inside = [f"in_rows{across}"] if "i" in axes else []
        inside += [f"in_keys{along}"] if "j" in axes else []
        return f"tl.load({address}, mask={' & '.join(inside)}, other=0)" if inside else f"tl.load({address})"

    def _outside_loop(self, part: str, expressions: tuple[sympy.Basic, ...]) -> list[str]:
        """Loads of what does not change with j, for the expressions that read it."""
        names = [name for name in tensors_in(*expressions) if "j" not in self.tensors[name]]
        return [f"    {self.ids[name]}_{part} = {self._load(name, part)}{self._cast(name)}" for name in names]

    def _cast(self, name: str) -> str:
        """Arithmetic is in float32; what only a predicate reads stays as it is."""
        groups = self.attend.groups
        return ".to(tl.float32)" if name in tensors_in(self.attend.score, *(groups.weights if groups else ())) else ""

    def _inside_names(self) -> dict[str, str]:
        """What the score and the mask print their symbols as, inside the loop."""
        tensors = {name: f"{self.ids[name]}_{'tile' if 'j' in axes else 'rows'}" for name, axes in self.tensors.items()}
        return {"qk": "qk", "b": "b", "h": "h", "i": "i[:, None]", "j": "j[None, :]", "Nq": "Nq", "Nk": "Nk", **tensors}

    def _end_names(self) -> dict[str, str]:
        """What the group weights print theirs as, after the loop."""
        tensors = {name: f"{self.ids[name]}_end" for name, axes in self.tensors.items() if "j" not in axes}
        masses = {f"mass_{name}": f"mass_{identifier}" for name, identifier in self.group_ids.items()}
        return {"b": "b", "h": "h", "i": "i", "Nq": "Nq", "Nk": "Nk", **tensors, **masses}

    def lines(self) -> list[str]:
        attend, groups = self.attend, self.attend.groups
        masses = [f"    mass_{identifier} = tl.zeros([BLOCK_Q], tl.float32)" for identifier in self.group_ids.values()]
        if groups is None:
            walks = [*self._loop([*self._score(), *self._softmax(), *self._accumulate()])]
        else:
            walks = [
                "    # First walk: the normaliser, and the mass of every group.",
                *self._loop([*self._score(), *self._softmax(), *self._add_masses(groups)]),
                "",
                "    # What every group counts, from the masses.",
                *self._group_weights(groups),
                "",
                "    # Second walk: the values, each weighted as its group is.",
                *self._loop([*self._score(), *self._accumulate_weighted(groups)]),
            ]
        return [
            '@triton.jit(do_not_specialize=["Nq", "Nk"])',
            f"def {self.name}(",
            *self._arguments(),
            "):",
            "    # One program: BLOCK_Q queries of one head. Large offsets are taken in int64, those inside a tile in int32.",
            "    program = tl.program_id(0)",
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
            *self._outside_loop("rows", (attend.score, attend.mask)),
            "",
            '    row_max = tl.full([BLOCK_Q], float("-inf"), tl.float32)',
            "    row_sum = tl.zeros([BLOCK_Q], tl.float32)",
            *masses,
            "    accumulator = tl.zeros([BLOCK_Q, BLOCK_DV], tl.float32)",
            "",
            *walks,
            "",
            *self._end(),
        ]

    def _loop(self, body: list[str]) -> list[str]:
        """A walk over the keys: blocks seen in full, then blocks that the mask or the end of the keys cuts."""
        if self.listed:
            bounds = ["begin, end = tl.load(starts + 2 * block + CHECKED), tl.load(starts + 2 * block + CHECKED + 1)"]
            start = "(tl.load(blocks + slot) * BLOCK_K).to(tl.int64)"
        else:
            bounds = ["begin, end = 0, Nk // BLOCK_K", "if CHECKED:", "    begin, end = Nk // BLOCK_K, tl.cdiv(Nk, BLOCK_K)"]
            start = "tl.full((), slot * BLOCK_K, tl.int64)"
        lines = [f"start = {start}", "j = start.to(tl.int32) + columns", *body]
        return [
            "    for CHECKED in tl.static_range(2):  # 0: key blocks seen in full; 1: those that the mask or the end of the keys cuts",
            *(f"        {line}" for line in bounds),
            "        for slot in tl.range(begin, end):",
            *(f"            {line}".rstrip() for line in lines),
        ]

    def _score(self) -> list[str]:
        """The scores of one block of keys, -inf where the mask hides a key."""
        attend = self.attend
        static, dynamic = split_mask(attend.mask)
        names = self._inside_names()
        reads = [name for name in tensors_in(attend.score, dynamic) if "j" in self.tensors[name]]
        lines = [
            "key_rows = key + start * key_stride_j + columns[None, :] * key_stride_j + lanes[:, None]",
            "in_keys = columns >= 0",
            "if CHECKED:",
            "    in_keys = j < Nk",
            "    key_tile = tl.load(key_rows, mask=in_width[:, None] & in_keys[None, :], other=0.0)",
            "else:",
            "    key_tile = tl.load(key_rows, mask=in_width[:, None], other=0.0)",
            *(f"{self.ids[name]}_tile = {self._load(name, 'tile')}{self._cast(name)}" for name in reads),
            "qk = tl.dot(query_tile, key_tile, input_precision=PRECISION)",
            f"score = {triton_text(sympy.Float(LOG2_E) * attend.score, names)}  # in base 2: times log2(e)",
        ]
        if not attend.score.has(QK):
            lines.append("score += tl.zeros_like(qk)")
        lines += ["if CHECKED:", *(f"    {line}" for line in self._hide(static, names, ["in_keys[None, :]"]))]
        if dynamic != sympy.true:
            lines += self._hide(dynamic, names, [])
        return lines

    def _hide(self, mask: Boolean, names: dict[str, str], conditions: list[str]) -> list[str]:
        """-inf where a condition or a term of the mask does not hold; a line for each term."""
        terms = [] if mask == sympy.true else [triton_text(term, names) for term in conjuncts(mask)]
        return [f'score = tl.where({condition}, score, float("-inf"))' for condition in [*conditions, *terms]]

    def _softmax(self) -> list[str]:
        return [
            "",
            "new_max = tl.maximum(row_max, tl.max(score, 1))",
            'shift = tl.where(new_max == float("-inf"), 0.0, new_max)  # a row that has seen no key yet',
            "weight = tl.exp2(score - shift[:, None])",
            "rescale = tl.exp2(row_max - shift)",
            "row_max = new_max",
            "row_sum = row_sum * rescale + tl.sum(weight, 1)",
        ]

    def _value_tile(self) -> list[str]:
        return [
            "value_rows = value + start * value_stride_j + columns[:, None] * value_stride_j + value_lanes[None, :]",
            "if CHECKED:",
            "    value_tile = tl.load(value_rows, mask=in_keys[:, None] & in_value_width[None, :], other=0.0)",
            "else:",
            "    value_tile = tl.load(value_rows, mask=in_value_width[None, :], other=0.0)",
        ]

    def _accumulate(self) -> list[str]:
        product = "tl.dot(weight.to(value_tile.dtype), value_tile, accumulator * rescale[:, None], input_precision=PRECISION)"
        return [*self._value_tile(), f"accumulator = {product}"]

    def _member(self, groups: Groups) -> str:
        return f"group = {self._load(groups.membership, 'columns')}"

    def _add_masses(self, groups: Groups) -> list[str]:
        lines = ["", self._member(groups)]
        for index, name in enumerate(groups.names):
            mass = f"mass_{self.group_ids[name]}"
            lines.append(f"{mass} = {mass} * rescale + tl.sum(tl.where((group == {index})[None, :], weight, 0.0), 1)")
        return lines

    def _group_weights(self, groups: Groups) -> list[str]:
        """One line per distinct weight, from the normalised masses."""
        lines = [
            '    shift = tl.where(row_max == float("-inf"), 0.0, row_max)',
            "    normaliser = tl.where(row_sum > 0, row_sum, 1.0)",
            *self._outside_loop("end", tuple(groups.weights)),
            *(f"    mass_{identifier} /= normaliser" for identifier in self.group_ids.values()),
        ]
        for index, (weight, names) in enumerate(shared_weights(groups)):
            total = " + ".join(f"mass_{self.group_ids[name]}" for name in names)
            text = triton_text(weight, self._end_names())
            # A weight may divide by the mass of its group: without keys the group adds nothing, whatever its weight.
            lines.append(f"    weight_{index} = tl.where({total} > 0, {text}, 0.0) / normaliser  # {', '.join(names)}")
        return lines

    def _accumulate_weighted(self, groups: Groups) -> list[str]:
        factor = "0.0"
        for index, (_, names) in reversed(list(enumerate(shared_weights(groups)))):
            chosen = " | ".join(f"(group == {groups.names.index(name)})" for name in names)
            chosen = f"({chosen})" if len(names) > 1 else chosen
            factor = f"tl.where({chosen}[None, :], weight_{index}[:, None], {factor})"
        return [
            "",
            self._member(groups),
            f"factor = {factor}",
            "weight = factor * tl.exp2(score - shift[:, None])",
            *self._value_tile(),
            "accumulator = tl.dot(weight.to(value_tile.dtype), value_tile, accumulator, input_precision=PRECISION)",
        ]

    def _end(self) -> list[str]:
        plain = ["    normaliser = tl.where(row_sum > 0, row_sum, 1.0)", "    accumulator /= normaliser[:, None]"]
        return [
            *(plain if self.attend.groups is None else []),
            "    out += b * out_stride_b + h * out_stride_h + first * out_stride_i",
            "    out_rows = out + rows[:, None] * out_stride_i + value_lanes[None, :]",
            "    tl.store(out_rows, accumulator.to(out.dtype.element_ty), mask=in_rows[:, None] & in_value_width[None, :])",
            # row_max is in base 2.
            f'    lse_tile = tl.where(row_sum > 0, (row_max + tl.log2(normaliser)) * {math.log(2)!r}, float("-inf"))  # natural again',
            "    tl.store(lse + b * lse_stride_b + h * lse_stride_h + first * lse_stride_i + rows * lse_stride_i, lse_tile, mask=in_rows)",
        ]
