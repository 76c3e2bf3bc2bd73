"""The operands of one operator, brought to one selection: gathered, restored, or joined."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import fx

from rewrite.tokens import rules
from rewrite.tokens.by_row import joined_present
from rewrite.tokens.edits import combine, full_size, insert_call, insert_gather_call, insert_lift, insert_restore_call, set_argument
from rewrite.tokens.flow import Flow, Group, Label, Operand
from rewrite.tokens.frozen import Frozen
from rewrite.tokens.gather import flatten_positions, join_positions, places_of_present, positions_between, present_between
from rewrite.tokens.marks import with_marks
from rewrite.tokens.placement import Placement, Selection, example, is_tensor, shape_of, storages_of
from rewrite.tokens.refusals import refuse

_WITHOUT = {"fused": "select without fusing", "merged": "merge in other layers"}


class Operands:
    """Where every tensor of a graph has its tokens, and the nodes that were inserted to bring operands together."""

    def __init__(self, streams: frozenset[fx.Node] = frozenset()) -> None:
        self.placements: dict[fx.Node, Placement] = {}
        self.frozen = Frozen(self.placements, streams)
        self.readers: set[fx.Node] = set()  # nodes that are given the dropped tokens as they left
        self.gathered: dict[Any, fx.Node] = {}
        self.restored: dict[fx.Node, fx.Node] = {}
        self.joined: dict[Any, Selection] = {}
        self.flat: dict[fx.Node, Selection] = {}  # by positions: the selection of batch and tokens merged
        self.folded: dict[fx.Node, tuple[Selection, Any, Any]] = {}  # by merged positions: the one it was, B, and N
        # By positions and two numbers: the selection without so many first and last tokens.
        self.inner: dict[tuple[fx.Node, int, int], Selection] = {}
        self.ahead: dict[fx.Node, tuple[Selection, int]] = {}  # by positions of such a one: the whole selection, and the start

    def forget(self, node: fx.Node) -> None:
        """A tensor was written to, the first operand of `node`: what was gathered from it, or restored, is another tensor now."""
        memory = frozenset[int]().union(*(storages_of(one) for one in node.args[:1] if isinstance(one, fx.Node)))
        gone = [key for key in self.gathered if any(isinstance(part, fx.Node) and storages_of(part) & memory for part in key)]
        for key in gone:
            del self.gathered[key]
        for value in [value for value in self.restored if storages_of(value) & memory]:
            del self.restored[value]
        self.frozen.forget()

    def placed(self, operand: Operand) -> tuple[Placement, dict[Label, Selection], set[Label], Label | None]:
        """What is known of one operand, by label: its selections, its restored axes and its batch."""
        place = self.placements.get(operand.node)
        if place is None:
            return Placement(), {}, set(), None
        labels = operand.labels[len(operand.labels) - len(shape_of(operand.node)) :]
        batch = labels[place.batch] if place.axes and place.batch is not None else None
        return place, {labels[a]: s for a, s in place.axes.items()}, {labels[a] for a in place.restored}, batch

    def gather(self, node: fx.Node, operand: Operand, selected: Mapping[Label, Selection], batch: Label | None, rows: int) -> None:
        """Gather an operand on each selected axis of which it still has every token."""
        own = self.placed(operand)[1]
        value = operand.node
        shape = shape_of(value)
        missing = len(operand.labels) - len(shape)
        axes = [i for i, size in enumerate(shape) if (label := operand.labels[missing + i]) in selected and label not in own and size != 1]
        if not axes:
            return
        if rules.in_place(node) and operand.path == ("args", 0):
            refuse(node, "it writes selected tokens into a tensor that has all of them", "use the operator that returns a new tensor")
        if batch is not None and batch not in operand.labels:
            refuse(
                node, f"operand {value.name} has all tokens and no axis for the batch, whose rows kept different ones", "select after it"
            )
        made = next((how for axis in axes if (how := selected[operand.labels[missing + axis]].made)), None)
        if made:
            refuse(
                node,
                f"operand {value.name} has an entry for every token of the model's own, and none for tokens that were {made}",
                _WITHOUT[made],
            )
        at = None if batch is None else operand.labels.index(batch)
        lift = missing if at is not None and at < missing else 0
        place = Placement(batch=at if at is None or lift else at - missing, rows=rows)
        if lift:
            value = self._once(("lift", value, lift), lambda: insert_lift(node, operand.node, lift))
        for axis in axes:
            positions = selected[operand.labels[missing + axis]].positions
            key = (value, axis + lift, positions, place.batch, rows)
            shorter = {**self.placements.get(value, Placement()).axes, axis + lift: selected[operand.labels[missing + axis]]}
            value = self._once(key, partial(insert_gather_call, node, value, axis + lift, positions, place))
            self.placements[value] = replace(place, axes=shorter)
        set_argument(node, operand.path, value)

    def join(self, flow: Flow, selected: Mapping[Label, Selection]) -> Selection:
        """The selection of a concatenation along the token axis; of a part without a selection every token is left."""
        assert flow.joined is not None
        parts: list[fx.Node | None] = []
        lengths: list[int | fx.Node] = []
        kepts: list[int | fx.Node] = []
        key: list[Any] = []
        for operand, mark in zip(flow.operands, flow.joined[0], strict=True):
            if (selection := selected.get(mark)) is not None:
                parts.append(selection.positions)
                lengths.append(selection.length)
                kepts.append(selection.kept)
                key.append(selection.positions)
            else:
                axis = operand.labels.index(mark)
                parts.append(None)
                lengths.append(full_size(operand.node, operand.node, axis, self.placements))
                kepts.append(lengths[-1])
                key.append(shape_of(operand.node)[axis])
        whole = self._rejoined(flow, selected)
        if whole is not None:
            return whole
        made = next((selection.made for selection in selected.values() if selection.made), None)
        if made:
            refuse(flow.operands[0].node, f"other tokens are joined with ones of which some were {made}", _WITHOUT[made])
        if tuple(key) not in self.joined:
            positions = insert_call(flow.operands[0].node, join_positions, (parts, lengths))
            length, kept = (combine(positions, operator.add, sizes) for sizes in (lengths, kepts))
            present = [None if (selection := selected.get(mark)) is None else selection.present for mark in flow.joined[0]]
            joined = Selection(positions, length, kept)
            if any(part is not None for part in present):
                joined = self._hiding(joined, insert_call(flow.operands[0].node, joined_present, (present, positions, kepts)))
            self.joined[tuple(key)] = joined
        return self.joined[tuple(key)]

    @staticmethod
    def _hiding(selection: Selection, present: fx.Node) -> Selection:
        """The selection, some tokens of which are padding."""
        places = insert_call(present, places_of_present, (selection.positions, present, selection.length))
        return replace(selection, present=present, places=places)

    def _rejoined(self, flow: Flow, selected: Mapping[Label, Selection]) -> Selection | None:
        """The selection that a concatenation puts together again: the first tokens of an axis, and what is left of those behind them."""
        assert flow.joined is not None
        if len(flow.operands) != 2 or list(selected) != [flow.joined[0][1]]:
            return None
        first, mark = flow.operands[0], flow.joined[0][0]
        whole, start = self.ahead.get(selected[flow.joined[0][1]].positions, (None, 0))
        return whole if shape_of(first.node)[first.labels.index(mark)] == start else None

    def sliced(self, operand: Operand, group: Group) -> tuple[bool, Selection | None]:
        """Whether a slice cuts a selected axis where all tokens are left, and the selection of the slice, None where it has every token.

        Rotary tables and heads take the tokens in front of a grid (CLS, registers) apart, and those behind it, which are never dropped.
        """
        selected = self.placed(operand)[1]
        selection = selected.get(group.ins[0])
        if selection is None or group.span is None or selection.holders is not None or len(group.ins) != 1:
            return False, None
        start, stop = _from_the_ends(group.span, shape_of(operand.node)[operand.labels.index(group.ins[0])], selection.suffix)
        if (stop is not None and 0 <= start <= stop <= selection.prefix) or (-selection.suffix <= start < 0 and (stop is None or stop < 0)):
            return True, None
        if not 0 <= start <= selection.prefix or (stop is not None and not -selection.suffix <= stop < 0):
            return False, None
        behind = 0 if stop is None else -stop
        key = selection.positions, start, behind
        if key not in self.inner:
            positions = insert_call(operand.node, positions_between, (selection.positions, start, behind))
            length, kept = (combine(positions, operator.add, [size, -start - behind]) for size in (selection.length, selection.kept))
            prefix, suffix = selection.prefix - start, selection.suffix - behind
            inner = Selection(positions, length, kept, selection.fused, prefix=prefix, suffix=suffix)
            self.inner[key] = self._padded(operand.node, inner, selection, start, behind)
            if not behind:
                self.ahead[positions] = selection, start
        return True, self.inner[key]

    def _padded(self, like: fx.Node, inner: Selection, whole: Selection, start: int, behind: int) -> Selection:
        """The `inner` tokens of a selection, knowing which are padding."""
        if whole.present is None:
            return inner
        return self._hiding(inner, insert_call(like, present_between, (whole.present, start, behind)))

    def split_off(self, node: fx.Node) -> bool:
        """Make slices of a split that takes the first tokens of a selected axis, all left, from those behind them; whether it is one."""
        source, sizes = node.args[0], rules.argument(node, 1, "split_size", "split_size_or_sections", "split_sizes")
        if not isinstance(source, fx.Node) or not isinstance(sizes, (tuple, list)) or len(sizes) != 2 or not isinstance(sizes[0], int):
            return False
        axis = rules.argument(node, 2, "dim", default=0) % len(shape_of(source))
        selection = self.placements.get(source, Placement()).axes.get(axis)
        if selection is None or not 0 < sizes[0] <= selection.prefix or any(rules.name_of(user) != "getitem" for user in node.users):
            return False
        for user in list(node.users):
            part = slice(0, sizes[0]) if user.args[1] == 0 else slice(sizes[0], None)
            user.args = (source, (*[slice(None)] * axis, part))
        return True

    def refold(self, node: fx.Node, flow: Flow, operand: Operand, group: Group) -> tuple[Label, Selection, Label | None] | None:
        """The selection where batch and tokens are merged to one axis, or split again: its axis, itself, and the batch; else None.

        Merged, it is a selection of one row, [1, B * K] of B * N, and there is no batch.
        """
        place, selected, _, batch = self.placed(operand)
        if group.cut or len(place.axes) != 1 or not selected.keys() & set(group.ins):
            return None
        shape = shape_of(operand.node)
        (axis, selection), *_ = place.axes.items()
        if len(group.ins) == 2 and len(group.outs) == 1 and group.ins[0] == batch and place.rows == 1 and not selection.made:
            assert place.batch is not None
            if selection.positions not in self.flat:
                rows = full_size(operand.node, operand.node, place.batch, self.placements)
                positions = insert_call(operand.node, flatten_positions, (selection.positions, selection.length))
                length, kept = (combine(positions, operator.mul, [rows, size]) for size in (selection.length, selection.kept))
                flat = Selection(positions, length, kept)
                if selection.present is not None:
                    flat = self._hiding(flat, insert_call(operand.node, "reshape", (selection.present, (1, -1))))
                self.flat[selection.positions] = flat
                self.folded[positions] = selection, shape[place.batch], shape[axis]
            return group.outs[0], self.flat[selection.positions], None
        if len(group.ins) == 1 and len(group.outs) == 2 and selection.positions in self.folded and flow.sizes:
            split, *sizes = self.folded[selection.positions]
            if sizes == [shape_of(node)[flow.output.index(label)] for label in group.outs]:
                return group.outs[1], split, group.outs[0]
        return None

    def _once(self, key: Any, insert: Callable[[], fx.Node]) -> fx.Node:
        """The node inserted under `key`: the first is before all that ask for it later."""
        if key not in self.gathered:
            self.gathered[key] = insert()
        return self.gathered[key]

    def restore(self, node: fx.Node, value: fx.Node) -> None:
        """Put the dropped tokens of an operand back, on all its axes: as they left, or as zeros where they have no value there; merged ones
        as copies. With the former and the latter all goes on as it was."""
        place = self.placements.get(value)
        if place is None or not place.axes:
            return
        if not is_tensor(value):
            refuse(node, f"operand {value.name} is a tuple of tensors with dropped tokens", "select after it")
        if value not in self.restored:
            self.restored[value] = self.frozen.whole(value) or self._with_zeros(node, value, place)
        full = self.restored[value]
        if self.frozen.made.get(value) is full:
            self.readers.add(node)
        node.replace_input_with(value, full)

    def mark(self, node: fx.Node, place: int) -> None:
        """Put the tokens of an argument [B, H, K, D] into a tensor of the full length, with marks in the places of those that left."""
        value = node.args[place]
        assert isinstance(value, fx.Node)
        placement = self.placements.get(value)
        selection = placement.axes.get(2) if placement is not None else None
        alone = not any(source in self.placements for source in node.all_input_nodes if source is not value)
        as_traced = placement is not None and not placement.restored and placement.batch in (0, None) and placement.rows == 1
        if selection is None or not alone or not as_traced:
            refuse(node, "it writes selected tokens into a KV cache in a way that is not known", "use a cache that grows with the tokens")
        if selection.made:
            refuse(node, "a KV cache has no place for tokens that were made of several", "use a cache that grows with the tokens")
        places = selection.places or selection.positions
        full = insert_call(node, with_marks, (value, places, selection.length), traced=example(value))
        set_argument(node, ("args", place), full)

    def _with_zeros(self, node: fx.Node, value: fx.Node, place: Placement) -> fx.Node:
        """Every token, at the insertion point: zeros where some were dropped, copies where they were merged."""
        full = value
        for axis, selection in place.axes.items():
            full = insert_restore_call(node, full, axis, selection, place)
        zeros = place.restored | {axis for axis, selection in place.axes.items() if selection.holders is None}
        if zeros:
            self.placements[full] = Placement(restored=zeros)
        return full


def _from_the_ends(span: tuple[int, int | None], size: Any, suffix: int) -> tuple[int, int | None]:
    """A slice of an axis of `size`, whose ends are counted from the axis's where they lie in its last `suffix` tokens; None is the end."""
    start, stop = span
    if not getattr(size, "is_Integer", False):
        return span
    if stop is not None and stop >= size - suffix:
        stop = int(stop - size) if stop < size else None
    return int(start - size) if size - suffix <= start < size else start, stop
