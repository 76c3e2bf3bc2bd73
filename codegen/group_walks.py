"""Lines of a kernel for groups of keys: two walks over the keys.

The output is  sum_j weight_g(j)(mass_1 .. mass_n) a[i,j] v[j], a closed form in the masses, which are known only after all keys were seen.
A program walks first for the softmax's m, l and the mass of every group, then for the values. That costs three matrix products where plain
attention takes two; one walk with an accumulator per distinct weight would take 1 + (number of weights), four for sink redistribution, and
its accumulators do not fit the registers at head dim 128.
"""

from __future__ import annotations

import sympy

from codegen.kernel_reads import KernelReads
from codegen.triton_printer import triton_text
from rewrite.ir.operations import Groups


def shared_weights(groups: Groups) -> tuple[tuple[sympy.Expr, tuple[str, ...]], ...]:
    """(weight, the groups that share it), leaving out weights of zero: keys of no listed group count for nothing."""
    shared: dict[sympy.Expr, list[str]] = {}
    for name, weight in zip(groups.names, groups.weights, strict=True):
        shared.setdefault(sympy.sympify(weight), []).append(name)
    return tuple((weight, tuple(names)) for weight, names in shared.items() if weight != 0)


def zero_masses(reads: KernelReads) -> list[str]:
    return [f"    mass_{identifier} = tl.zeros([BLOCK_Q], tl.float32)" for identifier in reads.group_ids.values()]


def _member(groups: Groups, reads: KernelReads) -> str:
    return f"group = {reads.load(groups.membership, 'columns')}"


def add_masses(groups: Groups, reads: KernelReads) -> list[str]:
    """In the first walk."""
    lines = ["", _member(groups, reads)]
    for index, name in enumerate(groups.names):
        mass = f"mass_{reads.group_ids[name]}"
        lines.append(f"{mass} = {mass} * rescale + tl.sum(tl.where((group == {index})[None, :], weight, 0.0), 1)")
    return lines


def group_weights(groups: Groups, reads: KernelReads) -> list[str]:
    """Between the walks: one line per distinct weight, from the normalised masses."""
    lines = [
        '    shift = tl.where(row_max == float("-inf"), 0.0, row_max)',
        "    normaliser = tl.where(row_sum > 0, row_sum, 1.0)",
        *reads.outside_loop("end", *groups.weights),
        *(f"    mass_{identifier} /= normaliser" for identifier in reads.group_ids.values()),
    ]
    for index, (weight, names) in enumerate(shared_weights(groups)):
        total = " + ".join(f"mass_{reads.group_ids[name]}" for name in names)
        text = triton_text(weight, reads.end_names)
        # A weight may divide by the mass of its group: without keys the group adds nothing, whatever its weight.
        lines.append(f"    weight_{index} = tl.where({total} > 0, {text}, 0.0) / normaliser  # {', '.join(names)}")
    return lines


def chosen(groups: Groups, names: tuple[str, ...]) -> str:
    """Which keys of a block are in one of the groups."""
    terms = " | ".join(f"(group == {groups.names.index(name)})" for name in names)
    return f"({terms})" if len(names) > 1 else terms


def weigh(groups: Groups, reads: KernelReads) -> list[str]:
    """In the second walk: the normalised weight of every pair, times what its group counts."""
    factor = "0.0"
    for index, (_, names) in reversed(list(enumerate(shared_weights(groups)))):
        factor = f"tl.where({chosen(groups, names)}[None, :], weight_{index}[:, None], {factor})"
    return ["", _member(groups, reads), f"factor = {factor}", "weight = factor * tl.exp2(score - shift[:, None])"]
