"""Which heads are changed, and that attention is moved and not made."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from synthetic_sites import CAUSAL, CHANNELS, IMAGE, SINKS, SITES, example, site

from passes import SinkRedistribution
from rewrite.ir import NotApplicableError, PassError, Program, SinkGroups
from rewrite.ir.semantics import attention_weights, evaluate_expression, evaluate_operation
from rewrite.ir.site_operations import sink_groups

CASE = "image and text"


def maps(setting: SinkRedistribution, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, H, Nq, Nk] before and after."""
    shown = example(SITES[CASE], seed)
    operations = setting.apply(Program((shown.site,))).sites[0].body.operations
    values = dict(shown.operands)
    evaluate_operation(operations[0], values)
    return shown.logits.softmax(-1), attention_weights(operations[1], values)


def test_rows_still_sum_to_one_and_some_heads_are_left_alone() -> None:
    changed = []
    for seed in range(4):
        before, after = maps(SinkRedistribution(), seed)
        torch.testing.assert_close(after.sum(-1), torch.ones_like(after.sum(-1)), rtol=1e-12, atol=1e-12)
        changed.append((before - after).abs().amax(-1) > 1e-12)
    rows = torch.stack(changed)[:, 0]
    after_image = rows[..., max(IMAGE) + 1 :]
    assert after_image.any()
    assert not after_image.all()
    assert not rows[..., : max(IMAGE) + 1].any()


def test_what_sinks_lose_goes_to_the_rest_of_the_image() -> None:
    before, after = maps(SinkRedistribution(p=0.0, rho=0.999, summ=0.01))
    query, others = -1, [token for token in IMAGE if token not in SINKS]
    assert (after[0, :, query, list(SINKS)] == 0).all()
    gain = after[0, :, query, others] / before[0, :, query, others]
    torch.testing.assert_close(gain, gain[:, :1].expand_as(gain))
    assert (gain > 1).all()
    torch.testing.assert_close(after[0, :, query, 16:], before[0, :, query, 16:], rtol=1e-12, atol=1e-12)


def test_decoding_with_cached_groups_continues_the_full_sequence() -> None:
    full, step = example(SITES[CASE]), replace(SITES["step of four"])
    whole = SinkRedistribution().apply(Program((full.site,)))
    part = SinkRedistribution().apply(Program((step,)))
    operands = {name: entry[:, :, -4:] if name == "query" else entry for name, entry in full.operands.items()}
    operands |= {name: full.operands[name][:, -4:] for name in ("hidden", "visual")}
    output = replace(full, site=step, operands=operands).output(part, {})
    torch.testing.assert_close(output, full.output(whole, {})[:, :, -4:], rtol=1e-12, atol=1e-12)


def test_a_row_without_visual_sinks_is_left_alone() -> None:
    shown = example(SITES[CASE])
    operands = {**shown.operands, "hidden": torch.ones_like(shown.operands["hidden"])}
    program = SinkRedistribution().apply(Program((shown.site,)))
    torch.testing.assert_close(replace(shown, operands=operands).output(program, {}), shown.output(Program((shown.site,)), {}))


def test_an_image_of_nothing_but_sinks_is_left_alone_and_stays_finite() -> None:
    shown = example(SITES[CASE])
    hidden = shown.hidden.clone()
    hidden[..., 7] = 1e4
    program = SinkRedistribution(rho=1.0, summ=0.0).apply(Program((shown.site,)))
    output = replace(shown, operands={**shown.operands, "hidden": hidden}).output(program, {})
    torch.testing.assert_close(output, shown.output(Program((shown.site,)), {}), rtol=1e-12, atol=1e-12)


def test_gradients_are_finite() -> None:
    shown = example(SITES[CASE])
    operands = {name: entry.clone().requires_grad_(name in ("query", "key", "value")) for name, entry in shown.operands.items()}
    replace(shown, operands=operands).output(SinkRedistribution().apply(Program((shown.site,))), {}).square().sum().backward()
    assert all(operands[name].grad.isfinite().all() for name in ("query", "key", "value"))


def test_sinks_are_known_by_the_given_channels_only() -> None:
    shown = example(SITES[CASE])
    operation = SinkGroups("g", "a", "c", "hidden", "visual", dims=(8,), threshold=20.0)
    assert not (sink_groups(operation, shown.operands)[0] > 1).any()
    codes = sink_groups(replace(operation, dims=(8, 7)), shown.operands)[0]
    assert codes[0].tolist() == [3, 0, 0, 1, 1, 2, 1, 1, 1, 2, *[1] * 5, *[0] * 9]


def test_a_channel_that_the_model_does_not_have_is_an_error() -> None:
    with pytest.raises(NotApplicableError, match=f"hidden states of {CHANNELS} channels, 0 to {CHANNELS - 1}; there is no channel 2533"):
        SinkRedistribution(dims=(7, 2533)).apply(Program((SITES[CASE],)))


@pytest.mark.parametrize(
    ("setting", "case", "words"),
    [
        (SinkRedistribution(), SITES["image and text, layer 0"], "it is layer 0, before first_layer=2"),
        (SinkRedistribution(), SITES["image and text, last layer"], "it is layer 5, the last one"),
        (SinkRedistribution(), SITES["text"], "no visual tokens"),
        (SinkRedistribution(), site(24, mask=CAUSAL, visual=True, operands=("query", "key", "value")), "hidden states"),
        (SinkRedistribution(), SITES["grid"], "not causal"),
        (SinkRedistribution(p=1.0), SITES[CASE], "changes nothing"),
    ],
)
def test_declines(setting: SinkRedistribution, case: object, words: str) -> None:
    ((_, _, reason),) = setting.apply(Program((case,))).declined
    assert words in reason


@pytest.mark.parametrize(
    "values", [{"p": 1.1}, {"rho": -0.1}, {"summ": 2.0}, {"tau": 0.0}, {"tau": float("inf")}, {"dims": (1, 1)}, {"first_layer": -1}]
)
def test_out_of_range(values: dict[str, object]) -> None:
    (name,) = values
    with pytest.raises(PassError, match=rf"sink_redistribution: {name}=.* is out of range"):
        SinkRedistribution(**values)


@pytest.mark.parametrize(("excess", "selected"), [(0.0, True), (3e-6, True), (1e-4, False)])
def test_the_portion_of_sinks_has_the_published_codes_epsilon(excess: float, selected: bool) -> None:
    """With an image mass of 1/2 over 12 tokens, portion <= 1/2 allows the sinks 1/4 + 6e-6."""
    groups = SinkRedistribution().apply(Program((SITES[CASE],))).sites[0].attend.groups
    assert groups is not None
    one = torch.ones(1, dtype=torch.float64)
    masses = {"visual": 0.25 - excess, "visual_sink": 0.25 + excess, "text_sink": 0.1, "text": 0.4}
    values = {f"mass_{name}": value * one for name, value in masses.items()} | {"sink_active": one.int(), "sink_count": 12 * one}
    factors = [float(evaluate_expression(weight, values)) for weight in groups.weights]
    assert factors[2] == factors[3] == (0.6 if selected else 1.0)
    assert (factors[1] > 1.0) is selected
    assert sum(factor * masses[name] for factor, name in zip(factors, groups.names, strict=True)) == pytest.approx(1.0, rel=1e-12)
