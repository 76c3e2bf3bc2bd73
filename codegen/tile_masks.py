"""What a mask says of a whole tile of pairs, worked out on the device: whether any of them may be seen, and whether all must be.

A mask that reads tensors is known only when it runs. But what it hides by the tile follows from little of it, and from the data alone:

    an operator on predicates    from what is known of its terms; a predicate of positions is known on the host
    of a query, or of a key      any and all along the tile's side
    x[i] < y[j], x[i] == y[j]    from the least and the greatest x and y of the tile's sides, as intervals: packed sequences (the numbers of
                                 the segments), positions of keys in a cache, spans
    t[f(i), g(j)] != 0           from the entries that the tile's sides reach: routed blocks, or the map of all pairs itself

No promise is asked for: an interval that is too wide (segments out of order) leaves tiles to be looked at pair by pair, and hides nothing
that is seen. Nothing is asked of the device, and every size is known beforehand.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cached_property, lru_cache, reduce
from typing import Any, NamedTuple

import sympy
import torch
from sympy.logic.boolalg import Boolean
from torch.nn import functional

from codegen.masks import depends_on_positions_only, split_mask, visible_rows
from codegen.weight_form import vanishes
from rewrite.ir.expression import NK, NQ, B, H, I, Indices, J, conjuncts, from_json, letters, tensors_in, to_json
from rewrite.ir.operations import Attend
from rewrite.ir.semantics import all_positions, evaluate_expression, positions, read_at


class TileMask(NamedTuple):
    """may: False only where no pair of the tile is seen. must: True only where all are. Each [B or 1, H or 1, query tiles, key tiles]."""

    may: torch.Tensor
    must: torch.Tensor


class MaskSplit(NamedTuple):
    """The terms of a mask by how they are found out. by_position: before the data, on the host. by_tile: on the device, tile by tile, from
    a list that the kernel walks. by_pair: where they are visited."""

    by_position: Boolean
    by_tile: Boolean
    by_pair: Boolean


@lru_cache(maxsize=1024)
def split_tiles(attend: Attend) -> MaskSplit:
    """The mask's terms, as `codegen.weight_form.split_visits` has them, the dynamic ones told apart.

    Tiles are asked about only where a term compares queries with keys: others (padding) leave out too few for that, and join such a term.
    """
    if not vanishes(attend.weight):
        return MaskSplit(sympy.true, sympy.true, attend.mask)
    static, dynamic = split_mask(attend.mask)
    terms = [] if dynamic == sympy.true else list(conjuncts(dynamic))
    known = [term for term in terms if is_known_by_tile(term)]
    known = known if any({I, J} <= term.free_symbols for term in known) else []
    return MaskSplit(static, sympy.And(*known), sympy.And(*(term for term in terms if term not in known)))


@lru_cache(maxsize=1024)
def is_known_by_tile(term: Boolean) -> bool:
    """Whether `tile_mask` finds out about a predicate at the cost of a few small operators."""
    if isinstance(term, sympy.And | sympy.Or | sympy.Not):
        return all(is_known_by_tile(argument) for argument in term.args)
    if depends_on_positions_only(term) or not {I, J} <= term.free_symbols:
        return True
    return isinstance(term, sympy.Rel) and (sides_of(term) is not None or _table(term) is not None)


@lru_cache(maxsize=1024)
def sides_of(term: sympy.Rel) -> tuple[sympy.Expr, sympy.Expr] | None:
    """The two sides of a relation, one of the query and one of the key; None where it has no such sides.

    Integers are moved from one side to the other, which is exact.
    """
    left, right = term.args
    if {I, J} in ({I, J} & left.free_symbols, {I, J} & right.free_symbols):
        if not (left.is_integer and right.is_integer):
            return None
        terms = sympy.Add.make_args(sympy.expand(left - right))
        left, right = sympy.Add(*(each for each in terms if not each.has(J))), -sympy.Add(*(each for each in terms if each.has(J)))
    # A fraction of positions is only exact in the relation as a whole (`rewrite.ir.evaluation.without_fractions`).
    exact = all(side.is_integer or not any(number.q != 1 for number in side.atoms(sympy.Rational)) for side in (left, right))
    return (left, right) if exact and all(len({I, J} & side.free_symbols) == 1 for side in (left, right)) else None


def _table(term: sympy.Rel) -> sympy.Indexed | None:
    """The one read that a relation's pairs differ by, its last two axes one of queries and one of keys, in either order; None for another.

    A map of pairs that every head has for itself is left out: looking through it takes as long as it takes the kernels.
    """
    pairs = [each for each in term.atoms(sympy.Indexed) if {I, J} & each.free_symbols]
    if len(pairs) != 1 or {I, J} & term.xreplace({pairs[0]: sympy.Dummy()}).free_symbols:
        return None
    if len(pairs[0].indices) < 2:
        return None
    *lead, row, column = pairs[0].indices
    row, column = (column, row) if J in row.free_symbols else (row, column)
    if not (row.free_symbols <= {I, NQ, NK} and column.free_symbols <= {J, NQ, NK}):
        return None
    led = tuple(lead) in ((), (B,)) or (tuple(lead) in ((H,), (B, H)) and (row, column) != (I, J))
    return pairs[0] if led else None


def tile_mask(
    predicate: Boolean, tensors: Mapping[str, torch.Tensor], sizes: tuple[int, int, int, int], block: tuple[int, int], device: torch.device
) -> TileMask:
    """What is known of a predicate (`is_known_by_tile`) on tiles of ``block = (queries, keys)``. sizes: B, H, Nq, Nk, none of them 0.

    tensors: by name, with the axes they are read at. Queries and keys past the end say nothing.
    """
    return _Tiles(tensors, sizes, block, device).known(predicate)


class _Tiles:
    def __init__(
        self, tensors: Mapping[str, torch.Tensor], sizes: tuple[int, int, int, int], block: tuple[int, int], device: torch.device
    ) -> None:
        self.tensors, self.sizes, self.block, self.device = tensors, sizes, block, device

    @cached_property
    def positions(self) -> dict[str, Any]:
        return all_positions(self.sizes, self.device)

    def known(self, term: Boolean) -> TileMask:
        if depends_on_positions_only(term):
            return _by_position(json.dumps(to_json(term)), self.sizes[2:], self.block, self.device)
        if isinstance(term, sympy.Not):
            inner = self.known(term.args[0])
            return TileMask(~inner.must, ~inner.may)
        if isinstance(term, sympy.And | sympy.Or):
            # Terms of positions together: of them it is known exactly which tiles they see.
            ahead = [argument for argument in term.args if depends_on_positions_only(argument)]
            parts = [*([term.func(*ahead)] if ahead else []), *(argument for argument in term.args if argument not in ahead)]
            join: Callable[[Any, Any], Any] = torch.logical_and if isinstance(term, sympy.And) else torch.logical_or
            return TileMask(*(reduce(join, maps) for maps in zip(*map(self.known, parts), strict=True)))
        if not {I, J} <= term.free_symbols:
            return self._along(torch.as_tensor(self._value(term), device=self.device))
        table, sides = _table(term), sides_of(term)
        return self._looked_up(term, table) if sides is None else self._compared(type(term), *sides)

    def _value(self, expression: sympy.Basic) -> Any:
        """Broadcasting against [B, H, Nq, Nk], and no larger than what it reads."""
        return evaluate_expression(expression, self.positions | self._read(tensors_in(expression)))

    def _read(self, indices_of: Mapping[str, Indices]) -> dict[str, torch.Tensor]:
        return {name: read_at(self.tensors[name], indices, self.positions) for name, indices in indices_of.items()}

    def _cut(self, value: torch.Tensor) -> torch.Tensor:
        """[.., Nq or 1, Nk or 1] -> [.., query tiles or 1, queries or 1, key tiles or 1, keys or 1]; the last one fills up its tile."""
        value = value.view((1,) * (4 - value.dim()) + value.shape)
        cut: list[int] = []
        for axis, size in zip((2, 3), self.block, strict=True):
            length = value.shape[axis]
            if length > 1 and length % size:
                filled = torch.arange(-(-length // size) * size, device=self.device).clamp(max=length - 1)
                value = value.index_select(axis, filled)
            cut += [-(-length // size), size] if length > 1 else [1, 1]
        return value.reshape(*value.shape[:2], *cut)

    def _along(self, seen: torch.Tensor) -> TileMask:
        tiles = self._cut(seen)
        return TileMask(tiles.any(5).any(3), tiles.all(5).all(3))

    def _compared(self, relation: type[sympy.Rel], left: sympy.Expr, right: sympy.Expr) -> TileMask:
        """Bounds that are no numbers compare as False: then the tile may be seen and need not."""
        left, right = (right, left) if relation in (sympy.Gt, sympy.Ge) else (left, right)
        (least, most), (low, high) = self._bounds(left), self._bounds(right)
        if relation in (sympy.Eq, sympy.Ne):
            apart, same = (most < low) | (high < least), (least == high) & (most == low)
            return TileMask(~apart, same) if relation is sympy.Eq else TileMask(~same, apart)
        is_strict = relation in (sympy.Lt, sympy.Gt)
        return TileMask(~(least >= high if is_strict else least > high), most < low if is_strict else most <= low)

    def _bounds(self, side: sympy.Expr) -> tuple[torch.Tensor, torch.Tensor]:
        tiles = self._cut(torch.as_tensor(self._value(side), device=self.device))
        tiles = tiles.to(torch.int8) if tiles.dtype == torch.bool else tiles
        return tiles.amin((3, 5)), tiles.amax((3, 5))

    def _looked_up(self, term: sympy.Rel, table: sympy.Indexed) -> TileMask:
        """The table's entries judged one by one, and gathered by tile with two products of zeros and ones."""
        name, indices = str(table.base.label), table.indices
        if letters(indices) is not None:
            return self._along(torch.as_tensor(self._value(term), device=self.device))
        operand = self.tensors[name]
        lead = [operand.shape[indices.index(axis)] if axis in indices[:-2] else 1 for axis in (B, H)]
        entries = operand.reshape(*lead, *operand.shape[-2:])
        beside = self._read({other: places for other, places in tensors_in(term).items() if other != name})
        holds = torch.as_tensor(evaluate_expression(term, self.positions | beside | {name: entries}), device=self.device)
        places = list(zip(indices[-2:], holds.shape[-2:], strict=True))
        if J in indices[-2].free_symbols:
            places, holds = places[::-1], holds.transpose(-1, -2)
        rows, columns = (
            _reached(json.dumps(to_json(index)), self.sizes[2:], size, count, self.device)
            for (index, count), size in zip(places, self.block, strict=True)
        )

        def any_of(entries: torch.Tensor) -> torch.Tensor:
            return (rows @ entries.float() @ columns.T) > 0

        return TileMask(any_of(holds), ~any_of(~holds))


