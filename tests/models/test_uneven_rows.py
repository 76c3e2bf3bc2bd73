"""Rows of one batch that hold different numbers of pictures, or none, and keep different numbers of visual tokens.

The oracle is the original model on each row by itself, without padding and with the tokens that left masked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from rewrite import NotApplicableError, cached_tokens, kept_tokens
from tests.models.architectures import IMAGE_TOKEN, TEXT_TOKENS, llava, rewritten, same_gradients
from tests.models.corpus.cases import EVERYTHING
from tests.models.oracles import Rule, Survivors, attention_replaced_by, best, visual_masked_from
from tests.models.test_selection import TEXT, spread_keeps
from tests.models.test_selection_experts import mixture

GREEDY: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
PATCHES = 16
# Pictures of each row, behind so many words each.
PICTURES = (2, 0, 1, 3)
WORDS = 5


def prompts(pictures: tuple[int, ...] = PICTURES, words: int = WORDS) -> list[dict[str, torch.Tensor]]:
    """Each row by itself, [1, N]."""
    generator = torch.Generator().manual_seed(11)
    rows: list[dict[str, torch.Tensor]] = []
    for count in pictures:
        ids = torch.randint(3, TEXT_TOKENS, (1, words + count * (PATCHES + words)), generator=generator)
        for at in range(count):
            start = words + at * (PATCHES + words)
            ids[0, start : start + PATCHES] = IMAGE_TOKEN
        row = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        rows.append({**row, "pixel_values": torch.randn(count, 3, 56, 56, generator=generator)} if count else row)
    return rows


def together(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The rows as one batch, padded on the left."""
    longest = max(row["input_ids"].shape[1] for row in rows)
    padded = {
        name: torch.cat([torch.nn.functional.pad(row[name], (longest - row[name].shape[1], 0)) for row in rows])
        for name in ("input_ids", "attention_mask")
    }
    return {**padded, "pixel_values": torch.cat([row["pixel_values"] for row in rows if "pixel_values" in row])}


def share(count: int, keep: float) -> int:
    return int(count * keep + 0.5)


# What gives an oracle the rules of a setting, from the visual tokens of a row and the model.
Rules = Callable[[Survivors, torch.Tensor, Any], None]


def by_last_query(layer: int, keep: float, place: str = "behind") -> Rules:
    def put(oracle: Survivors, visual: torch.Tensor, model: Any) -> None:
        count = share(int(visual.sum()), keep)
        rule: Rule = lambda weights, alive: (alive & ~visual) | best(weights[:, :, -1].mean(1), alive & visual, count)  # noqa: E731
        getattr(oracle, place)[layer] = rule

    return put


def in_stages(oracle: Survivors, visual: torch.Tensor, model: Any) -> None:
    by_last_query(1, 0.5, "before")(oracle, visual, model)
    by_last_query(3, 0.25, "before")(oracle, visual, model)


def far_apart(oracle: Survivors, visual: torch.Tensor, model: Any) -> None:
    oracle.before[0] = spread_keeps(model, visual, share(int(visual.sum()), 0.25))


def by_tower(oracle: Survivors, visual: torch.Tensor, model: Any) -> None:
    def rule(weights: torch.Tensor, alive: torch.Tensor) -> torch.Tensor:
        score = oracle.weights[1][:, :, 0, 1:].mean(1)
        return alive & ~visual.masked_scatter(visual, ~best(score, torch.ones_like(score, dtype=torch.bool), 4))

    oracle.before[0] = rule


def all_leave(oracle: Survivors, visual: torch.Tensor, model: Any) -> None:
    oracle.before[2] = lambda weights, alive: alive & ~visual


def irrelevant(below: float) -> Rules:
    def put(oracle: Survivors, visual: torch.Tensor, model: Any) -> None:
        def rule(weights: torch.Tensor, alive: torch.Tensor) -> torch.Tensor:
            given = (weights[:, :, -1].mean(1) * visual).sum(1)
            return alive & ~visual if bool((given < below).all()) else alive

        oracle.behind.update(dict.fromkeys(range(3), rule))

    return put


# Between the relevances that the rows' pictures have in the layers, so that they leave in different ones.
BELOW = 0.6
SETTINGS: dict[str, Rules] = {
    "fastv(layer=2, drop=0.5)": by_last_query(1, 0.5),
    "pyramid(layers=(1, 3), keep=0.5)": in_stages,
    "cls_prune(keep=0.25)": by_tower,
    "token_exit(layer=2)": all_leave,
    f"token_exit(relevance={BELOW})": irrelevant(BELOW),
    "diverse(keep=0.25)": far_apart,
}
FASTV, PYRAMID, BY_TOWER, EXIT, RELEVANCE, DIVERSE = SETTINGS


