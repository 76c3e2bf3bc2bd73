"""Tokens in the order of the blocks that are chosen: the same attention, of which a tile sees little."""

from __future__ import annotations

from dataclasses import replace

import attention_forms as forms
import pytest
import sympy
import torch
from attention_forms import SCALE, Shape, operands
from hypothesis import given, settings
from hypothesis import strategies as st

from codegen.tile_masks import tile_mask
from codegen.tiles import Tile
from codegen.token_order import token_order
from rewrite.ir import QK, Attend, B, BlockChoice, H, I, J, read, semantics, tensor

CPU = torch.device("cpu")
TILE = Tile(16, 16, 4, 1)


def regions(grid: tuple[int, int], counts: tuple[int, int], prefix: int, most: int = 1, by_head: bool = False) -> Attend:
    """Regions of a grid behind a prefix, some of them chosen."""

    def region(token: sympy.Expr) -> sympy.Expr:
        down, across = sympy.floor(token / grid[1]), sympy.Mod(token, grid[1])
        return sympy.floor(down / (grid[0] // counts[0])) * counts[1] + sympy.floor(across / (grid[1] // counts[1]))

    lead = (B, H) if by_head else (B,)
    chosen = sympy.Ne(read("choice", *lead, region(I - prefix), region(J - prefix)), 0)
    mask = sympy.Or(sympy.Lt(I, prefix), sympy.Lt(J, prefix), chosen) if prefix else chosen
    return replace(forms.plain(), mask=mask, choice=BlockChoice("choice", most))


def with_choice(attend: Attend, shape: Shape, counts: tuple[int, int], dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """With a choice of as many regions as were promised, or fewer."""
    values = operands(attend, shape, dtype)
    n, most = counts[0] * counts[1], 1 if attend.choice is None else attend.choice.most
    lead = (shape.batch, shape.heads) if H in attend.tensors()["choice"] else (shape.batch,)
    generator = torch.Generator().manual_seed(2)
    order = torch.rand(*lead, n, n, generator=generator).argsort(-1).argsort(-1)
    return values | {"choice": order < torch.randint(0, most + 1, (*lead, n, 1), generator=generator)}


MORE = {
    "": lambda attend: attend,
    "padded": lambda attend: replace(attend, mask=sympy.And(attend.mask, sympy.Ne(tensor("mask", "bj"), 0))),
    "biased by key, with sinks by query": lambda attend: replace(attend, score=SCALE * QK + tensor("bias", "bj"), sink=tensor("t", "bhi")),
    "grouped": lambda attend: replace(attend, groups=forms.grouped().groups),
}


@pytest.mark.parametrize("more", MORE)
@settings(max_examples=6, deadline=None)
@given(st.sampled_from([((8, 8), (2, 4)), ((6, 12), (3, 3)), ((4, 30), (1, 5))]), st.integers(0, 3), st.booleans(), st.booleans())
def test_the_attention_is_the_same(
    more: str, cut: tuple[tuple[int, int], tuple[int, int]], prefix: int, by_head: bool, broadcast: bool
) -> None:
    (grid, counts), tokens = cut, cut[0][0] * cut[0][1] + prefix
    attend = MORE[more](regions(grid, counts, prefix, by_head=by_head))
    shape = Shape(2, 2, 1, tokens, tokens, 4, 4)
    values = with_choice(attend, shape, counts)
    order = token_order(attend, tokens, tokens, Tile(4, 4, 4, 1), CPU)
    assert order is not None
    assert sorted(order.queries.tolist()) == sorted(order.keys.tolist()) == list(range(tokens))
    names = list(attend.tensors())
    assert list(order.attend.tensors()) == names
    own = dict(zip(names, order.tensors([values[name] for name in names]), strict=True))
    own |= {"query": order.of_queries(values["query"])} | {name: order.of_keys(values[name]) for name in ("key", "value")}
    found, reference = semantics.attend(order.attend, own), semantics.attend(attend, values)
    torch.testing.assert_close(found, order.of_queries(reference), rtol=1e-10, atol=1e-10)


def seen(attend: Attend, values: dict[str, torch.Tensor], tokens: int) -> float:
    """The share of the tiles that may be seen."""
    known = tile_mask(attend.mask, values, (1, 2, tokens, tokens), TILE[:2], CPU)
    return float(known.may.double().mean())


def test_a_tile_sees_what_its_own_regions_chose() -> None:
    grid, counts = (32, 32), (4, 4)
    attend, shape = regions(grid, counts, 1, most=2), Shape(1, 2, 2, 1025, 1025, 4, 4)
    values = with_choice(attend, shape, counts)
    order = token_order(attend, 1025, 1025, TILE, CPU)
    assert order is not None
    assert seen(order.attend, values, 1025) < 0.25
    assert seen(attend, values, 1025) > 0.5


OWN_ORDER: dict[str, tuple[Attend, int]] = {
    "no promise": (replace(regions((16, 16), (4, 4), 0), choice=None), 256),
    "positions are read by the score": (replace(regions((16, 16), (4, 4), 0), score=SCALE * QK + I - J), 256),
    "a bias by pair": (replace(regions((16, 16), (4, 4), 0), score=SCALE * QK + tensor("bias", "hij")), 256),
    "causal": (replace(regions((16, 16), (4, 4), 0), mask=sympy.And(regions((16, 16), (4, 4), 0).mask, J <= I)), 256),
    "regions that differ in size": (regions((16, 16), (4, 4), 0), 250),
    "too many are chosen": (regions((16, 16), (4, 4), 0, most=9), 256),
    "blocks in order": (regions((16, 16), (16, 1), 1), 257),
}


@pytest.mark.parametrize("form", OWN_ORDER)
def test_what_stays_in_its_own_order(form: str) -> None:
    attend, tokens = OWN_ORDER[form]
    assert token_order(attend, tokens, tokens, TILE, CPU) is None
