"""An order of the tokens in which the blocks that the data choose lie in one piece each.

Regions of a picture are chosen, and its tokens lie row by row: a tile of consecutive keys then has tokens of every region of its rows, and
some query of a tile chose one of them. With the tokens that all see first, and the others sorted by block, a mask

    Or(i < prefix, j < prefix, Ne(choice[b, f(i), g(j)], 0))    becomes    the same with  f(i) = floor((i - first) / m),  and g likewise,

for blocks of m tokens each. That is an attention of its own, with a kernel of its own: queries, keys and values are copied into this order
in front of it, N D numbers where an attention computes N N, and its results are put back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import sympy
import torch

from codegen.block_choice import block_places, choice_term, seen_by_position
from codegen.tiles import Tile
from rewrite.ir.expression import I, Indices, J, letters, read
from rewrite.ir.operations import Attend

# Of the tiles of keys, what a tile of queries may visit at most for copies to pay: half, as `codegen.block_choice` found for gathered keys.
LARGEST_SHARE = 0.5


@dataclass(frozen=True)
class TokenOrder:
    """attend: the operation on tokens in this order. queries [Nq], keys [Nk]: the positions that they are taken from."""

    attend: Attend
    queries: torch.Tensor
    keys: torch.Tensor

    def of_queries(self, operand: torch.Tensor) -> torch.Tensor:
        """[B, H, Nq, ...] in this order."""
        return operand.index_select(2, self.queries)

    def of_keys(self, operand: torch.Tensor) -> torch.Tensor:
        """[B, Hkv, Nk, ...] in this order."""
        return operand.index_select(2, self.keys)

    def tensors(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The operation's tensors in this order, along the axes that have all queries or keys."""
        given = zip(self.attend.tensors().values(), tensors, strict=True)
        return [tensor if (at := self._axis(indices, tensor)) is None else tensor.index_select(*at) for indices, tensor in given]

    def restored(self, place: int, gradient: torch.Tensor) -> torch.Tensor:
        """The gradient of the tensor at a position of `tensors`, in the tokens' own order."""
        at = self._axis(list(self.attend.tensors().values())[place], gradient)
        return gradient if at is None else torch.empty_like(gradient).index_copy_(*at, gradient)

    def _axis(self, indices: Indices, tensor: torch.Tensor) -> tuple[int, torch.Tensor] | None:
        """(axis, order) of the one axis of a tensor that runs over tokens, where it does."""
        for axis, (index, order) in ((axis, pair) for pair in ((I, self.queries), (J, self.keys)) for axis in range(len(indices))):
            if indices[axis] == index and tensor.shape[axis] > 1:
                return axis, order
        return None


@lru_cache(maxsize=128)
def token_order(attend: Attend, n_queries: int, n_keys: int, tile: Tile, device: torch.device) -> TokenOrder | None:
    """None where the order that the tokens have is as good, or nothing but it will do: positions are read elsewhere, blocks differ in size,
    or a tile of queries has so many blocks that most keys are visited in any order."""
    term = choice_term(attend)
    if term is None or not n_queries or not n_keys:
        return None
    others = (term.rest, *attend.expressions(), attend.denominator)
    known = seen_by_position(term.near, n_queries, n_keys)
    if known is None or any(_reads_positions(expression) for expression in others) or not _is_by_token(attend, term.name):
        return None
    places = [block_places(index, n_queries, n_keys) for index in term.indices[-2:]]
    rows, columns = (_sorted(place, ahead) for place, ahead in zip(places, known, strict=True))
    if rows is None or columns is None:
        return None
    (queries, first, size), (keys, first_key, key_size) = rows, columns
    # Tiles and blocks are not aligned: each may reach into one more of the other.
    visited = (tile.block_q / size + 1) * min(term.most, n_keys // key_size) * (key_size + tile.block_k) + first_key
    in_order = all(bool((order.diff() > 0).all()) for order in (queries, keys))
    if in_order or visited > LARGEST_SHARE * n_keys:
        return None
    chosen = sympy.Ne(read(term.name, *term.indices[:-2], sympy.floor((I - first) / size), sympy.floor((J - first_key) / key_size)), 0)
    ahead = [sympy.Lt(index, count) for index, count in ((I, first), (J, first_key)) if count]
    return TokenOrder(replace(attend, mask=sympy.And(term.rest, sympy.Or(*ahead, chosen))), queries.to(device), keys.to(device))


def _reads_positions(expression: sympy.Basic) -> bool:
    """Whether more than tensors depends on where a token lies."""
    reads = {each: sympy.Dummy() for each in expression.atoms(sympy.Indexed)}
    return bool({I, J} & expression.xreplace(reads).free_symbols)


def _is_by_token(attend: Attend, choice: str) -> bool:
    """Whether every other tensor is read by query or by key, if at all by one of them."""
    read_at = [indices for name, indices in attend.tensors().items() if name != choice]
    tokens = [set().union(*(index.free_symbols for index in indices)) & {I, J} for indices in read_at if indices]
    return all(not {I, J} <= found for found in tokens) and all(
        letters(indices) is not None or not any({I, J} & index.free_symbols for index in indices) for indices in read_at
    )


def _sorted(place: torch.Tensor, ahead: torch.Tensor) -> tuple[torch.Tensor, int, int] | None:
    """(order, tokens ahead of the blocks, tokens of a block), from the block of every token; None where blocks differ in size."""
    left = (~ahead).nonzero().flatten()
    order = left[place[left].argsort(stable=True)]
    if not len(order):
        return None
    size = int((place[order] == place[order[0]]).sum())
    is_even = torch.equal(place[order], torch.arange(len(order), device=place.device) // size)
    return (torch.cat([ahead.nonzero().flatten(), order]), len(place) - len(order), size) if is_even else None
