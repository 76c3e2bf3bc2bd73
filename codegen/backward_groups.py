"""Lines of the backward kernels for groups of keys that are reweighted by their masses.

With a the softmax weights, t[i,j] = d_out[i] . v[j], m_g the mass of group g and c_g = sum of a t over its keys, a pair of group g has

    p = W_g a        da = W_g t + O_g        O_g = sum_f c_f dW_f/dm_g        sum_j a da = sum_g (W_g c_g + m_g O_g)

and a tensor that the weights read gets  sum_g c_g dW_g/dtensor  (`codegen.attention_block`). The kernel that owns queries walks once for
the masses and c, once for the gradients, and leaves W and O of every query; they stand in a tile like the factor of a weight expression.
"""

from __future__ import annotations

import sympy

from codegen.kernel_reads import KernelReads
from codegen.tensor_reads import derivative
from codegen.triton_printer import triton_text
from rewrite.ir.expression import mass
from rewrite.ir.operations import Groups


def group_facts(groups: Groups) -> tuple[str, ...]:
    """What the kernel that owns queries leaves of each: W and O of every group."""
    return tuple(f"group_{what}_{index}" for index in range(len(groups.names)) for what in ("weight", "offset"))


def load_group(groups: Groups, reads: KernelReads) -> str:
    return f"group = {reads.load(groups.membership, 'tile' if reads.owner == 'queries' else 'keys')}"


def group_factors(groups: Groups, reads: KernelReads) -> list[str]:
    """factor and offset of every pair of a tile; keys of no group count for nothing."""
    lines = []
    for name, what in (("factor", "weight"), ("offset", "offset")):
        text = "0.0"
        for index in reversed(range(len(groups.names))):
            text = f"tl.where(group == {index}, group_{what}_{index}{reads.by_query}, {text})"
        lines.append(f"{name} = {text}")
    return lines


def zero_sums(reads: KernelReads) -> list[str]:
    """Before the first walk."""
    sums = [f"{what}_{identifier}" for identifier in reads.group_ids.values() for what in ("mass", "gathered")]
    return [f"{name} = tl.zeros([BLOCK_Q], tl.float32)" for name in sums]


def add_sums(groups: Groups, reads: KernelReads) -> list[str]:
    """In the first walk: masses, and what the weights of each group would receive."""
    lines = [load_group(groups, reads)]
    for index, identifier in enumerate(reads.group_ids.values()):
        lines += [
            f"of_group = tl.where(group == {index}, weight, 0.0)",
            f"mass_{identifier} += tl.sum(of_group, 1)",
            f"gathered_{identifier} += tl.sum(of_group * d_weight, 1)",
        ]
    return lines


def group_weights(groups: Groups, reads: KernelReads) -> list[str]:
    """Behind the first walk: W and O of every group, and counted = sum_j a da."""
    lines = [line.removeprefix("    ") for line in reads.outside_loop("end", *groups.weights)]
    ids = reads.group_ids
    lines += [f"group_weight_{index} = {_where_any(groups, reads, index, weight)}" for index, weight in enumerate(groups.weights)]
    for index, name in enumerate(groups.names):
        terms = _gathered(groups, reads, mass(name))
        lines.append(f"group_offset_{index} = {' + '.join([*terms, 'tl.zeros([BLOCK_Q], tl.float32)'])}")
    counted = [f"group_weight_{i} * gathered_{ids[name]} + mass_{ids[name]} * group_offset_{i}" for i, name in enumerate(groups.names)]
    return [*lines, "counted = tl.zeros([BLOCK_Q], tl.float32)", *(f"counted += {part}" for part in counted)]


def group_changes(groups: Groups, reads: KernelReads, variable: sympy.Basic, gradient: str) -> list[str]:
    """What the weights give to the gradient of a tensor that they read, of every query."""
    return [f"{gradient}_rows += {term}" for term in _gathered(groups, reads, variable)]


def _gathered(groups: Groups, reads: KernelReads, variable: sympy.Basic) -> list[str]:
    """The terms  c_f dW_f/dvariable  that are not zero."""
    slopes = [(index, sympy.sympify(derivative(weight, variable))) for index, weight in enumerate(groups.weights)]
    ids = list(reads.group_ids.values())
    return [f"gathered_{ids[index]} * {_where_any(groups, reads, index, slope)}" for index, slope in slopes if slope != 0]


def _where_any(groups: Groups, reads: KernelReads, index: int, expression: sympy.Expr) -> str:
    """The expression where its group has keys: it may divide by the mass."""
    identifier = reads.group_ids[groups.names[index]]
    return f"tl.where(mass_{identifier} > 0, {triton_text(sympy.sympify(expression), reads.end_names)}, 0.0)"
