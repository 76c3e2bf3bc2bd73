"""A rule of the recogniser that is wrong is caught by the proof: nothing that was read with it is rewritten."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import sympy
from capture import recognised
from forms import FORMS
from spellings import SPELLINGS

from rewrite.recognise import assemble, index_algebra, mixing, reading, steps, unnormalised, written_out

Patch = pytest.MonkeyPatch
MODELS = {str(case): case for case in (*SPELLINGS, *FORMS)}


def swapped_permute(patch: Patch) -> None:
    """A permutation undone as if it were its own inverse."""
    right = index_algebra.back_through

    def wrong(node: Any, axes: Any) -> Any:
        if index_algebra.canonical(node) != "permute" or len(node.args[1:]) == 1:
            return right(node, axes)
        return node.args[0], tuple(axes[place] for place in node.args[1:])

    for module in (reading, assemble):
        patch.setattr(module, "back_through", wrong)


def lost_sink(patch: Patch) -> None:
    patch.setattr(written_out, "Form", lambda **parts: assemble.Form(**{**parts, "sink": None}))


def without_epsilon(patch: Patch) -> None:
    patch.setattr(unnormalised, "Form", lambda **parts: assemble.Form(**{**parts, "epsilon": 0.1}))


def never_renormalised(patch: Patch) -> None:
    patch.setattr(written_out, "Form", lambda **parts: assemble.Form(**{**parts, "renormalised": False}))


def transposed_mixture(patch: Patch) -> None:
    right = mixing.mixing

    def wrong(*arguments: Any) -> Any:
        mixture, source, axes = right(*arguments)
        return replace(mixture, order=mixture.order[::-1]), source, axes

    patch.setattr(reading, "mixing", wrong)


def digits_exchanged(patch: Patch) -> None:
    """Rows of keys read where columns are."""
    from rewrite.recognise import region

    right = region._digit
    patch.setattr(region, "_digit", lambda index, whole, run: right(index, whole, run) if run == whole else sympy.Mod(index, 3))


# What is damaged -> how, and the model that is read with the rule.
RULES: dict[str, tuple[Callable[[Patch], None], str]] = {
    "a difference is a sum": (lambda patch: patch.setitem(steps.OPERATORS, "sub", lambda x, y: x + y), "sigmoid"),
    "a quotient is a product": (lambda patch: patch.setitem(steps.OPERATORS, "div", lambda x, y: x * y), "divided by the root"),
    "a cap is dropped": (lambda patch: patch.setitem(steps.FUNCTIONS, "tanh", lambda x: x), "tanh cap"),
    "a sign is dropped": (lambda patch: patch.setitem(steps.FUNCTIONS, "neg", lambda x: x), "negated"),
    "ReLU is the identity": (lambda patch: patch.setitem(steps.FUNCTIONS, "relu", lambda x: x), "squared ReLU"),
    "bounds are exchanged": (lambda patch: patch.setitem(steps.BOUNDS, "clamp", ("min",)), "clamped"),
    "dropout for a view": (lambda patch: patch.setattr(reading, "UNCHANGED", reading.UNCHANGED | {"tanh"}), "tanh cap"),
    "permutations are their own inverses": (swapped_permute, "talking heads"),
    "the sink is lost": (lost_sink, "sink logits"),
    "another epsilon": (without_epsilon, "ReLU linear attention"),
    "weights are not normalised again": (never_renormalised, "gated positions"),
    "mixtures are transposed": (transposed_mixture, "talking heads"),
    "rows for columns": (digits_exchanged, "decomposed relative position"),
    "a mask is turned around": (
        lambda patch: patch.setattr(reading, "branches", lambda node: (node.args[0], node.args[2], node.args[1])), "where, scores second"
    ),
    "the wrong rule for no dim": (lambda patch: patch.setattr(written_out, "argument", lambda *_: 1), "scale after"),
}  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
def test_a_damaged_rule_is_caught(rule: str, monkeypatch: Patch) -> None:
    damage, name = RULES[rule]
    case = MODELS[name]
    model, inputs = case.make(), case.inputs()
    assert len(recognised(model, *inputs).found) == 1
    damage(monkeypatch)
    assert recognised(model, *inputs).found == []
