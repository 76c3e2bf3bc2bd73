"""Masks that are chosen from the data, block by block: what of them is known before the data, and which keys are then gathered.

A term such as  Or(i < prefix, j < prefix, Ne(choice[b, f(i), g(j)], 0))  lets a query see some keys by position (CLS, sinks) and, beside
those, the blocks of keys that the tensor chose for its block of queries. `Attend.choice` says how many blocks that is at most. So the
queries of a block and the keys of its chosen blocks are gathered into one small attention (`codegen.gathered`), whose size does not depend
on the choice: nothing is asked of the device, and nothing is compiled again when the choice changes.

Small attentions stand where a batch stands elsewhere: expressions broadcast against [P, H, rows, columns], P numbering (batch, block of
queries), or (batch, head, block of queries) with H = 1 where every head chooses for itself.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache

import sympy
import torch
from sympy.logic.boolalg import Boolean

from codegen.masks import depends_on_positions_only, static_key, visible_pairs, visible_rows
from codegen.visits import Visit, as_slice
from codegen.weight_form import split_visits, vanishes
from rewrite.ir.expression import NK, NQ, B, H, I, Indices, J, conjuncts, tensors_in, to_json
from rewrite.ir.operations import Attend
from rewrite.ir.semantics import evaluate_expression, positions

# Measured on 2 CPU cores with 12 heads of 64: from about half of the keys on, copying these costs more than hiding the others does.
LARGEST_SHARE = 0.5


@dataclass(frozen=True)
class ChoiceTerm:
    """A mask read as a choice of blocks: at most `most` by the tensor `name`, which is read at `indices`, the last two being blocks.

    near: which pairs are seen by position, whatever was chosen. rest: what else must hold of a pair whose block was chosen.
    static: the part of the whole mask that depends on positions alone, as JSON text (`codegen.masks.static_key`).
    """

    name: str
    most: int
    indices: Indices
    near: Boolean
    rest: Boolean
    static: str


def _only_adds(predicate: sympy.Basic, part: sympy.Basic) -> bool:
    """Whether the predicate holds wherever it did, should `part` hold in more places."""
    if predicate == part or not predicate.has(part):
        return True
    return isinstance(predicate, sympy.And | sympy.Or) and all(_only_adds(argument, part) for argument in predicate.args)


@lru_cache(maxsize=1024)
def choice_term(attend: Attend) -> ChoiceTerm | None:
    """The operation's choice of blocks where its keys can be gathered by it; None where every pair has to be looked at."""
    if attend.choice is None or attend.mixes or not vanishes(attend.weight):
        return None
    name, indices = attend.choice.tensor, attend.tensors()[attend.choice.tensor]
    *lead, row, column = indices if len(indices) > 1 else (None, None)
    sizes = {NQ, NK}
    is_blockwise = row is not None and row.free_symbols <= {I} | sizes and column.free_symbols <= {J} | sizes
    chosen = [term for term in attend.mask.atoms(sympy.Ne) if name in tensors_in(term)]
    is_nonzero = len(chosen) == 1 and chosen[0].rhs == 0 and isinstance(chosen[0].lhs, sympy.Indexed)
    if not is_blockwise or not is_nonzero or tuple(lead) not in ((), (B,), (H,), (B, H)):
        return None
    (term,) = (each for each in conjuncts(attend.mask) if each.has(chosen[0]))
    near, rest = term.xreplace({chosen[0]: sympy.false}), attend.mask.xreplace({chosen[0]: sympy.true})
    elsewhere = name in tensors_in(rest, *attend.expressions())
    if elsewhere or not depends_on_positions_only(near) or not _only_adds(term, chosen[0]):
        return None
    return ChoiceTerm(name, attend.choice.most, indices, near, rest, static_key(attend.mask))


@dataclass(frozen=True)
class BlockPlan:
    """Queries and keys by block; the same for every call of these sizes.

    everywhere: the visits of queries that see every key whatever is chosen, but for what else the mask says. common: the keys [c] that all
    other queries see by position. blocks: numbers of the blocks [nb] that have any of these other queries; rows: their positions [nb, n].
    columns: the positions of the keys beside the common ones, [blocks of keys, m]. Shorter blocks are filled up with a position that
    `row_taken`, `column_taken` (bool, of the same shape) are False for; None where all blocks are equally long.
    """

    everywhere: tuple[Visit, ...]
    common: torch.Tensor
    blocks: torch.Tensor
    rows: torch.Tensor
    row_taken: torch.Tensor | None
    columns: torch.Tensor
    column_taken: torch.Tensor | None

    def keys_of_a_row(self, most: int) -> int:
        """How many keys a query is gathered with where `most` blocks are chosen."""
        return len(self.common) + min(most, len(self.columns)) * self.columns.shape[1]


