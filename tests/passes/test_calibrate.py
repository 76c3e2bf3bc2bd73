"""Which keys are sinks of which head, that attention is moved and not made, and what decoding knows of the prompt."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_sites import CAUSAL, SCALE, SITES, example, site

from passes import Calibrate, SinkRedistribution
from rewrite.ir import QK, PassError, Program, ReceivedSinks, RewriteError, Site, Statistic, W, tensor
from rewrite.ir.semantics import attention_weights, evaluate, evaluate_operation, received_sinks
from rewrite.lower import functions

CASE = "image and text, shared heads"


def changed(setting: Calibrate, case: Site) -> Program:
    program = setting.apply(Program((case,)))
    assert program.touched, program.declined
    return program


def maps(setting: Calibrate, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[B, H, Nq, Nk] before and after, and the sinks [B, H, Nk]."""
    shown = example(SITES[CASE], seed)
    *first, last = changed(setting, shown.site).sites[0].body.operations
    values = dict(shown.operands)
    for operation in first:
        evaluate_operation(operation, values)
    return shown.logits.softmax(-1), attention_weights(last, values), values["attention_sinks"] == 1


def test_what_sinks_lose_goes_to_the_others_in_proportion() -> None:
    before, after, sinks = maps(Calibrate(beta=0.25))
    assert sinks.any()
    torch.testing.assert_close(after.sum(-1), torch.ones_like(after.sum(-1)), rtol=1e-12, atol=1e-12)
    at_sinks = sinks[:, :, None].expand_as(before)
    torch.testing.assert_close(after[at_sinks], 0.25 * before[at_sinks], rtol=1e-12, atol=1e-12)
    gain = (after / before).masked_fill(at_sinks | (before == 0), torch.nan)
    torch.testing.assert_close(gain.nan_to_num(-torch.inf).amax(-1), gain.nan_to_num(torch.inf).amin(-1), rtol=1e-9, atol=0)


def test_sinks_receive_more_than_the_threshold_and_the_first_is_none() -> None:
    before, _, sinks = maps(Calibrate(threshold=0.2))
    mean = before.sum(2) / torch.arange(24, 0, -1)
    for found, received in zip(sinks.flatten(0, 1), mean.flatten(0, 1), strict=True):
        assert found.nonzero().flatten().tolist() == [key for key in range(24) if received[key] > 0.2][1:]


def test_only_the_listed_heads_are_calibrated() -> None:
    before, after, sinks = maps(Calibrate(heads=((3, 2), (2, 0), (3, 1))))
    moved = (before - after).abs().amax((0, 2, 3)) > 1e-6
    assert moved.tolist() == [False, True, True, False]
    assert not sinks[:, [0, 3]].any()


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 6), st.integers(0, 99))
def test_decoding_with_the_sinks_of_the_prompt(queries: int, seed: int) -> None:
    """Keys of the cache keep what the prompt's own forward found; keys behind it are no sinks."""
    full = example(SITES["text"], seed)
    prompt = {name: entry[:, :, :-queries] for name, entry in full.operands.items()}
    body = changed(Calibrate(), full.site).sites[0].body
    for operation in body.operations[:2]:
        evaluate_operation(operation, prompt)
    step = site(24, queries=queries, mask=CAUSAL)
    operands = {name: entry[:, :, -queries:] if name == "query" else entry for name, entry in full.operands.items()}
    output = evaluate(changed(Calibrate(), step).sites[0].body, operands, prompt["attention_sinks"])
    weights = full.logits.softmax(-1)[:, :, -queries:]
    sinks = torch.nn.functional.pad(prompt["attention_sinks"], (0, queries))[:, :, None] == 1
    mass = (weights * sinks).sum(-1, keepdim=True)
    expected = torch.where(sinks, 0.4 * weights, weights * (1 + 0.6 * mass / (1 - mass)))
    torch.testing.assert_close(output, expected @ full.inputs({}).value, rtol=1e-11, atol=1e-11)
    kept = functions.kept_sinks(prompt["attention_sinks"], operands["query"])
    assert torch.equal(kept, sinks[:, :, 0].int())


def test_a_cache_of_which_nothing_is_known_is_refused() -> None:
    operation = ReceivedSinks("sinks", "received", "query", 0.1)
    values = {"received": torch.ones(1, 2, 5), "query": torch.ones(1, 2, 3, 4)}
    with pytest.raises(RewriteError, match="those of a KV cache were given is not known"):
        received_sinks(operation, values)


def test_found_sinks_by_hand() -> None:
    received = torch.tensor([[[4.0, 0.31, 0.1, 0.21, 0.9], [0.0, 0.0, 0.0, 0.0, 1.0]]])
    query = torch.zeros(1, 2, 5, 3)
    assert functions.received_sinks(received, query, 0.1, None).tolist() == [[[0, 0, 0, 1, 1], [0, 0, 0, 0, 0]]]
    assert functions.received_sinks(received, query, 0.05, (1,)).tolist() == [[[0] * 5, [0] * 5]]
    assert functions.received_sinks(received, query, 0.05, (0,)).tolist() == [[[0, 1, 0, 1, 1], [0] * 5]]


def test_rows_of_left_padding_make_no_sinks() -> None:
    """Where the model hides by adding a finite number, a row of padding sees every key alike, later ones too."""
    case = site(9, score=SCALE * QK + tensor("bias", "bhij"), hides_later=True)
    statistic = changed(Calibrate(threshold=0.3), case).sites[0].body.operations[0]
    assert isinstance(statistic, Statistic)
    assert statistic.term != W
    assert changed(Calibrate(), SITES["text"]).sites[0].body.operations[0].term == W  # type: ignore[union-attr]
    hidden = torch.ones(9, 9, dtype=torch.bool).triu(1)
    hidden[:, :3] = True
    shown = example(replace(case, operands=("query", "key", "value")))
    values = {**shown.operands, "bias": torch.zeros(2, 2, 9, 9, dtype=torch.float64).masked_fill(hidden, torch.finfo(torch.float64).min)}
    evaluate_operation(statistic, values)
    real = shown.logits[:, :, 3:, 3:].masked_fill(hidden[3:, 3:], -torch.inf).softmax(-1).sum(2)
    torch.testing.assert_close(values["attention_received"][:, :, 3:], real)


@pytest.mark.parametrize(
    ("setting", "case", "words"),
    [
        (Calibrate(), SITES["grid"], "it is not causal"),
        (Calibrate(beta=1.0), SITES["text"], "changes nothing"),
        (Calibrate(layers=(0, 1)), SITES["text"], "it is layer 3"),
        (Calibrate(heads=((2, 0),)), SITES["text"], "it is layer 3, and heads lists none of its heads"),
        (Calibrate(heads=((3, 5),)), SITES["text"], "it has 2 heads, 0 to 1, and heads lists head 5"),
        (Calibrate(), SinkRedistribution().apply(Program((SITES[CASE],))).sites[0], "an earlier pass changed it"),
    ],
)
def test_declines(setting: Calibrate, case: Site, words: str) -> None:
    ((_, _, reason),) = setting.apply(Program((case,))).declined
    assert words in reason


@pytest.mark.parametrize(
    "values",
    [
        {"beta": -0.1},
        {"threshold": 0.0},
        {"threshold": 1.0},
        {"heads": ()},
        {"heads": ((0, 1), (0, 1))},
        {"heads": ((0, -1),)},
        {"layers": ()},
    ],
)
def test_out_of_range(values: dict[str, object]) -> None:
    with pytest.raises(PassError, match=r"calibrate: .* is out of range"):
        Calibrate(**values)
