"""In which way the CPU lowering computes an attention, and what that takes: what a prediction of its time is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, get_args

import torch

from codegen.contraction_order import Sizes, state_plan
from codegen.multiply_adds import computed_multiply_adds
from codegen.torch_streaming import HELD, fused_score, fused_visits, static_visits
from codegen.visits import Visit
from rewrite.ir.operations import Attend

# "fused": one call of torch's fused attention. "banded": one for each block of queries, on the keys that it sees, with its mask.
# "gathered": on blocks of keys that the data choose. "grouped": matrix products block by block, reweighted between groups of keys.
# "blocks": other such. "state": linear attention through its state.
Skeleton = Literal["fused", "banded", "gathered", "grouped", "blocks", "state"]
SKELETONS: tuple[Skeleton, ...] = get_args(Skeleton)

# Of torch's fused CPU attention (kvSplitSize).
KEYS_AT_A_TIME = 512


class Work(NamedTuple):
    """calls: how many of what the skeleton repeats (blocks or chunks of queries). multiply_adds: with those that a block's mask hides."""

    skeleton: Skeleton
    multiply_adds: int
    calls: int = 1


def work(attend: Attend, sizes: Mapping[str, int]) -> Work:
    """What an attention takes. sizes: B, H, Hkv, Nq, Nk, D and Dv."""
    multiply_adds = computed_multiply_adds(attend, sizes)
    plan = state_plan(attend, Sizes.named(sizes))
    if plan is not None:
        return Work("state", multiply_adds, len(plan.steps))
    if attend.choice is not None:
        return Work("gathered", multiply_adds)
    linear, for_a_pair = fused_score(attend), sizes["B"] * sizes["H"] * (sizes["D"] + sizes["Dv"])
    if linear is None:
        visits = static_visits(attend, Sizes.named(sizes), torch.device("cpu"), HELD)
        return Work("grouped" if attend.groups is not None else "blocks", for_a_pair * _pairs(visits))
    visits = fused_visits(attend, linear[1], sizes["Nq"], sizes["Nk"], torch.device("cpu"))
    if len(visits) == 1 and visits[0].causal:
        return Work("fused", for_a_pair * causal_pairs(sizes["Nk"]))
    if len(visits) == 1 and visits[0].seen is None:
        return Work("fused", multiply_adds)
    return Work("banded", for_a_pair * _pairs(visits), len(visits))


def _pairs(visits: Sequence[Visit]) -> int:
    return sum(visit.n_queries * visit.n_keys for visit in visits)


def causal_pairs(tokens: int) -> int:
    """Pairs that torch's fused CPU attention computes of a causal map: it leaves out keys in blocks of `KEYS_AT_A_TIME`."""
    starts = range(0, tokens, KEYS_AT_A_TIME)
    return sum(min(KEYS_AT_A_TIME, tokens - start) * min(tokens, start + KEYS_AT_A_TIME) for start in starts)
