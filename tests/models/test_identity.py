"""The identity setting of every pass leaves every model as it was, within float32 round-off."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import sympy
import torch

from rewrite import AttentionInputs, Fits, Pass, Site, available_passes, explain
from rewrite.ir import NK, J
from tests.models.architectures import ARCHITECTURES, IMPLEMENTATIONS, Architecture, call, rewritten


def lists_of_identities() -> list[list[Pass]]:
    """Every pass's identity setting, in as few lists as passes that exclude each other allow."""
    lists: list[list[Pass]] = []
    for one in [cls.identity() for cls in available_passes()]:
        if one is None:
            continue
        for together in lists:
            if not any(one.name in other.excludes or other.name in one.excludes for other in together):
                together.append(one)
                break
        else:
            lists.append([one])
    return lists


IDENTITIES = lists_of_identities()

# With one implementation of attention, in turns: the pass lists are what is tested here, and forms of attention below.
TURNS = [(entry, IMPLEMENTATIONS[place % len(IMPLEMENTATIONS)]) for place, entry in enumerate(ARCHITECTURES)]


@pytest.mark.parametrize(("architecture", "implementation"), TURNS, ids=[f"{entry.name}-{chosen}" for entry, chosen in TURNS])
def test_identity_changes_nothing(architecture: Architecture, implementation: str) -> None:
    """All that go together in one list, and each that rewrites anything alone (one that leaves every site as it is leaves the model)."""
    model, inputs = architecture.build(implementation), architecture.inputs()
    before = call(model, inputs)
    again = call(model, inputs)

    def changed_by(passes: list[Pass]) -> set[str]:
        """The passes that rewrote a site; fails where an output is another.

        What float32 can do to the model's own output is the scale: one unit in the last place per layer and a few per accumulated sum.
        """
        changed = rewritten(model, passes, inputs)
        for expected, repeated, actual in zip(before, again, call(changed, inputs), strict=True):
            assert torch.equal(expected, repeated)
            budget = 64 * architecture.sites * torch.finfo(torch.float32).eps * expected.abs().max()
            assert (actual - expected).abs().max() <= budget, list(map(str, passes))
        return {text for site in changed.rewrite_report.sites for text in site.passes}

    for together in IDENTITIES:
        acting = changed_by(together)
        for one in together:
            if str(one) in acting and len(together) > 1:
                changed_by([one])


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


@dataclass(frozen=True)
class SeesEverything(Pass):
    """Rewrites every site to what it is already: a static mask that hides nothing. What is tested is recognition and lowering."""

    name = "sees_everything"
    family = "sparsify"
    paper = "none; a test"
    formula = "a' = a"
    fits = Fits(kinds=frozenset({"self", "cross"}))

    def transform(self, site: Site) -> Site:
        return site.with_operations(replace(site.attend, mask=sympy.And(site.attend.mask, J <= NK)))

    def reference(self, attention: AttentionInputs) -> torch.Tensor:
        return attention.logits.softmax(-1) @ attention.value


@pytest.mark.parametrize(("architecture", "implementation"), TURNS, ids=[f"{entry.name}-{chosen}" for entry, chosen in TURNS])
def test_every_site_lowered_as_itself_computes_the_same(architecture: Architecture, implementation: str) -> None:
    model, inputs = architecture.build(implementation), architecture.inputs()
    changed = rewritten(model, [SeesEverything()], inputs)
    assert changed.rewrite_report.counts()["rewritten"] == architecture.sites
    # Rows of padding attend to nothing; what they hold is nobody's, and differs between torch's own kernels.
    real = inputs["attention_mask"].bool() if "attention_mask" in inputs else ...
    for expected, actual in zip(call(model, inputs), call(changed, inputs), strict=True):
        rows = real if isinstance(real, torch.Tensor) and expected.shape[:2] == real.shape else ...
        budget = 256 * architecture.sites * torch.finfo(torch.float32).eps * expected[rows].abs().max()
        assert (actual - expected)[rows].abs().max() <= budget