def alone(row: dict[str, torch.Tensor], setting: str, model: Any, call: Callable[..., Any]) -> tuple[Any, dict[int, torch.Tensor]]:
    """One row by itself through a `call` of the original, with what left masked; and what is left in each layer."""
    if "pixel_values" not in row:
        return call(**row), {}
    oracle = Survivors(TEXT)
    SETTINGS[setting](oracle, row["input_ids"] == IMAGE_TOKEN, model)
    with torch.no_grad(), attention_replaced_by(oracle):
        return call(**row), oracle.seen


def close(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((actual - expected).abs().max() <= 1e3 * torch.finfo(torch.float32).eps * expected.abs().max())


def as_each_row_alone(changed: Any, model: Any, setting: str, rows: list[dict[str, torch.Tensor]]) -> list[int]:
    """Logits of one call, and what is left, are those of each row by itself; how many visual tokens each keeps in the last layer."""
    with torch.no_grad(), kept_tokens(changed) as kept:
        actual = changed(**together(rows))
    numbers: list[int] = []
    for at, row in enumerate(rows):
        expected, seen = alone(row, setting, model, model)
        length = row["input_ids"].shape[1]
        left = seen.get(3, torch.ones(1, length, dtype=torch.bool))[0]
        assert torch.equal(list(kept.values())[-1].mask[at, -length:], left)
        logits = actual.logits[at, -length:]
        assert close(logits[left], expected.logits[0][left])
        assert torch.count_nonzero(logits[~left]) == 0
        numbers.append(int((left & (row["input_ids"][0] == IMAGE_TOKEN)).sum()))
    return numbers


# Of each setting the implementation, how many visual tokens the rows keep, and how they are decoded.
CASES: dict[str, tuple[str, list[int] | None, dict[str, Any]]] = {
    FASTV: ("sdpa", [16, 0, 8, 24], {"num_beams": 2, "cache_implementation": "static"}),
    PYRAMID: ("eager", [8, 0, 4, 12], {}),
    RELEVANCE: ("sdpa", None, {}),
    DIVERSE: ("sdpa", [8, 0, 4, 12], {}),
}
MORE: dict[str, tuple[str, list[int] | None, dict[str, Any]]] = {
    BY_TOWER: ("sdpa", [8, 0, 4, 12], {"num_beams": 2}),
    EXIT: ("sdpa", [0, 0, 0, 0], {"cache_implementation": "static"}),
}


@pytest.mark.parametrize("setting", {**CASES, **MORE} if EVERYTHING else CASES)
def test_as_each_row_alone(setting: str) -> None:
    """Logits, what is left, and token for token in `generate()`; REWRITE_CORPUS=all tries more settings."""
    implementation, numbers, options = {**CASES, **MORE}[setting]
    model, rows = llava("sdpa"), prompts()
    inputs = together(rows)
    changed = rewritten(llava(implementation), [setting], inputs)
    kept = as_each_row_alone(changed, model, setting, rows)
    assert kept == numbers or (numbers is None and {0} < set(kept))
    actual = changed.generate(**inputs, **GREEDY, **options)[:, inputs["input_ids"].shape[1] :]
    own = {name: value for name, value in options.items() if name != "cache_implementation"}
    for at, row in enumerate(rows):
        expected, _ = alone(row, setting, model, lambda **call: model.generate(**call, **GREEDY, **own))
        assert torch.equal(actual[at], expected[0, row["input_ids"].shape[1] :]), at
    assert not torch.equal(actual, model.generate(**inputs, **GREEDY, **own)[:, inputs["input_ids"].shape[1] :])


def test_rows_of_as_many_pictures_and_then_of_others() -> None:
    changed = rewritten(llava("sdpa"), [FASTV], together(prompts((1, 1))))
    for pictures in ((0, 3), (2, 2)):
        as_each_row_alone(changed, llava("sdpa"), FASTV, prompts(pictures))


def test_turns_that_go_on_from_a_cache_with_padding() -> None:
    """With further pictures, again of different numbers, and then a word."""
    model, rows = llava("sdpa"), prompts((2, 0, 1))
    changed = rewritten(llava("sdpa"), [EXIT], together(rows))
    second, third = prompts((1, 1, 0)), [{"input_ids": torch.tensor([[word]])} for word in (17, 23, 42)]
    short = second[2]["input_ids"].shape[1]
    second[2]["input_ids"] = torch.randint(3, TEXT_TOKENS, (1, second[0]["input_ids"].shape[1]))
    assert short < second[2]["input_ids"].shape[1]
    inputs = together(rows)
    mask = inputs["attention_mask"]
    with torch.no_grad():
        cache = changed(**inputs).past_key_values
        for turn in (second, third):
            ids = torch.cat([row["input_ids"] for row in turn])
            mask = torch.nn.functional.pad(mask, (0, ids.shape[1]), value=1)
            pictures = {"pixel_values": torch.cat([row["pixel_values"] for row in turn if "pixel_values" in row])} if turn is second else {}
            actual = changed(input_ids=ids, attention_mask=mask, past_key_values=cache, **pictures)
            cache = actual.past_key_values
    for at, row in enumerate(rows):
        visual = torch.cat([row["input_ids"], second[at]["input_ids"]], 1) == IMAGE_TOKEN
        with torch.no_grad(), visual_masked_from(model, 2, visual):
            own = model(**row).past_key_values
            for turn in (second, third):
                pictures = {"pixel_values": turn[at]["pixel_values"]} if "pixel_values" in turn[at] else {}
                expected = model(input_ids=turn[at]["input_ids"], past_key_values=own, **pictures)
                own = expected.past_key_values
        assert close(actual.logits[at], expected.logits[0])


def test_loss_and_gradients() -> None:
    model, rows = llava("sdpa").train(), prompts()
    inputs = together(rows)
    visual = inputs["input_ids"] == IMAGE_TOKEN
    labels = inputs["input_ids"].masked_fill(visual | (inputs["attention_mask"] == 0), -100)
    # What a visual token or padding predicts is nobody's answer: the tokens may have left.
    labels[:, 1:][visual[:, :-1] | (inputs["attention_mask"][:, :-1] == 0)] = -100
    changed = rewritten(llava("sdpa").train(), [EXIT], {**inputs, "labels": labels})
    loss = changed(**inputs, labels=labels).loss
    loss.backward()
    with visual_masked_from(model, 2, visual):
        expected = model(**inputs, labels=labels).loss
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    same_gradients(changed, model)


def test_experts_are_given_what_is_left() -> None:
    """Rows and tokens lie on one axis there."""
    model, inputs = mixture("mixtral"), together(prompts((2, 1)))
    changed = rewritten(mixture("mixtral"), [EXIT], inputs)
    visual = inputs["input_ids"] == IMAGE_TOKEN
    with torch.no_grad(), visual_masked_from(model, 2, visual):
        expected = model(**inputs)
    with torch.no_grad():
        actual = changed(**inputs)
    left = ~visual & inputs["attention_mask"].bool()
    assert close(actual.logits[left], expected.logits[left])
    # No row keeps the padding in front of it: 15 words of the one, 10 of the other.
    assert cached_tokens(actual.past_key_values) == [47, 47, 15, 15]


def test_where_rows_must_keep_as_many() -> None:
    """An attention that a pass made something else of has no place for padding."""
    rows = together(prompts((1, 2)))
    both = rewritten(llava("sdpa"), ["lightning", "fastv(layer=2)"], together(prompts((1, 1))))
    with pytest.raises(NotApplicableError, match=r"lightning makes something else.*the same number of visual tokens"), torch.no_grad():
        both(**rows)


def test_a_prompt_that_hides_a_patch_of_its_own() -> None:
    """Which patches stay is told by the tower, place by place, whatever the prompt's own mask says of them."""
    model, rows = llava("sdpa"), prompts((2, 1))
    for row, place in zip(rows, (WORDS + 3, WORDS + 7), strict=True):
        row["attention_mask"][0, [0, place]] = 0
    changed = rewritten(llava("sdpa"), [BY_TOWER], together(rows))
    with torch.no_grad(), kept_tokens(changed) as kept:
        actual = changed(**together(rows))
    for at, row in enumerate(rows):
        expected, seen = alone(row, BY_TOWER, model, model)
        length, shown = row["input_ids"].shape[1], row["attention_mask"][0].bool()
        left = seen[3][0] & shown
        assert torch.equal(list(kept.values())[-1].mask[at, -length:] & shown, left)
        assert close(actual.logits[at, -length:][left], expected.logits[0][left])
