"""Passes as text: parsed, refused, ordered. Round trips are generated from the registry."""

from __future__ import annotations

import contextlib
import os
import types
import typing
from dataclasses import dataclass
from typing import Any, Literal

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from passes import Agent, Neighborhood, SinkRedistribution, TokenExit
from rewrite.ir import Pass, PassError, as_passes, available_passes, parameter, parse_pass, pass_class, register_pass, registry


def values_of(hint: Any) -> st.SearchStrategy[Any]:
    """Values of a parameter's type, most of them in the range of most parameters."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return st.one_of(*map(values_of, arguments))
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin is tuple:
        items = values_of(arguments[0])
        return st.lists(items, max_size=4, unique=True).map(tuple) if arguments[1:] == (...,) else st.tuples(*map(values_of, arguments))
    if hint is type(None):
        return st.none()
    table = {int: st.integers(0, 100), bool: st.booleans(), float: st.floats(0, 1), str: st.text()}
    return table[hint]


@pytest.mark.parametrize("cls", available_passes(), ids=lambda cls: cls.name)
@given(data=st.data())
def test_text_round_trips(cls: type[Pass], data: st.DataObject) -> None:
    hints = typing.get_type_hints(cls)
    chosen = {field.name: data.draw(values_of(hints[field.name]), field.name) for field in cls.parameters() if data.draw(st.booleans())}
    try:
        made = cls(**chosen)
    except PassError:
        assume(False)
    assert parse_pass(str(made)) == made
    assert as_passes([str(made)]) == as_passes([made]) == as_passes(made) == (made,)


@given(st.text())
def test_no_text_does_anything_but_name_a_pass_or_raise(text: str) -> None:
    with contextlib.suppress(PassError):
        assert isinstance(parse_pass(text), Pass)


@pytest.mark.parametrize("text", [" agent ", "agent()", "agent(tokens=49,)", "agent(\n  tokens = 49\n)", "agent(layers=None)"])
def test_spellings_of_the_default(text: str) -> None:
    assert parse_pass(text) == Agent()


def test_only_what_differs_from_the_default_is_written() -> None:
    assert str(Agent()) == "agent"
    assert str(Agent(49, layers=(3, 6))) == "agent(layers=(3, 6))"
    assert str(Neighborhood("all")) == "neighborhood(window='all')"


def test_lists_are_tuples_and_integers_floats_in_text_and_objects_alike() -> None:
    assert parse_pass("agent(layers=[3, 6])") == Agent(layers=[3, 6]) == Agent(layers=(3, 6))  # type: ignore[arg-type]
    assert hash(Agent(layers=[3, 6])) == hash(Agent(layers=(3, 6)))  # type: ignore[arg-type]
    for made in (parse_pass("sink_redistribution(p=1)"), SinkRedistribution(p=1)):
        assert type(made.p) is float


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("agnt", "there is no pass named 'agnt'; did you mean agent?"),
        ("zzz", "there are: agent, "),
        ("agent(tokns=3)", "agent has no parameter 'tokns'; did you mean tokens?"),
        ("agent(zzz=3)", "it has: tokens, learnable, drop_bias, stacks, layers"),
        ("agent(tokens=4.0)", "tokens=4.0 is of type float; it must be int"),
        ("agent(tokens=True)", "tokens=True is of type bool; it must be int"),
        ("agent(layers=(1, 'a'))", "it must be tuple[int, ...] or None"),
        ("neighborhood(window='most')", "it must be int or tuple[int, ...] or 'all'"),
        ("sink_redistribution(p=False)", "it must be float"),
        (f"sink_redistribution(tau={10**400})", "it must be float"),
        ("sink_redistribution(tau=1e999)", "tau=inf is out of range; it must be positive and finite"),
        ("agent(tokens=0)", "tokens=0 is out of range; it must be at least 1"),
        ("agent(49)", "parameters are given by name, agent(parameter=literal)"),
        ("agent(tokens=1, tokens=2)", "tokens is given twice"),
        ("agent(**{'tokens': 1})", "** is not a literal"),
        ("agent(tokens={[]: 1})", "not a literal"),
        ("agent(tokens=" + "-" * 20000 + "1)", ""),
        ("agent(tokens=7 * 7)", "not a literal; text is parsed, never evaluated"),
        ("passes.agent", "write name or name(parameter=literal, ...)"),
        ("agent; agent", "write name or name(parameter=literal, ...)"),
        ("lambda: 1", "write name or name(parameter=literal, ...)"),
        ("agent(tokens=1)(tokens=2)", "write name or name(parameter=literal, ...)"),
        ("", "is not a pass"),
        ("((((", "is not a pass"),
        ("agent\x00", "is not a pass"),
    ],
)
def test_refused_text(text: str, words: str) -> None:
    with pytest.raises(PassError) as caught:
        parse_pass(text)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "value", ["__import__('os').system('x')", "(lambda: open('x', 'w'))()", "[c for c in ().__class__.__bases__]", "f'{1}'"]
)
def test_text_is_never_evaluated(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "system", lambda command: pytest.fail("evaluated"))
    with pytest.raises(PassError, match="never evaluated"):
        parse_pass(f"agent(tokens={value})")


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda: Agent(tokens="49"), "tokens='49' is of type str; it must be int"),
        (lambda: Neighborhood(window=2.5), "window=2.5 is of type float"),
        (lambda: TokenExit(layer="sometimes"), "it must be int or 'never' or None"),
    ],
)
def test_objects_hold_to_the_types_that_text_does(made: Any, words: str) -> None:
    with pytest.raises(PassError) as caught:
        made()
    assert words in str(caught.value)


def test_passes_run_in_the_order_of_their_phases() -> None:
    asked = ["agent", Neighborhood(), "sink_redistribution", "token_exit"]
    assert [one.name for one in as_passes(asked)] == ["token_exit", "sink_redistribution", "agent", "neighborhood"]
    assert as_passes("agent") == (Agent(),)
    assert as_passes([]) == ()


def test_the_same_pass_twice_is_refused_and_both_are_named() -> None:
    with pytest.raises(PassError, match=r"agent\(tokens=9\) and agent\(tokens=4\) are the same pass twice"):
        as_passes(["agent(tokens=9)", Agent(4)])


@pytest.mark.parametrize("entry", [Agent, 3, None])
def test_what_is_no_pass_is_refused(entry: Any) -> None:
    with pytest.raises(PassError):
        as_passes([entry])


class Facts:
    family = "sparsify"
    paper = "A paper, 2025"
    formula = "out = v"


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    available_passes()
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))


@pytest.mark.usefixtures("own_registry")
def test_an_own_pass_is_known_like_a_built_in_one() -> None:
    @register_pass
    @dataclass(frozen=True)
    class Nothing(Facts, Pass):
        """Changes nothing."""

        name = "nothing"
        excludes = ("agent",)
        strength: int = parameter(1, "how much of nothing")

    assert pass_class("nothing") is Nothing
    assert parse_pass("nothing(strength=2)") == Nothing(2)
    assert Nothing in available_passes()
    for both in (["nothing", "agent(tokens=4)"], ["agent(tokens=4)", "nothing"]):
        with pytest.raises(PassError, match="exclude each other") as caught:
            as_passes(both)
        assert "nothing" in str(caught.value)
        assert "agent(tokens=4)" in str(caught.value)
    assert register_pass(Nothing) is Nothing


def test_classes_that_are_no_passes_are_not_registered() -> None:
    @dataclass(frozen=True)
    class Whole(Facts, Pass):
        name = "whole"

    class NotADataclass(Facts, Pass):
        name = "plain"

    @dataclass
    class Other:
        name: str = "other"

    def derived(**facts: object) -> type:
        return dataclass(frozen=True)(type("Derived", (Whole,), facts))

    for cls, words in (
        (Other, "does not derive from"),
        (3, "does not derive from"),
        (NotADataclass, "is not a frozen dataclass"),
        (type("Heir", (Whole,), {}), "is not a frozen dataclass"),
        (derived(paper=" "), "does not say its paper"),
        (derived(name=None, formula=None), "does not say its name, formula"),
        (derived(family="speed"), "family is 'speed'"),
        (derived(name="two words"), "must be an identifier"),
        (derived(name="lambda"), "must be an identifier"),
        (derived(name="agent"), "the name 'agent' is taken by passes.linearize.agent.Agent"),
    ):
        with pytest.raises(PassError) as caught:
            register_pass(cls)  # type: ignore[type-var]
        assert words in str(caught.value)
    assert "whole" not in {cls.name for cls in available_passes()}
