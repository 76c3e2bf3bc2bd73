"""Static masks as lists of work."""

from __future__ import annotations

import attention_forms as forms
import pytest
import sympy
import torch

from codegen.block_list import block_list, transposed_block_list
from codegen.masks import split_mask, static_key
from codegen.query_order import query_order
from codegen.visits import Plan, best_plan, visits
from rewrite.ir import NK, NQ, Attend, H, I, J, semantics, tensor

CPU = torch.device("cpu")
MASKS = {
    "causal": (forms.causal(), 50, 77),
    "1-D": (forms.neighbourhood_1d(70, 9, 3, 2), 72, 72),
    "2-D": (forms.neighbourhood_2d(9, 11, 5, 1, 3), 102, 102),
    "2-D, dilated": (forms.neighbourhood_2d(9, 11, 3, 2), 99, 99),
    "empty rows": (forms.empty_rows(), 40, 33),
}


def dense(attend: Attend, n_queries: int, n_keys: int) -> torch.Tensor:
    seen = semantics.evaluate_expression(attend.mask, semantics.positions(n_queries, n_keys, CPU))
    return torch.as_tensor(seen).expand(1, 1, n_queries, n_keys)[0, 0]


@pytest.mark.parametrize("form", MASKS)
def test_block_list(form: str) -> None:
    attend, n_queries, n_keys = MASKS[form]
    starts, blocks = block_list(static_key(attend.mask), n_queries, n_keys, (16, 8), CPU)
    seen = dense(attend, n_queries, n_keys)
    assert starts.dtype == blocks.dtype == torch.int32
    for query_block in range(-(-n_queries // 16)):
        begin, middle, end = starts[2 * query_block : 2 * query_block + 3].tolist()
        full, partial = set(blocks[begin:middle].tolist()), set(blocks[middle:end].tolist())
        for key_block in range(-(-n_keys // 8)):
            part = seen[16 * query_block : 16 * query_block + 16, 8 * key_block : 8 * key_block + 8]
            is_full = bool(part.all()) and part.shape[1] == 8
            assert (key_block in full) == is_full
            assert (key_block in partial) == (bool(part.any()) and not is_full)


@pytest.mark.parametrize("form", MASKS)
def test_transposed_block_list(form: str) -> None:
    attend, n_queries, n_keys = MASKS[form]
    starts, blocks = transposed_block_list(static_key(attend.mask), n_queries, n_keys, (16, 8), CPU)
    seen = dense(attend, n_queries, n_keys)
    assert starts.dtype == blocks.dtype == torch.int32
    for key_block in range(-(-n_keys // 8)):
        begin, middle, end = starts[2 * key_block : 2 * key_block + 3].tolist()
        full, partial = set(blocks[begin:middle].tolist()), set(blocks[middle:end].tolist())
        for query_block in range(-(-n_queries // 16)):
            part = seen[16 * query_block : 16 * query_block + 16, 8 * key_block : 8 * key_block + 8]
            # Keys past the end are nobody's; queries past the end have to be left out.
            is_full = bool(part.all()) and part.shape[0] == 16
            assert (query_block in full) == is_full
            assert (query_block in partial) == (bool(part.any()) and not is_full)


@pytest.mark.parametrize("form", MASKS)
@pytest.mark.parametrize("ordered", [False, True])
def test_visits_cover_every_pair_once(form: str, ordered: bool) -> None:
    attend, n_queries, n_keys = MASKS[form]
    covered = torch.zeros(n_queries, n_keys, dtype=torch.int64)
    for visit in visits(static_key(attend.mask), n_queries, n_keys, Plan(32, ordered), CPU):
        rows, columns = visit.query_positions(CPU), visit.key_positions(CPU)
        seen = torch.ones(visit.n_queries, len(columns), dtype=torch.bool) if visit.seen is None else visit.seen
        covered[rows[:, None], columns] += seen
    assert torch.equal(covered, dense(attend, n_queries, n_keys).long())


def test_blocks_suit_the_mask() -> None:
    wide, narrow = forms.causal(), forms.neighbourhood_1d(4096, 33)
    assert best_plan(static_key(wide.mask), 1024, 1024) == Plan(256)
    assert best_plan(static_key(narrow.mask), 2048, 2048).block <= 128


def pairs_visited(attend: Attend, n: int, plan: Plan) -> int:
    key = static_key(attend.mask)
    return sum(visit.n_queries * len(visit.key_positions(CPU)) for visit in visits(key, n, n, plan, CPU))


@pytest.mark.parametrize("dilation", [1, 2])
def test_the_order_of_queries_makes_tiles_of_a_grid(dilation: int) -> None:
    """64 queries in a row of a 32-wide grid need whole rows of keys; a tile of 8 x 8 needs (8 + 6)^2 or, dilated, one residue class."""
    attend = forms.neighbourhood_2d(32, 32, 7, dilation)
    assert pairs_visited(attend, 1024, Plan(64, True)) < 0.8 * pairs_visited(attend, 1024, Plan(64, False))


def test_a_sequence_keeps_its_order() -> None:
    assert query_order(static_key(forms.causal().mask), 64, 64) is None
    assert query_order(static_key(forms.neighbourhood_1d(64, 9).mask), 64, 64) is None


def test_what_is_static() -> None:
    causal, tensor_term, per_head = J <= I + (NK - NQ), sympy.Ne(tensor("mask", "bij"), 0), J >= H
    static, dynamic = split_mask(sympy.And(causal, tensor_term, per_head))
    assert static == causal
    assert dynamic == sympy.And(tensor_term, per_head)


@pytest.mark.parametrize("both_sides", [True, False])
def test_residues_are_told_however_they_are_compared(both_sides: bool) -> None:
    """Every third token: queries of one residue are put together, and a block of them visits a third of the keys."""
    equal = sympy.Eq(sympy.Mod(I, 3), sympy.Mod(J, 3)) if both_sides else sympy.Eq(sympy.Mod(I - J, 3), 0)
    order = query_order(static_key(equal), 96, 96)
    assert order is not None
    assert (order.view(3, 32) % 3 == torch.arange(3)[:, None]).all()
    assert all(len(visit.key_positions(CPU)) == 32 for visit in visits(static_key(equal), 96, 96, Plan(32, True), CPU))
