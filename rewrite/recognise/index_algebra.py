"""Index algebra: which index every axis of a tensor runs over, carried through views.

An axis is a product of atoms, slowest first: after ``reshape(B, N, H*D)`` the last axis is (h, d). A view regroups atoms, and splits one
where it must; a permutation reorders axes; an expanded axis has lost its atom, the tensor being the same along it. Two tensors agree on
an index if they hold the same atom, however each was laid out.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
from torch import fx

from rewrite.recognise.operators import Extent, canonical, hinted_shape


@dataclass(eq=False)
class Atom:
    """One index and its size; `parts` holds the finer atoms it was split into, slowest first.

    exact: the size where it is symbolic, as an expression in the symbols of the trace; also: other expressions for it, where an operator
    that takes two tensors is known to need them equal (the lengths of keys and of values that come from two caches).
    """

    label: str
    size: int
    parts: list[Atom] = field(default_factory=list)
    exact: sympy.Expr = field(default=sympy.S.Zero)
    also: list[sympy.Expr] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.exact = exact_size(self.size) if self.exact == 0 else self.exact
        self.size = int(self.size)

    @property
    def exacts(self) -> tuple[sympy.Expr, ...]:
        """All that the size is known to be."""
        return (self.exact, *self.also)

    def __repr__(self) -> str:
        return f"{self.label}:{self.size}"


Axis = tuple[Atom, ...]
Axes = tuple[Axis, ...]


class MismatchError(Exception):
    """The axes do not fit an operator; the message says where."""


def exact_size(extent: int) -> sympy.Expr:
    """What a length is exactly; a plain number is itself."""
    return extent.exact if isinstance(extent, Extent) else sympy.Integer(extent)


def leaves(axis: Axis) -> Axis:
    """The finest atoms of an axis, those of size one left out."""
    found: list[Atom] = []
    for atom in axis:
        found.extend(leaves(tuple(atom.parts)) if atom.parts else (atom,))
    return tuple(atom for atom in found if atom.size != 1)


def resolve(axes: Axes) -> Axes:
    return tuple(leaves(axis) for axis in axes)


def fresh(label: str, extent: int) -> Axis:
    """A new index as an axis (no atom where it has one value only)."""
    return (Atom(label, extent),) if extent != 1 else ()


def size(axis: Axis) -> int:
    return math.prod(atom.size for atom in axis)


def exact_product(axis: Axis) -> sympy.Expr:
    """The size of an axis, exactly."""
    return sympy.Mul(*(atom.exact for atom in axis))


def exact_products(axis: Axis) -> tuple[sympy.Expr, ...]:
    """All that the size of an axis is known to be."""
    return tuple(sympy.Mul(*factors) for factors in itertools.product(*(atom.exacts for atom in axis)))


def _split(atom: Atom, outer: int, exact: sympy.Expr | None = None) -> None:
    """Split an atom into (outer, size / outer)."""
    if atom.size % outer:
        raise MismatchError(f"an axis of {atom.size} cannot be cut into {outer}")
    above = sympy.Integer(outer) if exact is None else exact
    atom.parts = [
        Atom(atom.label, outer, exact=above),
        Atom(atom.label, atom.size // outer, exact=_quotient(atom.exact, above)),
    ]


def _quotient(whole: sympy.Expr, part: sympy.Expr) -> sympy.Expr:
    return whole if part == 1 else sympy.cancel(whole / part)


def regroup(axes: Axes, shape: Sequence[int]) -> Axes:
    """The axes of the same elements viewed with another shape (row-major)."""
    queue = [atom for axis in resolve(axes) for atom in axis]
    grouped: list[Axis] = []
    for extent in shape:
        taken: list[Atom] = []
        left, exact = int(extent), exact_size(extent)
        while left > 1:
            if not queue:
                raise MismatchError(f"the view {tuple(shape)} has more elements than the tensor")
            atom = queue.pop(0)
            if atom.size <= left and left % atom.size == 0:
                taken.append(atom)
                left //= atom.size
                exact = min((_quotient(exact, known) for known in atom.exacts), key=lambda left: len(left.free_symbols))
            else:
                outer = math.gcd(atom.size, left)
                if outer == 1 or outer != left:
                    raise MismatchError(f"the view {tuple(shape)} cuts an index of {atom.size} unevenly")
                _split(atom, outer, exact)
                taken.append(atom.parts[0])
                queue.insert(0, atom.parts[1])
                left, exact = 1, sympy.S.One
        if exact != 1:
            raise MismatchError(f"the view {tuple(shape)} fits the tensor at the traced sizes only")
        grouped.append(tuple(taken))
    if any(atom.size != 1 for atom in queue):
        raise MismatchError(f"the view {tuple(shape)} has fewer elements than the tensor")
    return tuple(grouped)


def unify(one: Axis, other: Axis) -> None:
    """Make two axes run over the same index: `other`'s atoms become those of `one`."""
    left, right = list(leaves(one)), list(leaves(other))
    if math.prod(atom.size for atom in left) != math.prod(atom.size for atom in right):
        raise MismatchError(f"axes of {size(tuple(left))} and {size(tuple(right))} do not match")
    while left and right:
        a, b = left.pop(0), right.pop(0)
        if a is b:
            continue
        if a.size == b.size:
            a.also += [known for known in b.exacts if known not in a.exacts]
            b.parts = [a]
        elif a.size > b.size:
            _split(a, b.size, b.exact)
            b.parts = [a.parts[0]]
            left.insert(0, a.parts[1])
        else:
            _split(b, a.size, a.exact)
            b.parts[0].parts = [a]
            right.insert(0, b.parts[1])


