"""Lines of a kernel from scores to weights, and from sums to the result: the online softmax, and plain sums.

"softmax" keeps the running maximum m and the sum l of exp(score - m), and rescales both and the accumulator when m grows (Milakov &
Gimelshein 2018; Dao 2022); scores are kept in base 2. A sink is one more term of l, added at the end. "sum" and "none" add up scores as
they are. A weight expression a * w streams as a factor of what the values are multiplied by, and leaves the normaliser alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import sympy
from sympy.logic.boolalg import Boolean

from codegen.base_two import LOG2_E
from codegen.kernel_reads import KernelReads
from codegen.tile_masks import split_tiles
from codegen.triton_printer import triton_text
from rewrite.ir.expression import QK, W, conjuncts
from rewrite.ir.operations import Attend


def gathered(attend: Attend, values: bool = True) -> tuple[str, ...]:
    """What a walk gathers of each row beside the accumulator. values: whether there is one, else rows of scores are summed."""
    if attend.normaliser == "softmax":
        return ("row_max", "row_sum")
    return ("row_sum",) if attend.normaliser == "sum" or not values else ()


def start(attend: Attend, values: bool = True) -> list[str]:
    """What a walk gathers, as it begins."""
    begins = {"row_max": 'tl.full([BLOCK_Q], float("-inf"), tl.float32)', "row_sum": "tl.zeros([BLOCK_Q], tl.float32)"}
    return [f"    {fact} = {begins[fact]}" for fact in gathered(attend, values)]


def score_lines(attend: Attend, reads: KernelReads) -> list[str]:
    """The scores of one block of keys; where the mask hides a key they weigh nothing."""
    split, names = split_tiles(attend), reads.inside_names
    softmax = attend.normaliser == "softmax"
    text = triton_text(sympy.Float(LOG2_E) * attend.score if softmax else attend.score, names)
    nothing = 'float("-inf")' if softmax else "0.0"
    always = (attend.score, split.by_pair, attend.weight)
    tiles = reads.inside_loop(split.by_tile, beside=always)
    cut = ["score = tl.where(in_keys[None, :], score, " + nothing + ")"]
    cut += [*_hide(split.by_position, names, nothing), *_hide(split.by_tile, names, nothing)]
    return [
        *reads.inside_loop(*always),
        *(["if CHECKED:", *(f"    {line}" for line in tiles)] if tiles else []),
        "qk = tl.dot(query_tile, key_tile, input_precision=PRECISION)",
        f"score = {text}{'  # in base 2 by log2(e)' if softmax else ''}",
        *([] if attend.score.has(QK) else ["score += tl.zeros_like(qk)"]),
        "if CHECKED:",
        *(f"    {line}" for line in cut),
        *_hide(split.by_pair, names, nothing),
    ]


def _hide(mask: Boolean, names: dict[str, str], nothing: str) -> list[str]:
    """A line for each term of the mask."""
    terms = [] if mask == sympy.true else [triton_text(term, names) for term in conjuncts(mask)]
    return [f"score = tl.where({condition}, score, {nothing})" for condition in terms]


def weight_lines(attend: Attend, values: bool = True) -> list[str]:
    """Scores to weights that are not divided yet."""
    if attend.normaliser != "softmax":
        return ["", "weight = score", *(["row_sum += tl.sum(weight, 1)"] if gathered(attend, values) else [])]
    return [
        "",
        "new_max = tl.maximum(row_max, tl.max(score, 1))",
        'shift = tl.where(new_max == float("-inf"), 0.0, new_max)  # a row that has seen no key yet',
        "weight = tl.exp2(score - shift[:, None])",
        "rescale = tl.exp2(row_max - shift)",
        "row_max = new_max",
        "row_sum = row_sum * rescale + tl.sum(weight, 1)",
    ]


def factor_lines(attend: Attend, reads: KernelReads) -> list[str]:
    if attend.weight == W:
        return []
    # Past the last key a factor is made of whatever its tensors read as there.
    return [f"weight = tl.where(weight != 0, {triton_text(attend.weight, reads.inside_names)}, 0.0)"]


def accumulate(rescaled: bool, accumulator: str = "accumulator", weight: str = "weight") -> str:
    before = f"{accumulator} * rescale[:, None]" if rescaled else accumulator
    return f"{accumulator} = tl.dot({weight}.to(value_tile.dtype), value_tile, {before}, input_precision=PRECISION)"


def merge(attend: Attend, values: bool, masses: Sequence[str]) -> list[str]:
    """What was gathered of a row so far, and a part of it, whose names begin with `part_`, in one."""
    rescales = attend.normaliser == "softmax"
    was, own = (" * rescale", " * part_scale") if rescales else ("", "")
    facts = [fact for fact in (*gathered(attend, values), *masses) if fact != "row_max"]
    return [*(_MERGED_MAXIMUM if rescales else []), *(f"{fact} = {fact}{was} + part_{fact}{own}" for fact in facts)]


def merge_accumulator(attend: Attend, accumulator: str, part: str) -> str:
    """The same of an accumulator, behind `merge`."""
    was, own = (" * rescale[:, None]", " * part_scale[:, None]") if attend.normaliser == "softmax" else ("", "")
    return f"{accumulator} = {accumulator}{was} + {part}{own}"


_MERGED_MAXIMUM = [
    "new_max = tl.maximum(row_max, part_row_max)",
    'shift = tl.where(new_max == float("-inf"), 0.0, new_max)  # a row that has seen no key yet',
    "rescale, part_scale = tl.exp2(row_max - shift), tl.exp2(part_row_max - shift)",
    "row_max = new_max",
]


def end(attend: Attend, reads: KernelReads, values: bool = True) -> list[str]:
    """lse_tile, and where there are values the accumulator divided."""
    if attend.normaliser == "none":
        return ["    lse_tile = tl.zeros([BLOCK_Q], tl.float32)" if values else "    lse_tile = row_sum"]
    if attend.normaliser == "sum":
        return [
            f"    total = {triton_text(attend.denominator, {**reads.end_names, 'total': 'row_sum'})} + tl.zeros([BLOCK_Q], tl.float32)",
            "    share = tl.where(total != 0, 1.0 / tl.where(total != 0, total, 1.0), 0.0)",
            "    accumulator *= share[:, None]",
            '    lse_tile = tl.where(row_sum > 0, tl.log(tl.where(row_sum > 0, row_sum, 1.0)), float("-inf"))',
        ]
    # row_max is in base 2.
    natural = f'* {math.log(2)!r}, float("-inf"))  # natural again'
    if attend.sink is not None:
        return [
            *reads.outside_loop("end", attend.sink),
            f"    sink = {triton_text(sympy.Float(LOG2_E) * attend.sink, reads.end_names)} + tl.zeros([BLOCK_Q], tl.float32)",
            "    peak = tl.maximum(row_max, sink)",
            '    shift = tl.where(peak == float("-inf"), 0.0, peak)',
            "    rescale = tl.exp2(row_max - shift)",
            "    total = row_sum * rescale + tl.exp2(sink - shift)",
            "    normaliser = tl.where(total > 0, total, 1.0)",
            *(["    accumulator *= (rescale / normaliser)[:, None]"] if values else []),
            f"    lse_tile = tl.where(row_sum > 0, (shift + tl.log2(normaliser)) {natural}",
        ]
    return [
        *(["    normaliser = tl.where(row_sum > 0, row_sum, 1.0)"] if attend.groups is None else []),
        *(["    accumulator /= normaliser[:, None]"] if attend.groups is None and values else []),
        f"    lse_tile = tl.where(row_sum > 0, (row_max + tl.log2(normaliser)) {natural}",
    ]
