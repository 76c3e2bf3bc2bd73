"""The identity setting of every pass leaves every model as it was, within float32 round-off."""

from __future__ import annotations

import pytest
import torch

from rewrite import available_passes, explain
from tests.models.architectures import ARCHITECTURES, IMPLEMENTATIONS, Architecture, call, rewritten

IDENTITIES = [cls.identity() for cls in available_passes() if cls.identity() is not None]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda entry: entry.name)
def test_identity_changes_nothing(architecture: Architecture, implementation: str) -> None:
    model, inputs = architecture.build(implementation), architecture.inputs()
    before = call(model, inputs)
    again = call(model, inputs)
    # What float32 can do to the model's own output is the scale: one unit in the last place per layer and a few per accumulated sum.
    for one in IDENTITIES:
        changed = rewritten(model, [one], inputs)
        for expected, repeated, actual in zip(before, again, call(changed, inputs), strict=True):
            assert torch.equal(expected, repeated)
            budget = 64 * architecture.sites * torch.finfo(torch.float32).eps * expected.abs().max()
            assert (actual - expected).abs().max() <= budget, str(one)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda entry: entry.name)
def test_every_site_is_found_and_described(architecture: Architecture, implementation: str) -> None:
    report = explain(architecture.build(implementation), architecture.inputs())
    assert len(report.sites) == architecture.sites
    assert not report.near_misses
    assert {site.heads for site in report.sites} == {architecture.heads}
    assert {site.kind for site in report.sites} == {"self"}
    assert sum(site.causal for site in report.sites) == architecture.causal_sites
    assert all(site.status == "kept" for site in report.sites)
    if architecture.grid is not None:
        height, width = architecture.grid
        vision = [site for site in report.sites if not site.causal]
        assert {site.tokens for site in vision} == {architecture.prefix + height * width}
        assert {site.token_layout for site in vision} == {f"{architecture.prefix} prefix + grid {height}x{width}"}
        assert [(token.grid, token.prefix) for token in report.tokens if token.grid] == [(architecture.grid, architecture.prefix)]
    assert any(token.visual for token in report.tokens) == architecture.visual