@lru_cache(maxsize=128)
def _by_position(static: str, lengths: tuple[int, int], block: tuple[int, int], device: torch.device) -> TileMask:
    """Of a predicate of positions, exactly; one block of queries after the other."""
    n_blocks = -(-lengths[1] // block[1])
    may: list[torch.Tensor] = []
    must: list[torch.Tensor] = []
    for _, seen in visible_rows(static, *lengths, block[0]):
        for kept, outside, rule in ((may, False, torch.any), (must, True, torch.all)):
            padded = functional.pad(seen, (0, n_blocks * block[1] - lengths[1]), value=outside).view(seen.shape[0], n_blocks, block[1])
            kept.append(rule(rule(padded, 2), 0))
    return TileMask(*(torch.stack(kept).to(device)[None, None] for kept in (may, must)))


@lru_cache(maxsize=128)
def _reached(index: str, lengths: tuple[int, int], size: int, count: int, device: torch.device) -> torch.Tensor:
    """[tiles, count] float32: 1 where a position of the tile reads the entry, in tiles of `size` positions, of `count` entries."""
    expression = from_json(json.loads(index))
    length = lengths[0] if I in expression.free_symbols else lengths[1]
    place = torch.as_tensor(evaluate_expression(expression, positions(*lengths, torch.device("cpu")))).flatten().expand(length)
    reached = torch.zeros(-(-length // size), count)
    reached[torch.arange(length) // size, place.clamp(0, count - 1)] = 1.0
    return reached.to(device)
