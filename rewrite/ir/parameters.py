"""The types of passes' parameters: what a value must be, the same for text and for objects."""

from __future__ import annotations

import sys
import types
import typing
from typing import Any

from rewrite.ir.errors import PassError


def converted(owner: str, name: str, value: Any, hint: Any) -> Any:
    """The value of a parameter as its hinted type: lists become tuples, integers floats where floats are asked for.

    owner: name of the pass, for the message. Raises `PassError` where the value is of none of the hinted types.
    """
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    for option in options:
        result = _as_a(value, option)
        if result is not _NO:
            return result
    wanted = " or ".join(_type_text(option) for option in options)
    raise PassError(f"{owner}: {name}={value!r} is of type {type(value).__name__}; it must be {wanted}")


_NO: Any = object()  # what `_as_a` answers for a value of another type


def _as_a(value: Any, hint: Any) -> Any:
    """The value as one hinted type, or `_NO`. Booleans are no integers; integers that a float can hold are floats."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return next((value for argument in arguments if type(value) is type(argument) and value == argument), _NO)
    if origin is tuple:
        if not isinstance(value, tuple | list):
            return _NO
        items = arguments[:1] * len(value) if len(arguments) == 2 and arguments[1] is Ellipsis else arguments
        if len(items) != len(value):
            return _NO
        entries = tuple(_as_a(entry, item) for entry, item in zip(value, items, strict=True))
        return _NO if any(entry is _NO for entry in entries) else entries
    if hint is type(None):
        return value if value is None else _NO
    if hint is float and type(value) is int:
        return float(value) if abs(value) <= sys.float_info.max else _NO
    if hint in (int, float):
        return value if type(value) is hint else _NO
    return value if isinstance(value, hint) else _NO


def _type_text(hint: Any) -> str:
    """A type as a message names it: None, 'all', tuple[int, ...], int."""
    if hint is type(None):
        return "None"
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(map(repr, typing.get_args(hint)))
    return str(hint) if typing.get_origin(hint) is not None else str(getattr(hint, "__name__", hint))
