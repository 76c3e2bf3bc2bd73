"""Grids after pooling and merging, windows of every kind, frames, and grids known by their use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from token_graphs import traced
from torch import Tensor
from torch.nn import functional as F

from rewrite.tokens.layout import TokenLayout, TokenLayouts

B, C = 2, 4
STEM, SQUARE = torch.randn(C, 3, 3, 3), torch.randn(C, C, 3, 3)


def stem(image: Tensor) -> Tensor:
    """[B, 3, 16, 24] -> [B, C, 8, 12], overlapping."""
    return F.conv2d(image, STEM, stride=2, padding=1)


def attended(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x)


def flat(x: Tensor) -> Tensor:
    return x.flatten(2).mT


def last(image: Tensor) -> Tensor:
    """[B, 8, 12, C]"""
    return stem(image).permute(0, 2, 3, 1)


def windows(x: Tensor, h: int, w: int) -> Tensor:
    """[B, H, W, C] -> [B * number, h * w, C]"""
    x = x.view(B, x.shape[1] // h, h, x.shape[2] // w, w, C).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(-1, h * w, C)


def joined(x: Tensor, H: int, W: int, h: int, w: int) -> Tensor:
    return x.view(B, H // h, W // w, h, w, C).permute(0, 1, 3, 2, 4, 5).reshape(B, H, W, C)


def merged_slices(x: Tensor) -> Tensor:
    """Patch merging by slices of every second row and column."""
    parts = [x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)]
    return F.linear(torch.cat(parts, -1), torch.ones(C, 4 * C))


def merged_views(x: Tensor) -> Tensor:
    x = x.reshape(B, 4, 2, 6, 2, C).permute(0, 1, 3, 4, 2, 5).flatten(3)
    return F.linear(F.layer_norm(x, (4 * C,)), torch.ones(C, 4 * C))


def by_use(image: Tensor) -> Tensor:
    """Tokens of which nothing is known, until they are laid out for a convolution."""
    tokens = F.linear(image.flatten(1)[:, : 97 * C].reshape(B, 97, C), torch.ones(C, C))
    tokens = tokens + attended(tokens)
    x = tokens[:, 1:].mT.reshape(B, C, 8, 12)
    return F.conv2d(x, SQUARE, padding=1)


def both_ways(image: Tensor) -> Tensor:
    """Windows, then windows of the rolled grid, then the whole of it."""
    x = last(image)
    x = x + joined(attended(windows(x, 4, 4)), 8, 12, 4, 4)
    y = attended(windows(x.roll((-2, -2), (1, 2)), 4, 4))
    x = x + joined(y, 8, 12, 4, 4).roll((2, 2), (1, 2))
    return attended(x.reshape(B, 96, C))


def padded(image: Tensor) -> Tensor:
    """Windows of 5 x 5 on a grid of 8 x 12, padded to 10 x 15 and cropped again."""
    x = F.pad(last(image), (0, 0, 0, 3, 0, 2))
    x = joined(attended(windows(x, 5, 5)), 10, 15, 5, 5)[:, :8, :12]
    return attended(x.reshape(B, 96, C))


def halo(image: Tensor) -> Tensor:
    """Blocks of 4 x 4 that see a margin of 2 around themselves."""
    x = stem(image)
    q = x.reshape(B, C, 2, 4, 3, 4).permute(0, 2, 4, 3, 5, 1).reshape(B * 6, 16, C)
    kv = F.pad(x, (2, 2, 2, 2)).unfold(2, 8, 4).unfold(3, 8, 4).reshape(B, C, 6, 64).permute(0, 2, 3, 1).reshape(B * 6, 64, C)
    return F.scaled_dot_product_attention(q, kv, kv)


def pooled_queries(image: Tensor) -> Tensor:
    """Windows of 4 x 4 whose queries are pooled to 2 x 2."""
    x = windows(last(image), 4, 4)
    q = F.max_pool2d(x.view(-1, 4, 4, C).permute(0, 3, 1, 2), 2).flatten(2).mT
    return F.scaled_dot_product_attention(q, x, x)


def patches_of_patches(image: Tensor) -> Tensor:
    """Pixels attend to each other within patches, then the patches."""
    x = stem(image)
    inner = F.unfold(x, 4, stride=4).mT.reshape(B * 6, C, 16).mT
    inner = attended(inner)
    outer = F.linear(inner.reshape(B, 6, 16 * C), torch.ones(C, 16 * C))
    return attended(outer)


def patches_by_views(image: Tensor) -> Tensor:
    """Patches of 4 x 4 pixels cut by a view, and a linear map of each."""
    x = image.reshape(B, 3, 4, 4, 6, 4).permute(0, 2, 4, 3, 5, 1).reshape(B, 24, 48)
    return attended(F.linear(x, torch.ones(C, 48)))


def beside_text(image: Tensor) -> Tensor:
    """A picture's tokens in one sequence with those of a text."""
    text = F.embedding(torch.zeros(B, 3, dtype=torch.long), torch.ones(5, C))
    return attended(torch.cat((flat(stem(image)), F.layer_norm(text, (C,))), 1))


@dataclass(frozen=True)
class Case:
    function: Callable[[Tensor], Any]
    layouts: tuple[TokenLayout | None, ...]


