"""Every spelling is read as the one attention it is, and lowering what was read changes nothing."""

from __future__ import annotations

import pytest
import torch
from capture import names, relowered
from spellings import SPELLINGS, C, Spelling


@pytest.mark.parametrize("spelling", SPELLINGS, ids=str)
def test_is_read_and_lowered_as_read(spelling: Spelling) -> None:
    model, inputs = spelling.make(), spelling.inputs()
    with torch.no_grad():
        expected = model(*inputs)
    actual, capture = relowered(model, *inputs)

    assert capture.recognition.misses == []
    (found,) = capture.recognition.found
    assert found.region.sizes == spelling.sizes
    assert found.site.dims.items() >= spelling.sizes.items()
    assert found.site.kind == spelling.kind
    assert found.site.causal is spelling.causal
    assert found.site.dropout == spelling.dropout
    assert not found.site.map_read
    assert capture.proofs == [None]

    operators = names(capture.graphs[0].graph)
    assert "softmax" not in operators
    assert "attention" not in operators
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    if not spelling.dropout:
        # Sums over channels and keys, rounded in another order.
        budget = torch.finfo(torch.float32).eps * (64 + C + spelling.sizes["Nk"]) * expected.abs().max().item()
        assert (actual - expected).abs().max().item() <= budget
