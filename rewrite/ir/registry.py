"""The passes there are, by name, and their text form.

Text such as ``agent(tokens=49)`` is parsed as a call with literal arguments and never evaluated.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib
import keyword
from collections.abc import Sequence
from typing import Any, TypeVar

from rewrite.ir.errors import PassError
from rewrite.ir.passes import PHASES, Pass

_REGISTRY: dict[str, type[Pass]] = {}
PassClass = TypeVar("PassClass", bound=type[Pass])


def register_pass(cls: PassClass) -> PassClass:
    """Class decorator: make a pass known by its name everywhere a built-in one is.

    Raises `PassError` for a class that is not a frozen dataclass deriving from `Pass`, lacks one of the facts, or takes a name in use.
    """
    if not (isinstance(cls, type) and issubclass(cls, Pass)):
        raise PassError(f"register_pass: {cls!r} does not derive from rewrite.Pass")
    if "__dataclass_fields__" not in cls.__dict__ or not cls.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        raise PassError(f"register_pass: {cls.__name__} is not a frozen dataclass; put @dataclass(frozen=True) under @register_pass")
    facts = {fact: getattr(cls, fact, None) for fact in ("name", "family", "paper", "formula")}
    missing = [fact for fact, value in facts.items() if not isinstance(value, str) or not value.strip()]
    if missing:
        raise PassError(f"register_pass: {cls.__name__} does not say its {', '.join(missing)}")
    if not cls.name.isidentifier() or keyword.iskeyword(cls.name):
        raise PassError(
            f"register_pass: {cls.__name__}.name is {cls.name!r}; it must be an identifier, to be written as name(parameter=...)"
        )
    if not any(cls.family in phase for phase in PHASES):
        raise PassError(f"register_pass: {cls.__name__}.family is {cls.family!r}; it must be prune, redistribute, sparsify or linearize")
    known = _REGISTRY.get(cls.name)
    if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise PassError(f"register_pass: the name {cls.name!r} is taken by {known.__module__}.{known.__qualname__}")
    _REGISTRY[cls.name] = cls
    return cls


def available_passes() -> tuple[type[Pass], ...]:
    """Every registered pass class, by name; the built-in ones are loaded at the first call."""
    importlib.import_module("passes")
    return tuple(_REGISTRY[name] for name in sorted(_REGISTRY))


def pass_class(name: str) -> type[Pass]:
    """The pass class of that name; `PassError` with the nearest names where there is none."""
    known = {cls.name: cls for cls in available_passes()}
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(known)}"
    raise PassError(f"there is no pass named {name!r}; {hint}")


def parse_pass(text: str) -> Pass:
    """The pass that a text such as ``evit(keep=0.7, layers=[3, 6, 9])`` names."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise PassError(f"{text!r} is not a pass: write name or name(parameter=literal, ...) ({error})") from None
    if isinstance(tree, ast.Name):
        return build_pass(pass_class(tree.id), {})
    if not (isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name)):
        raise PassError(f"{text!r} is not a pass: write name or name(parameter=literal, ...)")
    if tree.args:
        raise PassError(f"{text!r}: parameters are given by name, {tree.func.id}(parameter=literal)")
    cls = pass_class(tree.func.id)
    values: dict[str, Any] = {}
    for given in tree.keywords:
        if given.arg is None:
            raise PassError(f"{text!r}: ** is not a literal")
        if given.arg in values:
            raise PassError(f"{text!r}: {given.arg} is given twice")
        try:
            values[given.arg] = ast.literal_eval(given.value)
        except (ValueError, TypeError, RecursionError, MemoryError):
            raise PassError(f"{text!r}: the value of {given.arg} is not a literal; text is parsed, never evaluated") from None
    return build_pass(cls, values)


def build_pass(cls: type[Pass], values: dict[str, Any]) -> Pass:
    """An instance of a pass class; `PassError` for a parameter it does not have or a value of another type."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name in values:
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"it has: {', '.join(fields) or 'none'}"
            raise PassError(f"{cls.name} has no parameter {name!r}; {hint}")
    missing = [
        field.name
        for field in fields.values()
        if field.name not in values and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise PassError(f"{cls.name} needs a value for {', '.join(missing)}")
    return cls(**values)


def as_passes(passes: Sequence[str | Pass] | str | Pass) -> tuple[Pass, ...]:
    """The pass list that a user wrote, checked and in running order.

    Raises `PassError` for what is no pass, the same pass twice, and two passes that exclude each other.
    """
    entries: Sequence[Any] = [passes] if isinstance(passes, str | Pass) else list(passes)
    built: list[Pass] = []
    for entry in entries:
        if isinstance(entry, str):
            built.append(parse_pass(entry))
        elif isinstance(entry, Pass):
            built.append(entry)
        elif isinstance(entry, type) and issubclass(entry, Pass):
            raise PassError(f"{entry.__name__} is a class; write {entry.__name__}() or {entry.name!r}")
        else:
            raise PassError(f"{entry!r} is neither the text of a pass nor a pass")
    for position, one in enumerate(built):
        for other in built[:position]:
            _check_together(other, one)
    return tuple(sorted(built, key=lambda one: next(n for n, phase in enumerate(PHASES) if one.family in phase)))


def _check_together(one: Pass, other: Pass) -> None:
    if one.name == other.name:
        raise PassError(f"{one} and {other} are the same pass twice; keep one of them")
    if other.name in one.excludes or one.name in other.excludes:
        raise PassError(f"{one} and {other} exclude each other; keep one of them")