def _dim(index: int, rank: int) -> int:
    return index + rank if index < 0 else index


def back_through(node: fx.Node, axes: Axes) -> tuple[fx.Node, Axes] | None:
    """One view undone: the node's input and that input's axes, or None where the node is not a view.

    An axis that was expanded from size one comes back without its atom.
    """
    name = canonical(node)
    if not node.args or not isinstance(node.args[0], fx.Node):
        return None
    source = node.args[0]
    rank = len(axes)
    if name in ("contiguous", "clone", "detach"):
        return source, axes
    if name == "transpose":
        first, second = (_dim(int(argument_at(node, position)), rank) for position in (1, 2))
        order = list(range(rank))
        order[first], order[second] = order[second], order[first]
        return source, tuple(axes[place] for place in order)
    if name == "matrix_transpose":
        return source, (*axes[:-2], *reversed(axes[-2:]))
    if name == "movedim" and all(isinstance(place, int) for place in node.args[1:3]):
        start, end = (_dim(int(place), rank) for place in node.args[1:3])  # type: ignore[arg-type]
        moved = [axis for place, axis in enumerate(axes) if place != end]
        return source, (*moved[:start], axes[end], *moved[start:])
    if name == "permute":
        order = [_dim(int(place), rank) for place in _sequence(node.args[1:])]
        undone: list[Axis] = [()] * rank
        for place, origin in enumerate(order):
            undone[origin] = axes[place]
        return source, tuple(undone)
    if name in ("reshape", "flatten", "unflatten", "squeeze", "unsqueeze"):
        return source, regroup(axes, hinted_shape(source))
    if name in ("expand", "expand_as"):
        shape = hinted_shape(source)
        lead = rank - len(shape)
        return source, tuple(axes[lead + place] if extent != 1 else () for place, extent in enumerate(shape))
    if name == "repeat_interleave":
        return _back_through_repeat(node, source, axes)
    if name == "getitem":
        return _back_through_index(node, source, axes)
    return None


def argument_at(node: fx.Node, position: int) -> Any:
    names = ("input", "dim0", "dim1")
    return node.args[position] if position < len(node.args) else node.kwargs[names[position]]


def _sequence(arguments: tuple[Any, ...]) -> Sequence[Any]:
    return arguments[0] if len(arguments) == 1 and isinstance(arguments[0], list | tuple) else arguments


def _back_through_repeat(node: fx.Node, source: fx.Node, axes: Axes) -> tuple[fx.Node, Axes] | None:
    repeats = node.args[1] if len(node.args) > 1 else node.kwargs.get("repeats")
    dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim")
    if not isinstance(repeats, int) or not isinstance(dim, int):
        return None
    place = _dim(dim, len(axes))
    repeated = leaves(axes[place])
    once = Extent(size(repeated) // repeats, _quotient(exact_product(repeated), sympy.Integer(repeats)))
    kept = regroup((axes[place],), (once, repeats))
    return source, (*axes[:place], kept[0], *axes[place + 1 :])


def _back_through_index(node: fx.Node, source: fx.Node, axes: Axes) -> tuple[fx.Node, Axes] | None:
    """x[:, :, None] only puts in axes of size one; any other index is not a view of all elements."""
    index = node.args[1]
    entries = index if isinstance(index, tuple) else (index,)
    if not all(entry is None or entry is Ellipsis or is_whole(entry) for entry in entries):
        return None
    return source, regroup(axes, hinted_shape(source))


def is_whole(entry: Any) -> bool:
    """True for a slice of everything."""
    return isinstance(entry, slice) and entry.start in (None, 0) and entry.stop is None and entry.step in (None, 1)


def origin(node: fx.Node, axes: Axes, needed: Axis = (), rank: int = 4) -> tuple[fx.Node, Axes]:
    """The tensor to read an operand from: back through views to where shared heads appear once.

    Of all the tensors on the way, the nearest of those with the fewest elements (an expansion makes more) and, among them, of the
    IR's own rank where there is one. A tensor that lacks an index of `needed`, being the same along it, is not gone back to.
    """
    candidates = [(node, resolve(axes))]
    while True:
        try:
            step = back_through(node, axes)
        except MismatchError:
            break
        if step is None:
            break
        node, axes = step
        candidates.append((node, axes))
    resolved = [(place, resolve(found)) for place, found in candidates]
    whole = [(place, found) for place, found in resolved if set(leaves(needed)) <= {atom for axis in found for atom in axis}]
    resolved = whole or resolved[:1]
    fewest = min(_elements(found) for _, found in resolved)
    smallest = [(place, found) for place, found in resolved if _elements(found) == fewest]
    return next((entry for entry in smallest if len(entry[1]) == rank), smallest[0])


def _elements(axes: Axes) -> int:
    return math.prod(atom.size for axis in axes for atom in axis)
