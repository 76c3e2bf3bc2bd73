"""Predictions, warnings and `only_if_faster`, on devices that are made up; and that what is measured are the forms themselves."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

import codegen
from rewrite import PassError, SlowerWarning, explain, prediction, rewrite
from rewrite.ir import QK, Attend, Body, I, J, Program, Site, TokenLayout, parse_pass
from rewrite.machine import Ceiling, Machine, machine_of
from rewrite.prediction import predict
from tests.api.small import images, run, vit

WAYS = (*codegen.SKELETONS, "sdpa", "eager", "large", "plain", "linear", "moved")
SLOW, QUICK = "sparsifiner(keep=0.5)", "agent(tokens=4)"


def device(bandwidth: float = 1e15, **calls: float) -> Machine:
    """1e11 multiply-adds per second in every way; seconds of a call by way, none where it is not given."""
    return Machine({way: Ceiling(calls.get(way, 0.0), 1e11) for way in WAYS}, bandwidth, bandwidth)


def use(monkeypatch: pytest.MonkeyPatch, machine: Machine) -> None:
    monkeypatch.setattr(prediction, "machine_of", lambda *_: machine)


def site(tokens: int, **options: Any) -> Site:
    dims = {"B": 1, "H": 2, "Hkv": 2, "Nq": tokens, "Nk": tokens, "D": 32, "Dv": 32}
    attend = Attend("output", "query", "key", "value", 0.125 * QK, **options)
    return Site("site", 0, 1, 0, "self", Body((attend,)), dims, TokenLayout((8, tokens // 8)), ("query", "key", "value"))


def rewritten(text: str, place: Site) -> Site:
    return parse_pass(text).apply(Program((place,))).sites[0]


def test_the_roofline_is_what_it_says() -> None:
    place = site(64)
    after = rewritten("agent(tokens=16)", place)
    # By hand: 2 heads, 64 tokens, 16 agents, 32 + 32 channels.
    before_adds, after_adds = 2 * 64 * 64 * 64, 2 * (2 * 64 * 16 * 64)
    found = predict(place, after, 4, False, device())
    assert found.before == pytest.approx(before_adds / 1e11)
    # Pooling the agents multiplies nothing, and its bytes take next to no time here.
    assert found.after == pytest.approx(after_adds / 1e11, rel=1e-4)
    calls = predict(place, after, 4, False, device(fused=1e-3, sdpa=1e-4))
    assert calls.before == pytest.approx(1e-4 + before_adds / 1e11)
    assert calls.after == pytest.approx(2 * 1e-3 + after_adds / 1e11, rel=1e-4)
    # A map that is written out moves four times, beside queries, keys, values and result.
    moved = predict(place, after, 4, True, device(bandwidth=1.0))
    assert moved.before == pytest.approx(4 * (4 * 2 * 64 * 64 + 2 * 2 * 64 * 64))


def test_every_way_of_computing_is_told_apart() -> None:
    long = site(1024)
    ways = {
        "temperature(value=2.0)": "fused",
        "window(window=32)": "banded",
        "routed(regions=8)": "gathered",
        "sigmoid": "blocks",
        "hedgehog(features=8)": "state",
    }
    for text, way in ways.items():
        after = rewritten(text, long)
        [attend] = after.body.attends()
        width = {"D": 16} if way == "state" else {}
        work = codegen.work(attend, {**long.dims, **width})
        assert work.skeleton == way, text
        assert (work.calls > 1) == (way == "banded")
        # A dear call of that way, and of no other, makes the prediction slower.
        assert predict(long, after, 4, False, device(**{way: 1.0})).ratio > 1
        others = {other: 1.0 for other in WAYS if other not in (way, "sdpa", "plain", "linear", "moved")}
        assert predict(long, after, 4, False, device(**others)).after < 1


@pytest.mark.parametrize(("tokens", "share"), [(197, 1.0), (1024, 0.75), (4096, 9 / 16)])
def test_a_causal_call_leaves_out_whole_blocks_of_keys(tokens: int, share: float) -> None:
    causal = site(tokens, mask=J <= I)
    work = codegen.work(causal.attend, causal.dims)
    assert work.skeleton == "fused"
    assert work.multiply_adds == share * codegen.work(site(tokens).attend, causal.dims).multiply_adds


def test_one_warning_names_what_is_slower_and_by_how_much(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, device())
    with pytest.warns(SlowerWarning) as caught:
        changed = rewrite(vit(), [SLOW], example_inputs=(images(),))
    [warning] = [each for each in caught if each.category is SlowerWarning]
    told = str(warning.message)
    assert "N=50: 1.5x more multiply-adds" in told
    assert "vit.layers.0.attention, vit.layers.1.attention" in told
    assert changed.rewrite_report.counts()["rewritten"] == 2
    ratios = {site.predicted.ratio for site in changed.rewrite_report.sites}
    assert all(ratio > 1 for ratio in ratios)
    assert "predicted" in str(changed.rewrite_report)
    assert changed.rewrite_report.to_dict()["sites"][0]["predicted"]["after"] > 0
    with warnings.catch_warnings():
        warnings.simplefilter("error", SlowerWarning)
        rewrite(vit(), [QUICK], example_inputs=(images(),))
        # Nothing is done, so nothing is said.
        explain(vit(), (images(),), [SLOW])


def test_only_if_faster_declines_what_is_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, device(fused=1.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error", SlowerWarning)
        kept = rewrite(vit(), [QUICK], example_inputs=(images(),), only_if_faster=True)
    assert torch.equal(run(kept, images()), run(vit(), images()))
    assert kept.rewrite_report.counts() == {"rewritten": 0, "kept": 0, "declined": 2}
    assert all("agent(tokens=4): it is predicted to take" in site.reason for site in kept.rewrite_report.sites)
    # Other sizes than the first are held to the same decision.
    assert torch.equal(run(kept, images(batch=3)), run(vit(), images(batch=3)))
    use(monkeypatch, device())
    changed = rewrite(vit(), [QUICK], example_inputs=(images(),), only_if_faster=True)
    assert changed.rewrite_report.counts()["rewritten"] == 2
    assert torch.equal(run(changed, images()), run(rewrite(vit(), [QUICK], example_inputs=(images(),)), images()))
    # What is declined adds no parameters.
    learned = rewrite(vit(), [SLOW], example_inputs=(images(),), only_if_faster=True)
    assert not any(name.startswith("rewrite_added") for name in learned.state_dict())


def test_measured_beside_predicted() -> None:
    changed = rewrite(vit(), [QUICK], example_inputs=(images(),), measure=True)
    for site_ in changed.rewrite_report.sites:
        assert site_.measured.before > 0
        assert site_.measured.after > 0
        assert site_.predicted is not None
    assert changed.rewrite_report.measured.before > 0
    assert changed.rewrite_report.measured.after > 0
    assert "whole model as measured" in str(changed.rewrite_report)
    assert torch.equal(run(changed, images()), run(rewrite(vit(), [QUICK], example_inputs=(images(),)), images()))
    with pytest.raises(PassError, match="needs example_inputs"):
        rewrite(vit(), [QUICK], measure=True)


def test_a_device_is_measured_once() -> None:
    found = machine_of(torch.device("cpu"), torch.float32)
    assert set(found.ceilings) == set(WAYS)
    assert all(each.call > 0 and each.rate > 0 for each in found.ceilings.values())
    assert found.bandwidth > 0
    assert machine_of(torch.device("cpu"), torch.float32) is found


def test_a_whole_model_counts_every_operator_on_the_tokens_that_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where multiply-adds are all that takes time, the prediction is their ratio; where bytes are, norms and activations count too."""
    use(monkeypatch, device())
    report = explain(vit(), (images(),), ["evit(keep=0.5, layers=(0,))"])
    before, after = report.total_before.multiply_adds, report.total_after.multiply_adds
    assert before > 1.2 * after
    assert report.predicted.before == pytest.approx(before / 1e11, rel=1e-3)
    assert report.predicted.after == pytest.approx(after / 1e11, rel=1e-3)
    assert f"{before / after:.2f}x as fast" in str(report)
    use(monkeypatch, device(bandwidth=1.0))
    moved = explain(vit(), (images(),), ["evit(keep=0.5, layers=(0,))"]).predicted
    assert moved.before > 1.5 * report.total_before.bytes
    assert 1.05 < moved.before / moved.after < before / after
    assert explain(vit(), (images(),)).predicted is None
