"""KV cache entries that tokens left: what earlier calls noted of them, as inputs of a graph, and what a graph leaves in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx

from rewrite.lower.cursor import Cursor
from rewrite.notes import Note
from rewrite.tokens.gather import places_of_present
from rewrite.tokens.marks import marked_padding
from rewrite.tokens.placement import Selection


class ShortCaches:
    """Those of one graph. taken: what the note of an input says, by kind and number of the input, as a node. kept: by node of positions,
    how many there are."""

    def __init__(self, placeholders: Sequence[fx.Node], notes: Mapping[int, Note], taken: Callable[[str, int], fx.Node]) -> None:
        self.placeholders, self.notes, self.taken = placeholders, notes, taken
        self.kept: dict[fx.Node, int] = {}
        self._present: dict[int, fx.Node] = {}

    def left(self, cache: fx.Node) -> bool:
        """Whether tokens left an input that is an entry."""
        note = self.notes.get(self.placeholders.index(cache))
        return note is not None and note.positions is not None

    def present(self, cache: fx.Node) -> fx.Node:
        """bool [B, K]: which tokens of such an entry are no padding."""
        index = self.placeholders.index(cache)
        if index not in self._present:
            self._present[index] = self.taken("present", index)
        return self._present[index]

    def seeds(self) -> dict[fx.Node, dict[int, Selection]]:
        """The entries that earlier calls left short, as seeds of a selection; those with the same positions share one."""
        seeds: dict[fx.Node, dict[int, Selection]] = {}
        shared: dict[int, Selection] = {}
        for index, note in self.notes.items():
            if note.positions is None:
                continue
            cache = self.placeholders[index]
            if id(note.positions) not in shared:
                shared[id(note.positions)] = self._selection(cache, index, note.padded)
                self.kept[shared[id(note.positions)].positions] = note.positions.shape[1]
            seeds[cache] = {2: shared[id(note.positions)]}
        return seeds

    def _selection(self, cache: fx.Node, index: int, padded: bool) -> Selection:
        positions, length = self.taken("positions", index), self.taken("length", index)
        present = self.present(cache) if padded else None
        at = Cursor(cache.graph, length if present is None else max(present, length))
        kept = at.call_method("size", (positions, 1))
        places = None if present is None else at.call(places_of_present, (positions, present, length))
        return Selection(positions=positions, length=length, kept=kept, present=present, places=places)


def mark_padding(output: fx.Node, short: Mapping[fx.Node, Selection]) -> list[tuple[dict[str, Any], tuple[int, ...]]]:
    """Put marks in the places of padding in the entries that a graph returns `short`, and say what is known of these.

    Returns:
        (facts by kind, the outputs that they are known of).
    """
    by_selection: dict[tuple[fx.Node, int | fx.Node, fx.Node | None], list[int]] = {}
    results = list(output.args[0])  # type: ignore[arg-type]
    for node, selection in short.items():
        indices = [index for index, result in enumerate(results) if result is node]
        by_selection.setdefault((selection.positions, selection.length, selection.present), []).extend(indices)
        if selection.present is not None:
            with output.graph.inserting_before(output):
                marked = output.graph.call_function(marked_padding, (node, selection.present))
            results = [marked if result is node else result for result in results]
    output.args = (tuple(results),)
    known = (
        ({"positions": one[0], "length": one[1], **({"padded": True} if one[2] else {})}, tuple(at)) for one, at in by_selection.items()
    )
    return list(known)
