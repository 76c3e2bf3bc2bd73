"""Which methods of a module other than `forward` are ways into it, read off their code.

A method such as `forward_features` calls children of its module one by one. Where one child lays the tokens out and another attends to
them, neither can be rewritten by itself: the method is captured as a whole. Any other method that reaches sites leaves that to the children
it calls.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Collection, Iterator, Mapping, Sequence

from torch import nn


def public_methods(kind: type[nn.Module], mixed_in: bool = False) -> dict[str, types.FunctionType]:
    """The methods that a module's class adds to `nn.Module`, `forward` and what is private left out.

    mixed_in: those of the classes behind `nn.Module` in its order instead, as of one that has `generate`.
    """
    found: dict[str, types.FunctionType] = {}
    place = kind.__mro__.index(nn.Module)
    for base in reversed(kind.__mro__[place + 1 : -1] if mixed_in else kind.__mro__[:place]):
        for name, value in vars(base).items():
            if isinstance(value, types.FunctionType) and not name.startswith("_") and not hasattr(nn.Module, name):
                found[name] = value
    return found


# What puts vision features in the places of a text's visual tokens.
_MERGES = frozenset({"masked_scatter", "masked_scatter_"})
# What repeats the rows of an encoder's result for beams.
_REPEATS = frozenset({"repeat_interleave"})


def names_reached(kind: type[nn.Module], name: str, wanted: Collection[str]) -> set[str]:
    """Of the names wanted those that a method of a class mentions, itself or in the methods of the class that it mentions."""
    reached, queue, seen = set[str](), [name], {name}
    while queue:
        method = inspect.unwrap(inspect.getattr_static(kind, queue.pop()))
        for mentioned in _names(method.__code__) if isinstance(method, types.FunctionType) else ():
            if mentioned in wanted:
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
    module: nn.Module,
    sites: Sequence[str],
    gridded: Sequence[str],
    embeddings: Sequence[str],
    scoring: Sequence[str] = (),
    *,
    crosses: bool = False,
) -> Mapping[str, bool]:
    """Methods of a module that reach sites, or bring tensors from one to another: name -> whether the method has to be captured as a whole.

    sites: names of the rewritten sites below the module, gridded: those of them whose tokens lie on a grid, embeddings: the modules that
    lay tokens out on one. scoring: the sites of vision towers by which patches are chosen; what makes features of these, with or without a
    projection behind the tower, is one piece too. crosses: the model has cross-attention, to what an encoder gave.
    """
    holding, placed, laying, towers = ({name.split(".")[0] for name in names} for names in (sites, gridded, embeddings, scoring))
    # A child that holds a text too is more than a tower.
    texts = {name.split(".")[0] for name in set(sites) - set(gridded) - set(scoring)}
    children = list(module._modules)
    ways: dict[str, bool] = {}
    for name in public_methods(type(module)):
        reached = names_reached(type(module), name, children)
        if reached & (holding | towers):
            features = bool(reached & towers) and not reached & ((holding - towers) | texts)
            ways[name] = features or (bool(reached & laying) and bool(reached & placed - laying))
    bringing = _MERGES | _REPEATS if crosses else _MERGES
    for name in public_methods(type(module), mixed_in=True):
        if names_reached(type(module), name, bringing):
            ways.setdefault(name, False)
    return ways
