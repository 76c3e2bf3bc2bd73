"""Which methods of a module other than `forward` are ways into it, read off their code.

A method such as `forward_features` calls children of its module one by one. Where one child lays the tokens out and another attends to
them, neither can be rewritten by itself: the method is captured as a whole. Any other method that reaches sites leaves that to the children
it calls.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator, Mapping, Sequence

from torch import nn


def public_methods(kind: type[nn.Module]) -> dict[str, types.FunctionType]:
    """The methods that a module's class adds to `nn.Module`, `forward` and what is private left out."""
    found: dict[str, types.FunctionType] = {}
    for base in reversed(kind.__mro__[: kind.__mro__.index(nn.Module)]):
        for name, value in vars(base).items():
            if isinstance(value, types.FunctionType) and not name.startswith("_") and not hasattr(nn.Module, name):
                found[name] = value
    return found


def children_reached(kind: type[nn.Module], name: str, children: Sequence[str]) -> set[str]:
    """The children of a module that a method of its class mentions, itself or in the methods of the class that it mentions."""
    reached, queue, seen = set[str](), [name], {name}
    while queue:
        method = inspect.unwrap(inspect.getattr_static(kind, queue.pop()))
        for mentioned in _names(method.__code__) if isinstance(method, types.FunctionType) else ():
            if mentioned in children:
                reached.add(mentioned)
            elif mentioned not in seen and isinstance(inspect.getattr_static(kind, mentioned, None), types.FunctionType):
                seen.add(mentioned)
                queue.append(mentioned)
    return reached


def _names(code: types.CodeType) -> Iterator[str]:
    """Every name a function's code refers to, those of the functions inside it too."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def ways_in(
    module: nn.Module, sites: Sequence[str], gridded: Sequence[str], embeddings: Sequence[str], scoring: Sequence[str] = ()
) -> Mapping[str, bool]:
    """Methods of a module that reach sites: name -> whether the method has to be captured as a whole.

    sites: names of the rewritten sites below the module, gridded: those of them whose tokens lie on a grid, embeddings: the modules that
    lay tokens out on one. scoring: the sites of vision towers by which patches are chosen; what makes features of these, with or without a
    projection behind the tower, is one piece too.
    """
    holding, placed, laying, towers = ({name.split(".")[0] for name in names} for names in (sites, gridded, embeddings, scoring))
    children = list(module._modules)
    ways: dict[str, bool] = {}
    for name in public_methods(type(module)):
        reached = children_reached(type(module), name, children)
        if reached & (holding | towers):
            features = bool(reached & towers) and not reached & (holding - towers)
            ways[name] = features or (bool(reached & laying) and bool(reached & placed - laying))
    return ways
