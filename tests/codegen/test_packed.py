"""Variable lengths: packed sequences against each of them alone."""

from __future__ import annotations

from dataclasses import replace

import attention_forms as forms
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from codegen import attend, packed, segment_ids
from rewrite.ir import I, J


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 150), min_size=1, max_size=6), st.sampled_from([(2, 2), (4, 2), (3, 1)]), st.booleans(), st.integers(0, 99))
def test_each_sequence_attends_to_itself(lengths: list[int], heads: tuple[int, int], is_causal: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    query, key, value = (torch.randn(1, n, total, 8, dtype=torch.float64, generator=generator).requires_grad_() for n in (*heads, heads[1]))
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    ids = segment_ids(ends, total)
    assert ids.tolist() == [[number for number, length in enumerate(lengths) for _ in range(length)]]
    operation = packed(replace(forms.plain(), mask=J <= I) if is_causal else forms.plain())
    found = attend(operation, query, key, value, {"query_segments": ids, "key_segments": ids})
    parts = zip(*(operand.split(lengths, 2) for operand in (query, key, value)), strict=True)
    alone = [functional.scaled_dot_product_attention(*own, is_causal=is_causal, scale=0.125, enable_gqa=True) for own in parts]
    reference = torch.cat(alone, 2)
    torch.testing.assert_close(found, reference, rtol=1e-10, atol=1e-10)
    received = torch.randn(reference.shape, dtype=torch.float64, generator=generator)
    operands = (query, key, value)
    for left, right in zip(torch.autograd.grad(found, operands, received), torch.autograd.grad(reference, operands, received), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-10)


def test_tokens_behind_the_end_are_apart() -> None:
    assert segment_ids(torch.tensor([0, 2, 2, 3]), 5).tolist() == [[0, 0, 2, 3, 3]]


def test_segments_are_of_rows() -> None:
    """Each row of a batch with a packing of its own."""
    query, key, value = torch.randn(3, 2, 2, 300, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ids = torch.cat([segment_ids(torch.tensor(ends), 300) for ends in ([0, 100, 300], [0, 200, 290, 300])])
    found = attend(packed(forms.plain()), query, key, value, {"query_segments": ids, "key_segments": ids})
    seen = ids[:, None, :, None] == ids[:, None, None]
    reference = functional.scaled_dot_product_attention(query, key, value, seen, scale=0.125)
    torch.testing.assert_close(found, reference, rtol=1e-10, atol=1e-10)