GRID = TokenLayout((8, 12))
CASES: dict[str, Case] = {
    "an overlapping stem": Case(lambda i: attended(flat(stem(i))), (GRID,)),
    "a pooled grid": Case(lambda i: attended(flat(F.avg_pool2d(stem(i), 2))), (TokenLayout((4, 6)),)),
    "a convolution that keeps the grid": Case(lambda i: attended(flat(F.conv2d(stem(i), SQUARE, padding=1))), (GRID,)),
    "a resized grid": Case(lambda i: attended(flat(F.interpolate(stem(i), (5, 7)))), (TokenLayout((5, 7)),)),
    "merged by slices": Case(lambda i: attended(merged_slices(last(i)).flatten(1, 2)), (TokenLayout((4, 6)),)),
    "merged by views": Case(lambda i: attended(merged_views(last(i)).flatten(1, 2)), (TokenLayout((4, 6)),)),
    "strided queries": Case(lambda i: attended(last(i)[:, ::2, ::2].reshape(B, -1, C)), (TokenLayout((4, 6)),)),
    "windows, shifted windows, all": Case(
        both_ways, (TokenLayout((8, 12), window=(4, 4)), TokenLayout((8, 12), window=(4, 4), shifted=True), GRID)
    ),
    "padded windows": Case(padded, (TokenLayout((8, 12), window=(5, 5)), GRID)),
    "a dilated grid": Case(
        lambda i: attended(last(i).view(B, 4, 2, 4, 3, C).permute(0, 2, 4, 1, 3, 5).reshape(-1, 16, C)),
        (TokenLayout((8, 12), window=(4, 4), partition="grid"),),
    ),
    "rows": Case(lambda i: attended(last(i).reshape(B * 8, 12, C)), (TokenLayout((8, 12), window=(1, 12)),)),
    "columns": Case(lambda i: attended(last(i).transpose(1, 2).reshape(B * 12, 8, C)), (TokenLayout((8, 12), window=(8, 1)),)),
    "column by column": Case(lambda i: attended(last(i).transpose(1, 2).reshape(B, 96, C)), (TokenLayout((8, 12), raster=False),)),
    "halo": Case(halo, (TokenLayout((8, 12), window=(4, 4)),)),
    "pooled queries of windows": Case(pooled_queries, (TokenLayout((4, 6), window=(2, 2)),)),
    "patches of patches": Case(patches_of_patches, (TokenLayout((8, 12), window=(4, 4)), TokenLayout((2, 3)))),
    "patches by views": Case(patches_by_views, (TokenLayout((4, 6)),)),
    "beside text": Case(beside_text, (None,)),
    "known by its use": Case(by_use, (TokenLayout((8, 12), prefix=1),)),
    "not known": Case(lambda i: attended(i.reshape(B, 96, -1)), (None,)),
    "a class token alone": Case(lambda i: attended(flat(stem(i)).mean(1, keepdim=True)), (None,)),
}


def layouts_of(function: Callable[..., Any], *inputs: Tensor) -> tuple[TokenLayout | None, ...]:
    """The layout of the queries of every attention."""
    graph = traced(function, *inputs).graph
    layouts = TokenLayouts(graph)
    return tuple(layouts.of(node.args[0]) for node in graph.nodes if node.target is F.scaled_dot_product_attention)  # type: ignore[arg-type]


@pytest.mark.parametrize("case", CASES)
def test_what_queries_lie_on(case: str) -> None:
    assert layouts_of(CASES[case].function, torch.randn(B, 3, 16, 24)) == CASES[case].layouts


def _frames(video: Tensor, join: bool) -> Tensor:
    """Frames as a batch of pictures; each attends to itself, and each place to itself in time where they are joined."""
    frames = video.shape[1]
    x = flat(stem(video.flatten(0, 1)))
    if join:
        x = attended(x.view(B, frames, 96, C).transpose(1, 2).reshape(B * 96, frames, C))
        x = x.view(B, 96, frames, C).transpose(1, 2).reshape(B * frames, 96, C)
    return attended(x)


def test_frames_are_a_grid_axis_where_attention_joins_them() -> None:
    video = torch.randn(B, 5, 3, 16, 24)
    assert layouts_of(lambda v: _frames(v, join=False), video) == (GRID,)
    assert layouts_of(lambda v: _frames(v, join=True), video) == (
        TokenLayout((5, 8, 12), window=(5, 1, 1)),
        TokenLayout((5, 8, 12), window=(1, 8, 12)),
    )


def test_what_is_known_late_is_known_everywhere() -> None:
    """A view that cuts an axis otherwise than an earlier one did, and tokens of a size that was traced as a symbol."""

    def twice(image: Tensor) -> Tensor:
        x = last(image)
        x = x + joined(attended(windows(x, 4, 6)), 8, 12, 4, 6)
        return attended(windows(x, 2, 3))

    assert layouts_of(twice, torch.randn(B, 3, 16, 24)) == (TokenLayout((8, 12), window=(4, 6)), TokenLayout((8, 12), window=(2, 3)))


def test_a_grid_of_symbolic_size_is_not_known() -> None:
    def function(image: Tensor) -> Tensor:
        return attended(flat(stem(image)))

    graph = traced(function, torch.randn(B, 3, 16, 24), dynamic=True).graph
    query: Any = next(node for node in graph.nodes if node.target is F.scaled_dot_product_attention).args[0]
    assert TokenLayouts(graph).of(query) is None
