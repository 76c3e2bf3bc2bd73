"""Costs in the report agree with torch's own counter."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rewrite import explain
from tests.models.architectures import ARCHITECTURES, IMPLEMENTATIONS, Architecture, rewritten

REWRITES = {"timm-deit-s-224": ["agent", "neighborhood(window=5)"], "llava": ["token_exit(layer=2)", "sink_redistribution(tau=2.0)"]}


def counted(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**inputs)
    return counter.get_total_flops()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda entry: entry.name)
def test_original_cost_is_within_one_percent(architecture: Architecture, implementation: str) -> None:
    model, inputs = architecture.build(implementation), architecture.inputs()
    report = explain(model, inputs)
    assert 2 * report.total_before.multiply_adds == pytest.approx(counted(model, inputs), rel=0.01)


@pytest.mark.parametrize(("name", "one"), [(name, one) for name, passes in REWRITES.items() for one in passes])
def test_rewritten_cost_is_what_the_counter_sees(name: str, one: str) -> None:
    architecture = next(entry for entry in ARCHITECTURES if entry.name == name)
    model, inputs = architecture.build("sdpa"), architecture.inputs()
    changed = rewritten(model, [one], inputs)
    assert 2 * changed.rewrite_report.total_after.multiply_adds == pytest.approx(counted(changed, inputs), rel=0.01)
