"""The settings that are measured: each method with its parameter at every value of a sweep."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rewrite.ir.errors import PassError
from rewrite.ir.passes import Pass
from rewrite.ir.registry import as_passes, build_pass

# Of a range that does not say how many values it has.
VALUES = 10


@dataclass(frozen=True)
class Setting:
    """One point of a method's curve. method: as the user wrote it; parameter and value: what is swept, "" and None where nothing is.

    passes: empty where this value changes nothing, which is the model as it is.
    """

    method: str
    parameter: str
    value: Any
    passes: tuple[Pass, ...]

    @property
    def text(self) -> str:
        return " + ".join(map(str, self.passes))


@dataclass(frozen=True)
class Sweep:
    """Values of the parameter `name`, of the pass `of` or of every pass that has it."""

    of: str
    name: str
    values: tuple[Any, ...]


def settings(methods: Sequence[str], sweeps: Sequence[str]) -> list[Setting]:
    """Every setting of every method, in order.

    methods: pass lists as text, ``"evit(layers=(2, 4))"``; several passes are joined by " + ". sweeps: ``NAME=FIRST:LAST``, ten values
    evenly apart, ``NAME=FIRST:LAST:COUNT``, or ``NAME=V1,V2,...``; NAME is a parameter, or PASS.PARAMETER for one pass alone, which goes
    first. Each method takes the first sweep that one of its passes has the parameter of. Raises `PassError` for what cannot be read, and
    for a sweep that no method has.
    """
    parsed = [_parsed(text) for text in sweeps]
    parsed.sort(key=lambda sweep: not sweep.of)
    found, used = list[Setting](), set[Sweep]()
    for method in methods:
        passes = as_passes(method.split(" + "))
        fitting = ((sweep, index) for sweep in parsed for index, one in enumerate(passes) if _has(one, sweep))
        sweep, index = next(fitting, (None, 0))
        if sweep is None:
            found.append(Setting(method, "", None, passes))
            continue
        used.add(sweep)
        for value in sweep.values:
            given = {field.name: getattr(passes[index], field.name) for field in passes[index].parameters()}
            swept = build_pass(type(passes[index]), {**given, sweep.name: value})
            same = [swept if place == index else one for place, one in enumerate(passes)]
            found.append(Setting(method, sweep.name, value, tuple(one for one in same if not changes_nothing(one))))
    unused = [sweep for sweep in parsed if sweep not in used]
    if unused:
        names = ", ".join(f"{sweep.of}.{sweep.name}".lstrip(".") for sweep in unused)
        raise PassError(f"none of the methods {', '.join(methods)} takes its values from a sweep of {names}")
    return found


def changes_nothing(one: Pass) -> bool:
    """Whether a pass is at the value at which it changes nothing, whatever its other parameters are."""
    identity: Any = type(one).identity()
    if identity is None:
        return False
    default = {field.name: field.default for field in one.parameters()}
    telling = [name for name, value in default.items() if getattr(identity, name) != value]
    return all(_same(getattr(one, name), getattr(identity, name)) for name in telling)


def _same(value: Any, other: Any) -> bool:
    """1 and 1.0 are two amounts: one token, and all of them."""
    return type(value) is type(other) and bool(value == other)


def _has(one: Pass, sweep: Sweep) -> bool:
    return sweep.of in ("", one.name) and any(field.name == sweep.name for field in one.parameters())


def _parsed(text: str) -> Sweep:
    named, equals, values = text.partition("=")
    of, _, name = named.strip().rpartition(".")
    if not equals or not name.isidentifier():
        raise PassError(f"the sweep {text!r} is not of the form NAME=FIRST:LAST, NAME=FIRST:LAST:COUNT or NAME=V1,V2,...")
    try:
        if ":" not in values:
            return Sweep(of, name, tuple(ast.literal_eval(f"({values},)")))
        first, last, *rest = (ast.literal_eval(part) for part in values.split(":"))
        count = int(rest[0]) if rest else VALUES
        if count < 2 or len(rest) > 1:
            raise ValueError("a range has two values at least")
        between = [first + (last - first) * step / (count - 1) for step in range(count)]
    except (ValueError, TypeError, SyntaxError) as error:
        raise PassError(f"the values of the sweep {text!r} cannot be read: {error}") from None
    whole = isinstance(first, int) and isinstance(last, int)
    return Sweep(of, name, tuple(dict.fromkeys(round(value) if whole else round(value, 6) for value in between)))
