"""Where visual tokens join a text outside of every graph: in a method that runs as it is and calls the language model itself."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from rewrite.carried import Carried, Handover

# What hands the tokens of its first argument on.
_FOLLOWS = frozenset({"clone", "contiguous", "to", "detach", "type", "float", "half", "bfloat16"})


class MergeWatch(TorchFunctionMode):
    """Notes the results of masked scatters into embeddings, and what becomes of them before they enter a graph.

    ran: whether a graph of the model ran meanwhile.
    """

    def __init__(self) -> None:
        super().__init__()
        self.handover = Handover()
        self.ran = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        keywords = kwargs or {}
        result = func(*args, **keywords)
        if isinstance(result, torch.Tensor) and result.ndim == 3 and result.is_floating_point():
            known = self._known(func, args, keywords, result)
            if known is not None:
                self.handover.write(result, known)
        return result

    def _known(self, func: Callable[..., Any], args: tuple[Any, ...], keywords: dict[str, Any], result: torch.Tensor) -> Carried | None:
        name = getattr(func, "__name__", "")
        if name in ("masked_scatter", "masked_scatter_"):
            given = [*args, *(keywords[key] for key in ("mask", "source") if key in keywords)]
            stream, mask, features = given[:3]
            marks = mask.expand(stream.shape)[..., 0] if mask.ndim in (2, 3) and mask.ndim == stream.ndim else None
            return None if marks is None else Carried(marks, features)
        source = args[0] if args and isinstance(args[0], torch.Tensor) else None
        known = None if source is None else self.handover.read(source)
        if known is None or source is None:
            return None
        if known.left:
            # An encoder's result, as it is or row by row.
            return Carried(left=known.left) if name in _FOLLOWS | {"repeat_interleave", "index_select", "__getitem__"} else None
        if known.visual is None or known.features is None:
            return None
        whole = name == "__getitem__" and result.shape == source.shape and result.data_ptr() == source.data_ptr()
        if name in _FOLLOWS or whole:
            return known
        dim = args[2] if len(args) > 2 else keywords.get("dim")
        if name != "repeat_interleave" or dim != 0:
            return None
        # Beams: every row several times.
        repeats = args[1] if len(args) > 1 else keywords["repeats"]
        rows = known.features.reshape(len(source), -1, source.shape[-1])
        return Carried(known.visual.repeat_interleave(repeats, 0), rows.repeat_interleave(repeats, 0))


class _Watching(threading.local):
    watch: MergeWatch | None = None


WATCHING = _Watching()


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Watch merges in this thread; an outer watch goes on."""
    if WATCHING.watch is not None:
        yield
        return
    WATCHING.watch = MergeWatch()
    try:
        with WATCHING.watch:
            yield
    finally:
        WATCHING.watch = None


@contextlib.contextmanager
def unwatched() -> Iterator[MergeWatch | None]:
    """Take the watch off while a way into the model runs: Dynamo would trace it too."""
    watch = WATCHING.watch
    if watch is None:
        yield None
        return
    WATCHING.watch = None
    watch.__exit__(None, None, None)  # type: ignore[no-untyped-call]
    try:
        yield watch
    finally:
        watch.__enter__()  # type: ignore[no-untyped-call]
        WATCHING.watch = watch
