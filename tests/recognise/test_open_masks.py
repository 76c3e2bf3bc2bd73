"""Masks of positions alone: taken off where they hide nothing, kept where they do or may."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import sympy
import torch
from capture import Capture, relowered
from torch import Tensor, nn
from torch.nn import functional

WIDTH = 32


class Attention(nn.Module):
    """One head with a mask that the module makes; `fused` or written out."""

    def __init__(self, mask: Callable[[Tensor], Tensor], fused: bool) -> None:
        super().__init__()
        self.mask, self.fused, self.inner = mask, fused, nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.inner(x).unsqueeze(1).chunk(3, -1)
        mask = self.mask(x)
        if self.fused:
            return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        added = mask if mask.is_floating_point() else torch.where(mask, 0.0, float("-inf"))
        return (query @ key.transpose(-2, -1) * WIDTH**-0.5 + added).softmax(-1) @ value


def rows(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1])[None, None, :, None]


def _marked(mask: Tensor) -> Tensor:
    mask[..., 0] = -1.0
    return mask


OPEN: dict[str, Callable[[Tensor], Tensor]] = {
    "all positions": lambda x: (rows(x) >= 0).expand(x.shape[0], 1, -1, x.shape[1]),
    "ones": lambda x: torch.ones(1, 1, x.shape[1], x.shape[1], dtype=torch.bool),
    "where nothing is chosen": lambda x: torch.where((rows(x) >= 0).expand(-1, -1, -1, x.shape[1]), 0.0, float("-inf")),
    "zeros like the input": lambda x: x.new_zeros(x.shape[0], 1, x.shape[1], x.shape[1]),
    "zeros": lambda x: torch.zeros(x.shape[0], 1, x.shape[1], x.shape[1]),
}
NOT_OPEN: dict[str, Callable[[Tensor], Tensor]] = {
    "causal": lambda x: rows(x) >= torch.arange(x.shape[1]),
    "first token hidden": lambda x: torch.arange(x.shape[1])[None, None, None, :].expand(1, 1, x.shape[1], -1) > 0,
    "a bias": lambda x: torch.full((1, 1, x.shape[1], x.shape[1]), 0.5),
    "zeros that were written into": lambda x: _marked(x.new_zeros(1, 1, x.shape[1], x.shape[1])),
    "random": lambda x: torch.rand(1, 1, x.shape[1], x.shape[1]) >= 0,
    "from the input": lambda x: (x[:, None, :, :1] < 1e9).expand(-1, -1, -1, x.shape[1]),
}
fused = pytest.mark.parametrize("fused", [True, False])


@fused
@pytest.mark.parametrize("mask", OPEN)
def test_taken_off(mask: str, fused: bool) -> None:
    model, x = Attention(OPEN[mask], fused), torch.randn(2, 9, WIDTH)
    result, capture = relowered(model, x)
    (found,) = capture.recognition.found
    assert found.site.attend.mask == sympy.true
    assert found.site.attend.tensors() == {}
    assert torch.allclose(result, model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mask", OPEN)
def test_taken_off_at_any_size(mask: str) -> None:
    x = torch.randn(2, 9, WIDTH)
    torch._dynamo.mark_dynamic(x, 0)
    torch._dynamo.mark_dynamic(x, 1)
    capture = Capture()
    with torch.no_grad():
        torch.compile(Attention(OPEN[mask], True), backend=capture, fullgraph=True)(x)
    (found,) = capture.recognition.found
    assert found.site.attend.mask == sympy.true
    assert found.site.attend.tensors() == {}


@fused
@pytest.mark.parametrize("mask", NOT_OPEN)
def test_kept(mask: str, fused: bool) -> None:
    torch.manual_seed(0)
    model, x = Attention(NOT_OPEN[mask], fused), torch.randn(2, 9, WIDTH)
    _, capture = relowered(model, x)
    (found,) = capture.recognition.found
    assert found.site.attend.tensors() or found.site.attend.mask != sympy.true


def test_kept_where_a_size_may_change() -> None:
    """Open at nine tokens, and not at fifty."""
    model, x = Attention(lambda x: (rows(x) < 20).expand(-1, -1, -1, x.shape[1]), True), torch.randn(2, 9, WIDTH)
    torch._dynamo.mark_dynamic(x, 1)
    capture = Capture()
    with torch.no_grad():
        torch.compile(model, backend=capture, fullgraph=True)(x)
    (found,) = capture.recognition.found
    assert found.site.attend.tensors() or found.site.attend.mask != sympy.true
