"""Static masks as lists of work."""

from __future__ import annotations

import attention_forms as forms
import pytest
import sympy
import torch

from codegen.block_list import block_list
from codegen.masks import split_mask, static_key
from codegen.visits import best_block, visits
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
def test_visits_cover_every_pair_once(form: str) -> None:
    attend, n_queries, n_keys = MASKS[form]
    covered = torch.zeros(n_queries, n_keys, dtype=torch.int64)
    for visit in visits(static_key(attend.mask), n_queries, n_keys, 32, CPU):
        count = visit.rows.stop - visit.rows.start
        columns = visit.key_positions(CPU)
        seen = torch.ones(count, len(columns), dtype=torch.bool) if visit.seen is None else visit.seen
        covered[visit.rows.start : visit.rows.stop, columns] += seen
    assert torch.equal(covered, dense(attend, n_queries, n_keys).long())


def test_blocks_suit_the_mask() -> None:
    wide, narrow = forms.causal(), forms.neighbourhood_1d(4096, 33)
    assert best_block(static_key(wide.mask), 2048, 2048) == 256
    assert best_block(static_key(narrow.mask), 4096, 4096) <= 128


def test_what_is_static() -> None:
    causal, tensor_term, per_head = J <= I + (NK - NQ), sympy.Ne(tensor("mask", "bij"), 0), J >= H
    static, dynamic = split_mask(sympy.And(causal, tensor_term, per_head))
    assert static == causal
    assert dynamic == sympy.And(tensor_term, per_head)
