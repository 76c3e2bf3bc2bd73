"""The loader's entries in an order that a seed decides, and how a model is called with them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from rewrite.ir.errors import FittingError

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Batches:
    """The loader gone through again and again; the n-th time from a random state that the seed and n decide.

    torch's global random state, and that of the loader's own generator where it has one, are set before each time. The global one is kept
    apart: what else draws random numbers neither changes the loader's order nor is changed by it. So a loader whose order and augmentation
    come from these gives the same entries in every run, and `skip` leads to where an interrupted run stood. As a context manager it leaves
    the loader's generator as it was.
    """

    def __init__(self, loader: Iterable[Any], seed: int) -> None:
        self.loader, self.seed, self.epoch = loader, seed, -1
        self.entries: Iterator[Any] = iter(())
        self.state = torch.get_rng_state()
        holders = (getattr(loader, name, None) for name in ("sampler", "batch_sampler"))
        found = (getattr(holder, "generator", None) for holder in (loader, *holders))
        self.generators = [generator for generator in dict.fromkeys(found) if isinstance(generator, torch.Generator)]

    def __enter__(self) -> Self:
        self.before = [generator.get_state() for generator in self.generators]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for generator, state in zip(self.generators, self.before, strict=True):
            generator.set_state(state)

    def next(self) -> Any:
        """The next entry; `FittingError` where the loader has none."""
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self.state)
            entry = next(self.entries, self)
            if entry is self:
                self._start()
                entry = next(self.entries, self)
            self.state = torch.get_rng_state()
        if entry is self:
            raise FittingError("the loader gives no batches; fitting needs some to train on")
        return entry

    def skip(self, count: int) -> None:
        """Go on as if so many entries had been asked for."""
        for _ in range(count):
            self.next()

    def _start(self) -> None:
        self.epoch += 1
        # Both numbers into one, so that neighbouring seeds share no order (the multiplier is 2^32 over the golden ratio).
        seed = (self.seed * 0x9E3779B1 + self.epoch) % 2**63
        for generator in (torch.default_generator, *self.generators):
            generator.manual_seed(seed)
        self.entries = iter(self.loader)


def repeatable(loader: Iterable[Any]) -> Iterable[Any]:
    """The loader, or a list of what an iterator, which can be gone through once only, gives."""
    return list(loader) if iter(loader) is loader else loader


class Caller:
    """How a model is called with a loader's entry.

    inputs: the user's function from an entry to what the model takes. Either is a mapping of keyword arguments, a tuple or list of
    positional ones, or a single tensor. Of a tuple that the loader gives, entries beyond what `forward` takes by position (labels, for the
    loss) stay out of the call. Tensors are brought to the model's device.
    """

    def __init__(self, model: nn.Module, inputs: Callable[[Any], Any] | None) -> None:
        self.inputs = inputs
        self.device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        kinds = [parameter.kind for parameter in inspect.signature(model.forward).parameters.values()]
        by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        self.most = None if inspect.Parameter.VAR_POSITIONAL in kinds else sum(kind in by_position for kind in kinds)

    def placed(self, entry: Any) -> Any:
        """The entry with its tensors on the model's device."""
        return tree_map_only(torch.Tensor, lambda tensor: tensor.to(self.device, non_blocking=True), _plain(entry))

    def arguments(self, entry: Any) -> Arguments:
        """Positional and keyword arguments of the call, from a placed entry."""
        given = entry if self.inputs is None else _plain(self.inputs(entry))
        if isinstance(given, torch.Tensor):
            return (given,), {}
        if isinstance(given, Mapping):
            return (), dict(given)
        if isinstance(given, tuple | list):
            return tuple(given if self.inputs is not None else given[: self.most]), {}
        raise TypeError(
            f"{'the loader gives' if self.inputs is None else 'inputs gave'} a {type(given).__name__}; the model is called with a "
            "mapping of keyword arguments, a tuple of positional ones, or a tensor"
        )


def _plain(entry: Any) -> Any:
    """A mapping of any class as a dict: containers that torch does not know are opaque to its tree functions."""
    return dict(entry) if isinstance(entry, Mapping) else entry
