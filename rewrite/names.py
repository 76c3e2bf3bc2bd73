"""Qualified names for graphs that Dynamo named relative to whatever function it traced.

After a graph break the rest of a function is captured with its own `self`, and one captured graph may then serve every layer of a model.
Which module it runs for is told by the parameters it is given.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn
from torch.utils.weak import WeakIdKeyDictionary


@dataclass(frozen=True)
class Witness:
    """An input that tells which module a graph runs for: parameter number `index`, `depth` names below that module."""

    index: int
    depth: int


class Names:
    """The parameters of a model by identity, and what a graph's module paths mean by them."""

    def __init__(self, root: nn.Module, prefix: str = "") -> None:
        self.root, self.prefix = root, prefix
        self._owners: MutableMapping[Any, str] = WeakIdKeyDictionary()

    def witness(self, placeholders: Sequence[fx.Node], inputs: Sequence[Any]) -> Witness | None:
        """The input by which a graph's module is known; None where it has no parameters of the model."""
        found: dict[str, list[Witness]] = {}
        for index, (node, value) in enumerate(zip(placeholders, inputs, strict=True)):
            name = self._owner(value)
            if name is not None and (depth := _shared_depth(str(node.target), name.split("."))):
                found.setdefault(_above(name, depth), []).append(Witness(index, depth))
        if not found:
            return None
        # Tied parameters are known by one of their names only; most others are known by the right one.
        votes = Counter({base: len(witnesses) for base, witnesses in found.items()})
        return found[votes.most_common(1)[0][0]][0]

    def base(self, witness: Witness | None, inputs: Sequence[Any]) -> str | None:
        """The qualified name of the module that a graph runs for in this call; None where that is not known."""
        name = None if witness is None else self._owner(inputs[witness.index])
        return None if name is None or witness is None else _above(name, witness.depth)

    def qualify(self, base: str | None) -> Callable[[str], str]:
        """Module path in a graph -> qualified name in the model."""
        start = self.prefix if base is None else base
        found = self.root.get_submodule(start) if start in dict(self.root.named_modules()) else None

        def name(path: str) -> str:
            """Steps of the path that are no modules (what a module was reached through) are left out."""
            parts, module = [start] if start else [], found
            for part in path.split(".") if path else ():
                inside = module._modules.get(part) if module is not None else None
                if module is None or inside is not None:
                    parts.append(part)
                    module = inside
            return ".".join(parts)

        return name

    def _owner(self, value: Any) -> str | None:
        if not isinstance(value, nn.Parameter):
            return None
        if value not in self._owners:
            for name, parameter in self.root.named_parameters():
                self._owners[parameter] = name
        return self._owners.get(value)


def _above(name: str, depth: int) -> str:
    return ".".join(name.split(".")[:-depth])


def _shared_depth(target: str, parts: list[str]) -> int:
    """How many of the last names of a parameter are spelled in a placeholder's target (`L_self_modules_proj_parameters_weight_`)."""
    return max((depth for depth, spelled in _spellings(parts) if target.lower().endswith(spelled.lower())), default=0)


def _spellings(parts: list[str]) -> Iterator[tuple[int, str]]:
    spelled = f"_parameters_{parts[-1]}_"
    yield 1, spelled
    for depth, part in enumerate(reversed(parts[:-1]), 2):
        spelled = f"_modules_{part}{spelled}"
        yield depth, spelled
