"""Running the user's model as it is without leaving a trace: on copies, buffers and random state put back."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from rewrite.notes import slots
from rewrite.states import note_of


def call_original(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], method: str | None = None) -> Any:
    """Call the module as it is, its hooks included, or a method of its class, past what `rewrite` installed."""
    if method is not None:
        return getattr(type(module), method)(module, *arguments, **keywords)
    return module._call_impl(*arguments, **keywords)  # type: ignore[no-untyped-call]


def copied(value: Any) -> Any:
    """The inputs once more, so that a run on them (a KV cache grows) is not seen by the caller."""
    memo: dict[int, Any] = {}
    for slot in slots(value):
        if note_of(slot.tensor) is not None:
            continue  # its copy takes the note along
        fresh = slot.tensor.detach().clone()
        memo[id(slot.tensor)] = fresh.requires_grad_(slot.tensor.requires_grad)
    return copy.deepcopy(value, memo)


@contextlib.contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """Buffers (running statistics) and the random state are afterwards what they were."""
    saved = {name: buffer.detach().clone() for name, buffer in module.named_buffers()}
    with torch.random.fork_rng():
        try:
            yield
        finally:
            with torch.no_grad():
                for name, buffer in module.named_buffers():
                    if name in saved and buffer.shape == saved[name].shape:
                        buffer.copy_(saved[name])


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode, and afterwards in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        # Not by eval(), which a model may override to do more, and which could not be undone then.
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training


def kind_of_call(value: Any) -> Any:
    """What distinguishes one way of calling from another: switches by value, anything else by its type."""
    return value if isinstance(value, bool | str | None) else type(value)
