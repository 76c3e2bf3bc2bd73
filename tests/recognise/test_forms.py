"""Every form of attention is read as the operation it is, and lowering what was read changes nothing."""

from __future__ import annotations

import pytest
import torch
from capture import relowered
from forms import FORMS, Form
from spellings import C


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_is_read_and_lowered_as_read(form: Form) -> None:
    model, inputs = form.make(), form.inputs()
    with torch.no_grad():
        expected = model(*inputs)
    actual, capture = relowered(model, *inputs)

    assert capture.recognition.misses == []
    (found,) = capture.recognition.found
    assert found.region.sizes == form.sizes
    assert found.site.kind == form.kind
    attend = found.region.attend
    assert {name: str(getattr(attend, name)) for name in form.reads} == form.reads
    assert capture.proofs == [None]
    targets = {node.target for node in capture.graphs[0].graph.nodes}
    assert torch.ops.rewrite.attend.default in targets
    # Sums over channels and keys, rounded in another order.
    budget = torch.finfo(torch.float32).eps * (64 + C + sum(form.sizes.values())) * expected.abs().max().item()
    assert (actual - expected).abs().max().item() <= budget