def _by_block(places: torch.Tensor, members: torch.Tensor, n_blocks: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(members by block [n_blocks, longest], which of them are none of the filling), from the block of each member."""
    counts = torch.bincount(places, minlength=n_blocks)
    order, longest = places.argsort(stable=True), int(counts.max()) if len(places) else 0
    slot = torch.arange(len(places)) - (counts.cumsum(0) - counts)[places[order]]
    table, taken = torch.zeros(n_blocks, longest, dtype=torch.int64), torch.zeros(n_blocks, longest, dtype=torch.bool)
    table[places[order], slot], taken[places[order], slot] = members[order], True
    return torch.where(taken, table, table[:, :1]), None if taken.all() else taken


def block_places(index: sympy.Expr, n_queries: int, n_keys: int) -> torch.Tensor:
    """The block of every query, or of every key, before it is clamped to the tensor's axis."""
    known, wanted = positions(n_queries, n_keys, torch.device("cpu")), n_queries if I in index.free_symbols else n_keys
    return torch.as_tensor(evaluate_expression(index, known)).flatten().expand(wanted)


def seen_by_position(near: Boolean, n_queries: int, n_keys: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(which queries see every key by position, which keys all others see by position), bool; None where these differ among them."""
    everywhere, common = torch.zeros(n_queries, dtype=torch.bool), torch.zeros(n_keys, dtype=torch.bool)
    if near == sympy.false:
        return everywhere, common
    found: torch.Tensor | None = None
    for queries, seen in visible_rows(json.dumps(to_json(near)), n_queries, n_keys):
        everywhere[queries] = seen.all(1)
        others = seen[~seen.all(1)]
        if len(others):
            found = others[0] if found is None else found
            if not bool((others == found).all()):
                return None
    return everywhere, common if found is None else found


def _whole_visits(static: str, queries: torch.Tensor, sizes: tuple[int, int], device: torch.device) -> tuple[Visit, ...]:
    """Some of the queries with every key, as far as the static mask lets them."""
    chunks = visible_rows(static, *sizes, order=queries) if len(queries) else ()
    return tuple(Visit(as_slice(rows, device), slice(0, sizes[1]), None if bool(seen.all()) else seen.to(device)) for rows, seen in chunks)


@lru_cache(maxsize=128)
def block_plan(term: ChoiceTerm, sizes: tuple[int, int], blocks: tuple[int, int] | None, device: torch.device) -> BlockPlan | None:
    """The plan for sizes (Nq, Nk) and a tensor of so many blocks of queries and of keys, None being as many as there are.

    None where it does not pay, or where queries see different keys by position.
    """
    (n_queries, n_keys), seen = sizes, seen_by_position(term.near, *sizes)
    if seen is None or not n_queries or not n_keys:
        return None
    places = [block_places(index, n_queries, n_keys) for index in term.indices[-2:]]
    n_blocks = blocks or tuple(max(1, int(place.max()) + 1) for place in places)
    row_place, column_place = (place.clamp(0, count - 1) for place, count in zip(places, n_blocks, strict=True))
    everywhere, (others, left) = seen[0].nonzero().flatten(), ((~kind).nonzero().flatten() for kind in seen)
    rows, row_taken = _by_block(row_place[others], others, n_blocks[0])
    columns, column_taken = _by_block(column_place[left], left, n_blocks[1])
    used = torch.bincount(row_place[others], minlength=n_blocks[0]).nonzero().flatten()
    row_taken = None if row_taken is None or bool(row_taken[used].all()) else row_taken[used].to(device)
    plan = BlockPlan(
        _whole_visits(term.static, everywhere, sizes, device),
        seen[1].nonzero().flatten().to(device),
        used.to(device),
        rows[used].to(device),
        row_taken,
        columns.to(device),
        None if column_taken is None else column_taken.to(device),
    )
    return plan if len(used) and plan.keys_of_a_row(term.most) <= LARGEST_SHARE * n_keys else None


def visited_pairs(attend: Attend, n_queries: int, n_keys: int) -> int:
    """How many (i, j) are computed at most, for each batch and head: those that the static mask lets through, or that may be chosen."""
    pairs, term = visible_pairs(split_visits(attend)[0], n_queries, n_keys), choice_term(attend)
    plan = None if term is None else block_plan(term, (n_queries, n_keys), None, torch.device("cpu"))
    if term is None or plan is None:
        return pairs
    whole = sum(visit.n_queries for visit in plan.everywhere)
    return min(pairs, whole * n_keys + (n_queries - whole) * plan.keys_of_a_row(term.most))
