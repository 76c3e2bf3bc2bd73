"""How many attentions a model computes, counted in the untouched model: forwards of the modules that a table names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tests.models.corpus.entry import Entry


def count_calls(entry: Entry, model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, int]:
    """Forwards, in one forward of the model, of each module class that the entry's sites name."""
    calls = Counter({group.module: 0 for group in entry.sites if group.module})

    def count(module: nn.Module, *_: Any) -> None:
        calls[type(module).__name__] += 1

    hooks = [module.register_forward_hook(count) for module in model.modules() if type(module).__name__ in calls]
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return dict(calls)


def expected_calls(entry: Entry) -> dict[str, int]:
    """The same counts as the entry's sites state them; a module that computes several sites in one call is called that much less often."""
    calls: Counter[str] = Counter()
    for group in entry.sites:
        if group.module:
            whole, rest = divmod(group.count, group.per_call)
            assert not rest, f"{entry.name}: {group.count} sites of {group.module} are not whole calls of {group.per_call}"
            calls[group.module] += whole
    return dict(calls)
