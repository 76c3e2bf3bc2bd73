"""Whether a call goes through the state, and with which operation.

Models hand causal masks and padding over as one tensor by query and key, which has no state form whatever it holds. On the CPU it is looked
at: where it says of every pair what the padding of the keys and the order of the tokens say, it is read as these. That takes a comparison
for each pair and batch, where pair by pair each head would multiply. A GPU would have to be waited for, and is not asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import sympy
import torch

from codegen.contraction_order import Sizes, StatePlan, state_plan
from codegen.interval_plan import interval_plan
from codegen.intervals import by_integers, intervals
from codegen.state_form import StateForm, has_sorted_keys, split_by_side, state_form
from codegen.torch_state import StateReads
from rewrite.ir.expression import NK, NQ, I, J, conjuncts, letters, tensor
from rewrite.ir.operations import Attend
from rewrite.ir.semantics import aligned

# Queries compared at a time, so that nothing as large as the mask is made.
ROWS_AT_A_TIME = 256


@dataclass(frozen=True)
class Reading:
    """An operation whose mask tensor is read at keys alone. name, axes: the tensor and its letters as it is given; causal: with j <= i."""

    attend: Attend
    name: str
    axes: str
    causal: bool

    def holds(self, given: torch.Tensor, n_queries: int, n_keys: int) -> bool:
        """Whether the mask says of every pair what the last query's row and, where `causal`, the order of the tokens say."""
        seen = aligned(given, self.axes)
        seen = (seen if seen.dtype == torch.bool else seen != 0).expand(-1, -1, n_queries, n_keys)
        keys, columns = seen[:, :, -1:], torch.arange(n_keys, device=given.device)
        for start in range(0, n_queries, ROWS_AT_A_TIME):
            rows = torch.arange(start, min(start + ROWS_AT_A_TIME, n_queries), device=given.device)
            own = seen[:, :, start : start + ROWS_AT_A_TIME]
            wanted = keys & (columns <= rows[:, None] + (n_keys - n_queries)) if self.causal else keys.expand_as(own)
            if not torch.equal(own, wanted):
                return False
        return True

    def tensors(self, given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors as the operation reads them."""
        return {**given, self.name: given[self.name].select(self.axes.index("i"), -1)}


@lru_cache(maxsize=1024)
def mask_readings(attend: Attend) -> tuple[Reading, ...]:
    """The operation with its mask tensor read as padding and order, and as padding alone, as far as these have state forms."""
    if not isinstance(state_form(attend), str):
        return ()
    found = []
    for term in conjuncts(attend.mask):
        read = term.lhs if isinstance(term, sympy.Ne) and term.rhs == 0 else None
        axes = letters(read.indices) if isinstance(read, sympy.Indexed) else None
        if read is None or axes is None or not {"i", "j"} <= set(axes):
            continue
        name = str(read.base.label)
        padding = sympy.Ne(tensor(name, axes.replace("i", "")), 0)
        for causal in (True, False):
            mask = sympy.And(*(each for each in conjuncts(attend.mask) if each != term), padding, *([J <= I + (NK - NQ)] if causal else []))
            if attend.score.has(read) or attend.weight.has(read):
                continue
            simpler = replace(attend, mask=mask)
            if not isinstance(state_form(simpler), str):
                found.append(Reading(simpler, name, axes, causal))
    return tuple(found)


Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Runs = list[tuple[StateReads, StatePlan]]


def through_state(attend: Attend, operands: Operands, tensors: Mapping[str, torch.Tensor]) -> Runs | None:
    """What a call needs that goes through the state, each part of its batch, or None where it goes pair by pair.

    operands: query, key, value.
    """
    sizes = Sizes.of(*operands)
    on_cpu = operands[0].device.type == "cpu"
    plan = state_plan(attend, sizes)
    if plan is not None:
        return _runs(attend, operands, tensors, plan)
    for reading in mask_readings(attend) if on_cpu else ():
        plan = state_plan(reading.attend, sizes)
        if plan is not None and reading.holds(tensors[reading.name], sizes.n_queries, sizes.n_keys):
            return _runs(reading.attend, operands, reading.tensors(tensors), plan)
    return None


def _runs(attend: Attend, operands: Operands, tensors: Mapping[str, torch.Tensor], plan: StatePlan) -> Runs | None:
    """Of an operation whose segments, if it has any, are known where the call runs: on the CPU. plan: as of one segment."""
    if not has_sorted_keys(attend):
        return [(StateReads(attend, operands, tensors), plan)]
    sides = split_by_side(attend.mask)
    if operands[0].device.type != "cpu" or not by_integers(sides, tensors):
        return None
    form = state_form(attend)
    assert isinstance(form, StateForm)
    found = interval_plan(form, Sizes.of(*operands), intervals(sides, tensors, operands[0], operands[1]))
    return None if found is None else [(StateReads(attend, operands, tensors, places), steps) for places, steps in found]


# How a call is computed on a device: by kernels that carry a state, through it in torch operators, or pair by pair.
Way = Literal["kernels", "torch", "pairs"]


def way_on_device(attend: Attend, operands: Operands, tensors: Mapping[str, torch.Tensor], without_kernels: str | None) -> Way:
    """By the sizes of a call alone. without_kernels: why no kernels carry a state for it, or None.

    In torch operators segments would have to be looked at, so that their pairs are computed instead.
    """
    if state_plan(attend, Sizes.of(*operands)) is None or not by_integers(split_by_side(attend.mask), tensors):
        return "pairs"
    return "kernels" if without_kernels is None else "pairs" if has_sorted_keys(attend) else "torch"
