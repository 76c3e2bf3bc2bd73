"""Grid coordinates as an algebra of axes: which rows, columns or frames an axis of a tensor runs over.

An axis is a product of atoms, slowest first: the token axis of `flatten(H, W)` is (rows, columns), and after a cut into windows the batch
holds (window row, window column) and the tokens (row in the window, column in the window). An atom is one of these:

    placed      it is known which coordinates of a grid it runs over (`Place`)
    a product   of `parts`, after a view split it; one part means that it is that atom
    a sum       of `pieces` side by side, after a concatenation or a slice
    opaque      none of these yet

Atoms are shared by all tensors that run over the same tokens, and what is learned of one later (it becomes the rows of a picture that a
convolution reads) is known of all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from torch import fx


@dataclass(frozen=True)
class Place:
    """Coordinates `stride * index` along one axis of a grid of `length`: -1 columns, -2 rows, -3 frames.

    shift: by how much the axis was rolled. before, after: how many of the `length` are padding. source: the node the grid was made by.
    """

    axis: int
    length: int
    stride: int = 1
    shift: int = 0
    before: int = 0
    after: int = 0
    source: fx.Node | None = field(default=None, compare=False, repr=False)

    @property
    def line(self) -> Place:
        """The whole axis of the grid that this is a part of."""
        return self if self.stride == 1 else replace(self, stride=1)


@dataclass(eq=False)
class Atom:
    """outer: it lay on the batch axis of a convolution over pictures: pictures, or frames of videos. learned: an axis of a parameter."""

    size: int
    place: Place | None = None
    parts: list[Atom] = field(default_factory=list)
    pieces: list[tuple[int, Axis]] = field(default_factory=list)
    outer: bool = False
    learned: bool = False

    @property
    def opaque(self) -> bool:
        return self.place is None and not self.parts and not self.pieces


Axis = tuple[Atom, ...]
Axes = tuple[Axis, ...]


def fresh(size: int, place: Place | None = None) -> Axis:
    """A new atom as an axis; none where there is one index only."""
    return (Atom(size, place),) if size != 1 else ()


def leaves(axis: Axis) -> Axis:
    """The finest atoms of an axis."""
    if not any(atom.parts for atom in axis):
        return axis
    return tuple(leaf for atom in axis for leaf in (leaves(tuple(atom.parts)) if atom.parts else (atom,)))


def size_of(axis: Axis) -> int:
    return math.prod(atom.size for atom in axis)


def merged(axis: Axis) -> list[tuple[int, Place] | Atom]:
    """An axis with neighbouring parts of one grid axis put together: (size, place) for what is placed, else the atom."""
    found: list[tuple[int, Place] | Atom] = []
    for atom in leaves(axis):
        if atom.place is None:
            found.append(atom)
            continue
        size, place = atom.size, atom.place
        if found and isinstance(last := found[-1], tuple) and last[1] == replace(place, stride=place.stride * size):
            found[-1] = (last[0] * size, place)
        else:
            found.append((size, place))
    return found


def line_of(axis: Axis) -> Place | None:
    """The axis of a grid that an axis is, whole and in order."""
    found = merged(axis)
    if len(found) == 1 and isinstance(found[0], tuple):
        size, place = found[0]
        return place if place.stride == 1 and place.length == size else None
    return None


def put(axis: Axis, line: Place) -> None:
    """Make it known that an axis of which nothing was known is one of a grid, where that can be."""
    found = leaves(axis)
    if size_of(found) != line.length or not all(atom.opaque for atom in found):
        return
    stride = line.length
    for atom in found:
        stride //= atom.size
        atom.place = replace(line, stride=stride)


def split(atom: Atom, outer: int) -> tuple[Atom, Atom]:
    """An atom cut into (outer, the rest)."""
    inner = atom.size // outer
    if atom.place is not None:  # it stays whole: another view may cut it elsewhere
        return Atom(outer, replace(atom.place, stride=atom.place.stride * inner)), Atom(inner, atom.place)
    slow, fast = Atom(outer, outer=atom.outer), Atom(inner, outer=atom.outer)
    atom.parts = [slow, fast]
    return slow, fast


def _aligned(before: Sequence[int], after: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """The smallest runs of axes of `before` and `after` that hold the same elements."""
    i = j = 0
    while i < len(before) or j < len(after):
        ins: list[int] = []
        outs: list[int] = []
        left = right = 1
        while not (ins or outs) or left != right:
            if left <= right and i < len(before):
                ins.append(i)
                left *= before[i]
                i += 1
            elif j < len(after):
                outs.append(j)
                right *= after[j]
                j += 1
            elif i < len(before):
                ins.append(i)
                left *= before[i]
                i += 1
            else:
                break
        yield ins, outs


def regroup(axes: Axes, before: Sequence[int], after: Sequence[int]) -> Axes:
    """The axes of the same elements viewed with another shape. Where a view cuts across what is known, its axes are new."""
    if math.prod(before) != math.prod(after) or 0 in before:
        return tuple(fresh(size) for size in after)
    result: list[Axis] = [()] * len(after)
    for ins, outs in _aligned(before, after):
        pieces = _regrouped(_whole(tuple(atom for i in ins for atom in axes[i])), [after[j] for j in outs])
        for j, axis in zip(outs, pieces or [fresh(after[j]) for j in outs], strict=True):
            result[j] = axis
    return tuple(result)


def _whole(axis: Axis) -> list[Atom]:
    """The atoms of an axis, neighbouring parts of one grid axis as one."""
    return [Atom(*entry) if isinstance(entry, tuple) else entry for entry in merged(axis)]


def _regrouped(queue: list[Atom], shape: list[int]) -> list[Axis] | None:
    """Atoms dealt out to axes of the given sizes; None where an atom would be cut unevenly, or one that is a sum."""
    cuts: list[tuple[int, int]] = []  # a dry run first, so that nothing is split in vain
    sizes = [(atom.size, not atom.pieces) for atom in queue]
    grouped: list[int] = []
    position = 0
    for extent in shape:
        left, taken = extent, 0
        while left > 1:
            if position == len(sizes):
                return None
            size, divisible = sizes[position]
            if size > left:
                if size % left or not divisible:
                    return None
                cuts.append((position, left))
                sizes[position : position + 1] = [(left, True), (size // left, True)]
                size = left
            elif left % size:
                return None
            left //= size
            position += 1
            taken += 1
        grouped.append(taken)
    if position != len(sizes):
        return None
    for place, outer in cuts:
        queue[place : place + 1] = split(queue[place], outer)
    found: list[Axis] = []
    for taken in grouped:
        found.append(tuple(queue[:taken]))
        queue = queue[taken:]
    return found


def unify(one: Axis, other: Axis) -> None:
    """Two axes run over the same tokens: what is known of either is known of both. Where they contradict, nothing is learned."""
    left, right = _whole(one), _whole(other)
    if size_of(tuple(left)) != size_of(tuple(right)):
        return
    while left and right:
        a, b = left.pop(0), right.pop(0)
        if a is b:
            continue
        if a.size == b.size:
            _link(a, b)
        elif a.size > b.size:
            if a.size % b.size or a.pieces:
                return
            slow, fast = split(a, b.size)
            _link(slow, b)
            left.insert(0, fast)
        else:
            if b.size % a.size or b.pieces:
                return
            slow, fast = split(b, a.size)
            _link(a, slow)
            right.insert(0, fast)


def _link(a: Atom, b: Atom) -> None:
    """Make the atom of which nothing is known the other one."""
    if b.opaque:
        a.outer |= b.outer
        b.parts = [a]
    elif a.opaque:
        b.outer |= a.outer
        a.parts = [b]
    elif a.pieces and b.pieces and [size for size, _ in a.pieces] == [size for size, _ in b.pieces]:
        for (_, mine), (_, yours) in zip(a.pieces, b.pieces, strict=True):
            unify(mine, yours)


def pieces_of(size: int, axis: Axis) -> list[tuple[int, Axis]]:
    """An axis as what lies side by side on it, (how many, axis): itself, where it is no sum."""
    found = leaves(axis)
    if len(found) == 1 and found[0].pieces:
        return [entry for piece in found[0].pieces for entry in pieces_of(*piece)]
    return [(size, found)]


def join(parts: Sequence[tuple[int, Axis]]) -> Axis:
    """Axes side by side, as one."""
    pieces = [piece for part in parts if part[0] for piece in pieces_of(*part)]
    return pieces[0][1] if len(pieces) == 1 else (Atom(sum(size for size, _ in pieces), pieces=pieces),)


def cut(axis: Axis, size: int, start: int, stop: int) -> Axis:
    """Positions from `start` up to `stop` of an axis of `size`."""
    length = stop - start
    if length == size:
        return axis
    if (line := line_of(axis)) is not None:
        before, after = line.before - start, line.after - (size - stop)
        if line.shift == 0 and before >= 0 and after >= 0:
            return fresh(length, replace(line, length=length, before=before, after=after))
        return fresh(length, Place(line.axis, length, source=line.source))
    found = leaves(axis)
    if len(found) != 1 or found[0].place is not None or length <= 0:
        return fresh(length)
    pieces = _cut_at(_cut_at(pieces_of(size, found), start), stop)
    if len(pieces) > 1:
        found[0].pieces = pieces
    taken: list[tuple[int, Axis]] = []
    position = 0
    for extent, part in pieces:
        if start <= position and position + extent <= stop:
            taken.append((extent, part))
        position += extent
    return join(taken) if sum(extent for extent, _ in taken) == length else fresh(length)


def _cut_at(pieces: list[tuple[int, Axis]], at: int) -> list[tuple[int, Axis]]:
    """Pieces with a boundary at a position, where that lies in a piece of which nothing is known."""
    position = 0
    for i, (extent, part) in enumerate(pieces):
        if position < at < position + extent:
            if len(part) != 1 or not part[0].opaque:
                return pieces
            halves = [(size, fresh(size)) for size in (at - position, position + extent - at)]
            part[0].pieces = halves
            return [*pieces[:i], *halves, *pieces[i + 1 :]]
        position += extent
    return pieces
