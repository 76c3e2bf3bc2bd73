"""What code between two graphs of a call does to patches that were chosen among: it is followed from operator to operator.

A capture that is cut in a loop leaves the loop to Python. Where that lays patches out anew, no graph says how; so every operator that it
runs is seen by a dispatch mode. Beside the memory of a tensor with patches there is another of the same length, which says of each element
whether it is of a token that stays: views need no rule then, and what copies elements copies those of both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rewrite.tokens import kept_elements
from rewrite.tokens.chosen import Choice, Chosen

aten = torch.ops.aten


@dataclass
class Shadow:
    """Which elements of a tensor's memory are of tokens that stay: bool, one for each. memory: held, so that no other takes its place.

    lost: why there is no telling any more.
    """

    memory: torch.UntypedStorage
    version: int
    dtype: torch.dtype
    choice: Choice
    stay: torch.Tensor
    lost: str | None = None

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """That of the elements of a tensor in this memory."""
        return self.stay.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


@dataclass
class Shadows:
    """The memory of tensors with patches, for one call."""

    by_memory: dict[int, Shadow] = field(default_factory=dict)

    def put(self, tensor: torch.Tensor, chosen: Chosen) -> None:
        """Note which patches of a tensor stay, or that there is no telling."""
        shadow = self._at(tensor)
        if shadow is None or shadow.choice != chosen.choice or self._changed(shadow, tensor):
            memory = tensor.untyped_storage()
            every = torch.ones(memory.nbytes() // tensor.element_size(), dtype=torch.bool, device=tensor.device)
            shadow = Shadow(memory, _version(tensor), tensor.dtype, chosen.choice, every)
            self.by_memory[memory._cdata] = shadow
        if chosen.lost is not None:
            shadow.lost = chosen.lost
            return
        stay = (chosen.stay if chosen.relaid else chosen.stay[..., None]).expand(tensor.shape)
        place = shadow.of(tensor)
        for axis, stride in enumerate(tensor.stride()):
            if stride == 0:  # one element in many places
                place, stay = place.narrow(axis, 0, 1), stay.narrow(axis, 0, 1)
        place.copy_(stay)

    def read(self, tensor: torch.Tensor) -> Chosen | None:
        """Which elements of a tensor are of tokens that stay; None where it has no patches."""
        shadow = self._at(tensor)
        if shadow is None:
            return None
        lost = shadow.lost or self._changed(shadow, tensor)
        if lost is not None:
            return Chosen(shadow.choice, shadow.stay[:0], lost=lost)
        return Chosen(shadow.choice, shadow.of(tensor), relaid=True)

    def _at(self, tensor: torch.Tensor) -> Shadow | None:
        return self.by_memory.get(tensor.untyped_storage()._cdata) if _is_plain(tensor) else None

    @staticmethod
    def _changed(shadow: Shadow, tensor: torch.Tensor) -> str | None:
        same = (shadow.version, shadow.dtype) == (_version(tensor), tensor.dtype)
        return None if same else "they were written into, or read as another type, between two graphs"


class Relay(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows patches while code between graphs runs. Dynamo takes it off while it traces, and graphs run without it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shadows = Shadows()
        self.on = False

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Dynamo compiles frames under this mode all the same."""
        return True

    def follow(self, tensor: torch.Tensor, chosen: Chosen) -> None:
        """Follow the patches of a tensor from now on."""
        if _is_plain(tensor):
            self.shadows.put(tensor, chosen)
            self.start()

    def start(self) -> None:
        if not self.on and self.shadows.by_memory:
            self.on = True
            self.__enter__()  # type: ignore[no-untyped-call]

    def stop(self) -> None:
        if self.on:
            self.on = False
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Around what is no code of the model's own between graphs."""
        was = self.on
        self.stop()
        try:
            yield
        finally:
            if was:
                self.start()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        given = (args, kwargs or {})
        known = [one for leaf in tree_leaves(given) if isinstance(leaf, torch.Tensor) and (one := self.shadows.read(leaf)) is not None]
        result = func(*args, **given[1])
        if not known or func.overloadpacket in _LIKE:
            return result
        lost = next((one for one in known if one.lost is not None or one.choice != known[0].choice), None)
        rule = _COPIES.get(func.overloadpacket) if lost is None else None
        told = f"{func.overloadpacket} computes over them between two graphs" if lost is None or lost.lost is None else lost.lost
        for value in _written(func, *given):
            self.shadows.put(value, Chosen(known[0].choice, known[0].stay, lost=told))
        for value in tree_leaves(result):
            if not isinstance(value, torch.Tensor) or not _is_plain(value) or self.shadows.read(value) is not None:
                continue
            stay = known[0].stay if rule is None else rule(func, self._mask, *given)
            self.shadows.put(value, Chosen(known[0].choice, stay, relaid=True, lost=told if rule is None else None))
        return result

    def _mask(self, tensor: torch.Tensor) -> torch.Tensor:
        known = self.shadows.read(tensor)
        return kept_elements.elements_beside(tensor) if known is None else known.stay


Mask = Callable[[torch.Tensor], torch.Tensor]


def _same(func: Any, mask: Mask, args: tuple[Any, ...], keywords: dict[str, Any]) -> torch.Tensor:
    """The same elements in other memory, or of another type."""
    return mask(args[0])


def _first(func: Any, mask: Mask, args: tuple[Any, ...], keywords: dict[str, Any]) -> torch.Tensor:
    """Elements of the first operand; other tensors say which."""
    return func(mask(args[0]), *args[1:], **keywords)  # type: ignore[no-any-return]


def _all(func: Any, mask: Mask, args: tuple[Any, ...], keywords: dict[str, Any]) -> torch.Tensor:
    """Elements of several tensors."""
    return func([mask(one) for one in args[0]], *args[1:], **keywords)  # type: ignore[no-any-return]


def _padded(func: Any, mask: Mask, args: tuple[Any, ...], keywords: dict[str, Any]) -> torch.Tensor:
    return kept_elements.elements_padded(mask(args[0]), args[1])


# What reads of a tensor its size and type alone.
_LIKE = frozenset(
    {aten.empty_like, aten.full_like, aten.ones_like, aten.zeros_like, aten.rand_like, aten.randn_like}
    | {aten.new_empty, aten.new_empty_strided, aten.new_full, aten.new_ones, aten.new_zeros}
)

# What copies elements into new memory and computes nothing; views stay in the memory that is known.
_COPIES: dict[Any, Callable[[Any, Mask, tuple[Any, ...], dict[str, Any]], torch.Tensor]] = {
    **dict.fromkeys((aten.clone, aten._to_copy), _same),
    **dict.fromkeys((aten.index, aten.index_select, aten.gather, aten.repeat, aten.flip, aten.roll, aten._unsafe_view), _first),
    **dict.fromkeys((aten.cat, aten.stack), _all),
    aten.constant_pad_nd: _padded,
}


def _written(func: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> list[torch.Tensor]:
    """The tensors that an operator writes into."""
    if not func._schema.is_mutable:
        return []
    declared = func._schema.arguments
    given = {**{one.name: value for one, value in zip(declared, args, strict=False)}, **keywords}
    written = [given.get(one.name) for one in declared if one.alias_info is not None and one.alias_info.is_write]
    return [leaf for leaf in tree_leaves(written) if isinstance(leaf, torch.Tensor) and _is_plain(leaf)]


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor is numbers in memory of its own kind: no subclass, and not sparse."""
    return tensor.layout == torch.strided and tensor.is_floating_point() and type(tensor) in (torch.Tensor, torch.nn.Parameter)


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
