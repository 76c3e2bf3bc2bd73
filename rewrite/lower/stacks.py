"""Which token operations are asked of each stack of a graph, and where in it they are done."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from rewrite.ir.errors import NotApplicableError
from rewrite.ir.program import Program
from rewrite.ir.selection import Exit, Merge, Select, TokenOperation, first_layer
from rewrite.lower.residual import behind_attention, behind_layer
from rewrite.recognise.sites import Found, Recognition


class Stacks:
    """The stacks of one graph, by number."""

    def __init__(self, recognition: Recognition, program: Program) -> None:
        self.recognition, self.program = recognition, program

    def shortened(self) -> Iterable[Found]:
        """The sites that some tokens left in front of."""
        for stack in self.numbers():
            first = min(map(first_layer, self.operations(stack)))
            yield from (entry for entry in self.entries(stack) if entry.site.layer >= first)

    def numbers(self) -> list[int]:
        """Those of which something is asked, in order."""
        named = {one.stack for one in self.program.token_operations()}
        return sorted(stack for stack in named if self.operations(stack))

    def operations(self, stack: int) -> list[TokenOperation]:
        """The operations of a stack; in a call without visual tokens in it (a step of decoding) none of these can leave."""
        merged = any(entry.merge is not None for entry in self.entries(stack))
        patches = (one for one in self.program.token_operations(stack) if isinstance(one, Merge) or of_patches(one))
        return list(self.program.token_operations(stack) if merged else patches)

    def entries(self, stack: int) -> list[Found]:
        """The sites of a stack."""
        return [entry for entry in self.recognition.found if entry.site.stack == stack]

    def place(self, one: TokenOperation) -> tuple[Found, fx.Node]:
        """The site of the layer where tokens leave, and the residual stream there."""
        entry = next((entry for entry in self.entries(one.stack) if entry.site.layer == one.layer), None)
        if isinstance(one, Exit) and entry is None:
            entry = next(entry for entry in self.entries(one.stack) if entry.site.layer >= one.layer)
        if entry is None:
            raise NotApplicableError(f"{one.by}: layer {one.layer} is in another graph of the call, so no token can leave there")
        stream = entry.stream
        if stream is not None and between(one):
            stream = behind_attention(entry, stream)
        if stream is None:
            raise NotApplicableError(f"{entry.site.name}: the residual stream was not found there, so no token can leave ({one.by})")
        later = (other for other in self.entries(one.stack) if other.site.layer >= first_layer(one) and other.stream is not None)
        beside = next((other.site.name for other in later if other.stream is not None and other.stream < stream), None)
        if beside is not None:
            raise NotApplicableError(
                f"{entry.site.name}: {beside} attends beside it to the same tokens, so that none can leave between the two ({one.by}); "
                "choose the last of the layers that stand side by side"
            )
        return entry, stream

    def streams_behind(self, stack: int) -> set[fx.Node]:
        """The residual stream in front of, within and behind every layer that patches left in front of; none where some were not found."""
        entries = sorted(self.entries(stack), key=lambda entry: entry.site.layer)
        ahead = [entry.stream for entry in entries]
        between = [None if stream is None else behind_attention(entry, stream) for entry, stream in zip(entries, ahead, strict=True)]
        behind = [behind_layer(entry) for entry in entries]
        if len(entries) > 1 and behind[:-1] == between[1:]:
            behind = []  # attention and MLP are added at once
        layers = [one.layer for one in self.operations(stack) if of_patches(one)]
        found: set[fx.Node | None] = set()
        for nodes in (ahead, between, behind):
            found.update(node for entry, node in zip(entries, nodes, strict=False) if layers and entry.site.layer >= min(layers))
        return set() if None in found else {node for node in found if node is not None}


def between(one: TokenOperation) -> bool:
    """Whether tokens leave between attention and MLP of a layer, and not in front of it."""
    return one.criteria is None if isinstance(one, Merge) else isinstance(one, Select) and one.place == "between"


def of_patches(one: TokenOperation) -> bool:
    """Whether patches of a grid leave, and not visual tokens of a text."""
    return isinstance(one, Select) and one.candidates == "patches"
