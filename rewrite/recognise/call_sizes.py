"""How large things are in the call at hand: a graph traced with symbolic sizes may be read for another call than it was traced in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch import fx

from rewrite.recognise.operators import Extent, hint, value_of


class CallSizes:
    """Sizes by the values that the symbols of the trace have in one call, read off the graph's inputs."""

    def __init__(self, inputs: Mapping[fx.Node, Any]) -> None:
        self.symbols: dict[sympy.Symbol, int] = {}
        for node, held in inputs.items():
            traced = value_of(node)
            if isinstance(traced, torch.Tensor) and isinstance(held, torch.Tensor):
                for size, length in zip(traced.shape, held.shape, strict=True):
                    self._learn(size, length)
            else:
                self._learn(traced, held)

    def _learn(self, traced: Any, held: Any) -> None:
        if isinstance(traced, torch.SymInt) and isinstance(traced.node.expr, sympy.Symbol):
            self.symbols[traced.node.expr] = hint(held)

    def of(self, size: Any) -> int:
        """A size of the trace as it is in this call: by its exact expression, or as it was traced where that holds an unknown symbol."""
        exact = size.exact if isinstance(size, Extent) else size.node.expr if isinstance(size, torch.SymInt) else None
        if exact is None or not exact.free_symbols or not exact.free_symbols <= self.symbols.keys():
            return hint(size)
        return int(exact.subs(self.symbols))
