"""What masks that read tensors say of whole tiles, against every pair; and the lists that are made of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import attention_forms as forms
import pytest
import sympy
import torch
from attention_forms import Shape, operands
from hypothesis import given, settings
from hypothesis import strategies as st
from sympy.logic.boolalg import Boolean

from codegen import tile_list as tile_lists
from codegen.tile_list import tile_list, transposed_tile_list
from codegen.tile_masks import TileMask, is_known_by_tile, split_tiles, tile_mask
from codegen.walked_list import WalkedList
from rewrite.ir import NK, NQ, Attend, B, H, I, J, W, read, tensor
from rewrite.ir.semantics import all_positions, evaluate_expression, read_at

CPU = torch.device("cpu")
CAUSAL = sympy.Le(J, I + (NK - NQ))
CHOSEN = sympy.Ne(read("mask", B, H, sympy.floor((I - 1) / 3), sympy.floor((J - 1) / 5)), 0)
PREDICATES: dict[str, Boolean] = {
    "packed": forms.packed().mask,
    "packed, causal, padded": forms.packed(CAUSAL, sympy.Ne(tensor("mask", "bj"), 0)).mask,
    "every other segment": sympy.Ne(tensor("query_segments", "bi"), tensor("key_segments", "bj")),
    "positions that the data give": sympy.Le(tensor("key_segments", "bj"), tensor("query_segments", "bi")),
    "spans": sympy.And(tensor("query_segments", "bi") < J, 2 * tensor("query_segments", "bi") + 9 > J),
    "spans from": sympy.Ge(J, tensor("query_segments", "bi")),
    "spans of heads": sympy.And(sympy.Le(I - J, 3 * H + 2), sympy.Lt(J - I, 2)),
    "blocks, prefix": sympy.Or(I < 1, J < 1, CHOSEN),
    "blocks, turned": sympy.Ne(read("mask", B, sympy.floor(J / 3), sympy.floor(I / 5)), 0),
    "not those blocks": sympy.And(sympy.Not(CHOSEN), CAUSAL),
    "every pair": sympy.Ne(tensor("mask", "bij"), 0),
    "every pair, turned": sympy.Eq(tensor("mask", "ij"), 0),
    "one map of blocks": sympy.Ne(read("mask", sympy.floor(I / 4), sympy.Min(J, 7)), 0),
    "by query, by head": sympy.And(forms.packed().mask, sympy.Or(sympy.Ne(tensor("mask", "bhi"), 0), sympy.Eq(sympy.Mod(H, 2), 0))),
}  # fmt: skip


def every_pair(predicate: Boolean, values: dict[str, torch.Tensor], sizes: tuple[int, int, int, int]) -> torch.Tensor:
    known: dict[str, Any] = all_positions(sizes, CPU)
    read_ = {name: read_at(values[name], indices, known) for name, indices in replace(forms.plain(), mask=predicate).tensors().items()}
    return torch.as_tensor(evaluate_expression(predicate, known | read_)).expand(sizes)


def tiles(seen: torch.Tensor, block: tuple[int, int], rule: str) -> torch.Tensor:
    """any or all of the pairs of every tile that there are, one by one."""
    rows = seen.split(block[0], 2)
    return torch.stack([torch.stack([getattr(part.flatten(2), rule)(2) for part in row.split(block[1], 3)], 2) for row in rows], 2)


LENGTH = st.integers(1, 40)
SHAPES = st.builds(lambda batch, heads, n, m: Shape(batch, heads, 1, n, m, 4, 4), st.integers(1, 2), st.integers(1, 3), LENGTH, LENGTH)


@pytest.mark.parametrize("form", PREDICATES)
@settings(max_examples=25, deadline=None)
@given(shape=SHAPES, block=st.sampled_from([(1, 8), (4, 8), (16, 4)]), seed=st.integers(0, 1000), broadcast=st.booleans())
def test_nothing_that_is_seen_is_left_out(form: str, shape: Shape, block: tuple[int, int], seed: int, broadcast: bool) -> None:
    predicate, sizes = PREDICATES[form], (shape.batch, shape.heads, shape.n_queries, shape.n_keys)
    assert is_known_by_tile(predicate)
    values = operands(replace(forms.plain(), mask=predicate), shape, seed=seed, broadcast=broadcast)
    known = tile_mask(predicate, values, sizes, block, CPU)
    seen = every_pair(predicate, values, sizes)
    assert not (tiles(seen, block, "any") & ~known.may).any()
    assert not (known.must & ~tiles(seen, block, "all")).any()
    if form in EXACT:
        assert torch.equal(known.may.expand(seen.shape[:2] + known.may.shape[2:]), tiles(seen, block, "any"))
        assert torch.equal(known.must.expand(seen.shape[:2] + known.must.shape[2:]), tiles(seen, block, "all"))


# Where one comparison is all there is, nothing is lost.
EXACT = ("packed", "positions that the data give", "spans from", "every pair", "every pair, turned", "one map of blocks")


def test_numbers_that_are_none_hide_nothing() -> None:
    predicate = sympy.Le(tensor("n", "bj"), tensor("m", "bi"))
    values = {"n": torch.arange(16.0)[None], "m": torch.full((1, 16), 3.0)}
    values["n"][0, 1] = values["m"][0, 9] = torch.nan
    known, seen = tile_mask(predicate, values, (1, 1, 16, 16), (8, 8), CPU), every_pair(predicate, values, (1, 1, 16, 16))
    assert torch.equal(known.may[0, 0], torch.tensor([[True, False], [True, True]]))
    assert (known.may >= tiles(seen, (8, 8), "any")).all()
    assert not known.must.any()


def test_segments_out_of_order_hide_nothing_that_is_seen() -> None:
    segments = torch.tensor([[0] * 8 + [2] * 8 + [0] * 8 + [1] * 8])
    values = {"query_segments": segments, "key_segments": segments}
    known = tile_mask(forms.packed().mask, values, (1, 1, 32, 32), (16, 8), CPU)
    assert torch.equal(known.may[0, 0], torch.tensor([[True, True, True, True], [True, False, True, True]]))


UNKNOWN: dict[str, Boolean] = {
    "a map of every head's own": forms.masked("bhij").mask,
    "a table by distance": sympy.Ne(read("mask", I - J + 9), 0),
    "two tables": tensor("mask", "ij") > read("n", sympy.floor(I / 2), sympy.floor(J / 2)),
    "sides that are no integers": tensor("n", "bi") + J / 3 > tensor("m", "bj"),
}


@pytest.mark.parametrize("form", UNKNOWN)
def test_what_is_not_known_by_tile_is_looked_at_by_pair(form: str) -> None:
    attend = replace(forms.packed(), mask=sympy.And(forms.packed().mask, UNKNOWN[form]))
    split = split_tiles(attend)
    assert (split.by_tile, split.by_pair) == (forms.packed().mask, UNKNOWN[form])
    assert not WalkedList(replace(attend, mask=UNKNOWN[form]))


def test_padding_alone_is_not_worth_a_list() -> None:
    assert split_tiles(forms.masked("bj")).by_tile == sympy.true
    assert split_tiles(replace(forms.masked("bj"), mask=forms.packed(forms.masked("bj").mask).mask)).by_pair == sympy.true
    # Where hidden pairs weigh something all are visited.
    assert split_tiles(replace(forms.packed(), weight=W + 1)).by_pair == forms.packed().mask


def listed(attend: Attend, values: dict[str, torch.Tensor], block: tuple[int, int], transposed: bool = False) -> list[set[tuple[int, ...]]]:
    """[(b, h, owner, walked) seen in full, those cut], as a kernel reads them."""
    (line,) = WalkedList(attend).predicate
    predicate = line.partition("'")[2].rpartition("'")[0]
    given_ = (values["query"], values["key"], values["value"])
    made = (transposed_tile_list if transposed else tile_list)(predicate, values, given_, block)
    assert made.starts.dtype == made.blocks.dtype == torch.int32
    owners = -(-values["key"].shape[2] // block[1]) if transposed else -(-values["query"].shape[2] // block[0])
    found: list[set[tuple[int, ...]]] = [set(), set()]
    for b in range(values["query"].shape[0]):
        for h in range(values["query"].shape[1]):
            starts = made.starts[b * made.per_b + h * made.per_h :]
            for owner in range(owners):
                for kind in range(2):
                    blocks = made.blocks[starts[2 * owner + kind] : starts[2 * owner + kind + 1]].tolist()
                    assert blocks == sorted(set(blocks))
                    found[kind] |= {(b, h, owner, block_) for block_ in blocks}
    return found


@pytest.mark.parametrize("form", ["packed", "packed, causal, padded", "blocks, prefix", "spans of heads"])
def test_lists_are_of_the_tiles_that_may_be_seen(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tile_lists, "LEAST_WORK", 0)
    attend, shape, block = replace(forms.plain(), mask=PREDICATES[form]), Shape(2, 2, 1, 39, 37, 4, 4), (8, 4)
    values = operands(attend, shape)
    sizes = (2, 2, 39, 37)
    known = TileMask(*(each.expand(2, 2, 5, 10) for each in tile_mask(attend.mask, values, sizes, block, CPU)))
    for transposed in (False, True):
        full, cut = listed(attend, values, block, transposed)
        # The last block of what is walked over ends early: it is never seen in full.
        edge = known.must.clone()
        edge[:, :, 4 if transposed else slice(None), slice(None) if transposed else 9] = False
        edge &= known.may
        wanted = [edge, known.may & ~edge]
        for found, mask in zip((full, cut), wanted, strict=True):
            places = mask.transpose(2, 3) if transposed else mask
            assert found == {tuple(place) for place in places.nonzero().tolist()}


def test_small_attentions_and_single_blocks_of_queries_look_at_every_tile() -> None:
    values = operands(forms.packed(), Shape(1, 1, 1, 39, 37, 4, 4))
    full, cut = listed(forms.packed(), values, (8, 4))
    assert (len(full), len(cut)) == (0, 5 * 10)


@pytest.mark.parametrize("form", PREDICATES)
def test_nothing_is_asked_of_the_device(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device no tensor has entries: a list that is made there is made of the same operators whatever was chosen."""
    monkeypatch.setattr(tile_lists, "LEAST_WORK", 0)
    attend = replace(forms.plain(), mask=PREDICATES[form])
    values = {name: value.to("meta") for name, value in operands(attend, Shape(2, 2, 1, 39, 37, 4, 4)).items()}
    (line,) = WalkedList(attend).predicate
    predicate = line.partition("'")[2].rpartition("'")[0]
    for maker in (tile_list, transposed_tile_list):
        made = maker(predicate, values, (values["query"], values["key"], values["value"]), (8, 4))
        assert made.blocks.device.type == "meta"
