"""What watches a model run: dispatch modes and module trackers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.utils import _python_dispatch
from torch.utils.module_tracker import ModuleTracker


@contextlib.contextmanager
def observers_aside() -> Iterator[list[Any]]:
    """Dispatch modes and torch's own module tracker, taken off while Dynamo traces; the modes go back on when a graph runs.

    Dynamo leaves every frame alone while a dispatch mode is on, and breaks its graphs at each module while a tracker hooks them: under a
    FLOP counter the model would silently run as it was.
    """
    trackers: list[tuple[dict[int, Any], dict[int, Any]]] = []
    for hooks in (nn.modules.module._global_forward_pre_hooks, nn.modules.module._global_forward_hooks):
        trackers.append((hooks, dict(hooks)))
        for key, hook in list(hooks.items()):
            if isinstance(getattr(hook, "__self__", None), ModuleTracker):
                del hooks[key]
    try:
        with _python_dispatch._disable_current_modes() as modes:
            yield list(modes)
    finally:
        for hooks, saved in trackers:
            hooks.clear()
            hooks.update(saved)
