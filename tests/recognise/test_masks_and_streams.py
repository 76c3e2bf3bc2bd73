"""What masks hide, and which sites share a residual stream."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from capture import Capture, recognised
from spellings import SCALE, Attention, B, C, D, N, later, padding, weighted, x
from torch import Tensor, nn
from torch.nn.functional import layer_norm, scaled_dot_product_attention

from rewrite.recognise.operators import canonical
from rewrite.recognise.sites import Recognition, recognise

LOWEST = torch.finfo(torch.float32).min


def fused(mask: Callable[[Tensor], Tensor]) -> Attention:
    return Attention(lambda self, q, k, v: scaled_dot_product_attention(q, k, v, attn_mask=mask(q)))


def spelt(change: Callable[[Tensor], Tensor]) -> Attention:
    return Attention(lambda self, q, k, v: weighted(q, k, v, lambda s: change(s * SCALE)))


def lower(rows: int) -> Tensor:
    return torch.ones(rows, rows, dtype=torch.bool).tril()


def by_position(rows: int) -> Tensor:
    place = torch.arange(rows)
    return place[None, :] <= place[:, None]


CAUSAL: dict[str, Callable[[], Attention]] = {
    "tril": lambda: fused(lambda q: lower(N)),
    "arange": lambda: fused(lambda q: by_position(N)[None, None]),
    "additive triu": lambda: fused(lambda q: torch.full((N, N), -torch.inf).triu(1)),
    "additive lowest": lambda: fused(lambda q: torch.zeros(N, N).masked_fill(~lower(N), LOWEST)),
    "additive, spelt out": lambda: spelt(lambda s: s + torch.full((N, N), -torch.inf).triu(1)),
    "masked_fill, minus infinity": lambda: spelt(lambda s: s.masked_fill(~lower(N), -torch.inf)),
    "masked_fill, True hides": lambda: spelt(lambda s: s.masked_fill(torch.ones(N, N).triu(1).bool(), -torch.inf)),
    "masked_fill, lowest": lambda: spelt(lambda s: s.masked_fill(lower(N) == 0, LOWEST)),
    "where": lambda: spelt(lambda s: torch.where(lower(N), s, LOWEST)),
    "where, other way": lambda: spelt(lambda s: torch.where(lower(N).logical_not(), -1e9, s)),
    "minus a number": lambda: spelt(lambda s: s - 1e9 * (1 - lower(N).float())),
    "band behind": lambda: fused(lambda q: lower(N) & (torch.ones(N, N).triu(-2) > 0)),
}

NOT_CAUSAL: dict[str, Callable[[], Attention]] = {
    "upper": lambda: spelt(lambda s: s.masked_fill(lower(N).tril(-1), -torch.inf)),
    "one ahead": lambda: fused(lambda q: torch.ones(N, N, dtype=torch.bool).tril(1)),
    "diagonal left out, later seen": lambda: spelt(lambda s: s.masked_fill(torch.eye(N).bool(), -torch.inf)),
    "small penalty": lambda: spelt(lambda s: s - torch.ones(N, N).triu(1)),
    "band": lambda: fused(lambda q: (torch.ones(N, N).triu(-2).tril(2)) > 0),
    "none": lambda: spelt(lambda s: s),
}


@pytest.mark.parametrize("name", CAUSAL)
def test_a_causal_mask_is_seen_as_one(name: str) -> None:
    recognition = recognised(CAUSAL[name](), x())
    assert recognition.misses == []
    (found,) = recognition.found
    assert found.site.causal


@pytest.mark.parametrize("name", NOT_CAUSAL)
def test_another_mask_is_not_causal(name: str) -> None:
    recognition = recognised(NOT_CAUSAL[name](), x())
    assert recognition.misses == []
    (found,) = recognition.found
    assert not found.site.causal


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("keep", [True, False], ids=["True keeps", "True hides"])
def test_padding_alone_is_not_causal(keep: bool, causal: bool) -> None:
    mask = padding().expand(B, 1, N, N) & (~later() if causal else True)
    model = Attention(lambda self, q, k, v, m: weighted(q, k, v, lambda s: (s * SCALE).masked_fill(~m if keep else m, -torch.inf)))
    (found,) = recognised(model, x(), mask if keep else ~mask).found
    assert found.site.causal is causal


def test_two_masks_of_one_site_are_read_together() -> None:
    """Padding and the causal order in two masks, one a boolean of low scores, one added."""
    model = Attention(
        lambda self, q, k, v, m: weighted(q, k, v, lambda s: torch.where(m, s * SCALE + torch.full((N, N), -torch.inf).triu(1), LOWEST))
    )
    (found,) = recognised(model, x(), padding()).found
    assert found.site.causal


class OfAnyLength(nn.Module):
    """Causal by a mask that is made for as many tokens as there are, and padding of the caller's."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(C, 3 * C)

    def forward(self, tokens: Tensor, padding: Tensor) -> Tensor:
        q, k, v = self.inner(tokens).unsqueeze(1).chunk(3, -1)
        mask = by_position(tokens.shape[1])[None, None] & padding[:, None, None, :]
        return scaled_dot_product_attention(q, k, v, attn_mask=mask)


@pytest.mark.parametrize("length", [9, 14, 3])
def test_a_graph_is_read_for_a_call_of_another_length(length: int) -> None:
    """One captured graph serves every length, and may be rewritten anew at any of them."""
    tokens, padding_ = torch.randn(2, 9, C), torch.ones(2, 9, dtype=torch.bool)
    for given in (tokens, padding_):
        torch._dynamo.mark_dynamic(given, 1)
    capture = Capture()
    with torch.no_grad():
        torch.compile(OfAnyLength(), backend=capture, fullgraph=True)(tokens, padding_)
    (graph,), (inputs,) = capture.graphs, capture.inputs

    def resized(value: object) -> object:
        if isinstance(value, Tensor) and value.shape[:2] == (2, 9):
            return value.new_ones(2, length, *value.shape[2:])
        return length if value == 9 else value

    other = {node: value if isinstance(value, nn.Parameter) else resized(value) for node, value in inputs.items()}
    (found,) = recognise(graph.graph, other).found
    assert found.site.causal


def test_a_bias_from_activations_is_no_mask() -> None:
    model = Attention(
        lambda self, q, k, v, m: weighted(q, k, v, lambda s: s * SCALE + nn.functional.linear(m, self.to_q.weight[:1]).mT[:, None])
    )
    (found,) = recognised(model, x(), x()).found
    assert not found.site.causal


# Streams


class Plain(Attention):
    """SDPA with an output projection."""

    def __init__(self) -> None:
        super().__init__(lambda self, q, k, v: scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        self.out = nn.Linear(C, C)

    def forward(self, x: Tensor, *rest: Tensor) -> Tensor:
        return self.out(super().forward(x, *rest))


class RMS(nn.Module):
    """RMS normalisation written out, in float32 as language models do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(C))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


class Block(nn.Module):
    """A layer; `norm` is where and how it normalises."""

    def __init__(self, norm: str) -> None:
        super().__init__()
        self.attention = Plain()
        self.norm = norm
        self.first: nn.Module = RMS() if norm == "rms" else nn.RMSNorm(C) if norm == "rms call" else nn.LayerNorm(C)
        self.mlp = nn.Sequential(nn.Linear(C, 2 * C), nn.GELU(), nn.Linear(2 * C, C))

    def forward(self, x: Tensor) -> Tensor:
        if self.norm == "post":
            x = self.first(x + self.attention(x))
            return layer_norm(x + self.mlp(x), (C,))
        x = x + self.attention(self.first(x))
        return x + self.mlp(layer_norm(x, (C,)))


class Tower(nn.Module):
    """Layers in front of which the input is changed a little, so that the stream is no placeholder."""

    def __init__(self, norm: str, layers: int = 3) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(1, 1, C))
        self.blocks = nn.ModuleList(Block(norm) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.position
        for block in self.blocks:
            x = block(x)
        return x


def placed(recognition: Recognition) -> list[tuple[int, int, int]]:
    return [(entry.site.stack, entry.site.layer, entry.site.depth) for entry in recognition.found]


@pytest.mark.parametrize("norm", ["layer", "rms", "rms call", "post"])
def test_layers_of_one_stream_are_numbered(norm: str) -> None:
    model = Tower(norm)
    capture = Capture()
    with torch.no_grad():
        torch.compile(model, backend=capture, fullgraph=True, dynamic=False)(x())
    assert placed(capture.recognition) == [(0, 0, 3), (0, 1, 3), (0, 2, 3)]
    assert [entry.site.name for entry in capture.recognition.found] == [f"blocks.{place}.attention" for place in range(3)]
    for entry in capture.recognition.found:
        assert "hidden" in entry.site.operands
        assert entry.site.dims["C"] == C
        assert entry.stream is not None
    if norm == "post":
        return
    # Pre-norm: the stream is what the layer adds to, the sum itself and not what was normalised from it.
    additions = [entry.stream for entry in capture.recognition.found]
    assert len(set(additions)) == 3
    for stream in additions:
        assert stream is not None
        assert any(canonical(user) == "add" for user in stream.users)


class TwoTowers(nn.Module):
    """Two stacks in one module, the second on other tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.vision, self.text = Tower("layer", 2), Tower("rms", 3)
        self.bridge = nn.Linear(C, C)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        seen = self.vision(x)
        return self.text(torch.cat([self.bridge(seen), y], dim=1))


def test_two_stacks_are_told_apart() -> None:
    recognition = recognised(TwoTowers(), x(), x(tokens=3))
    assert placed(recognition) == [(0, 0, 2), (0, 1, 2), (1, 0, 3), (1, 1, 3), (1, 2, 3)]
    assert [entry.site.dims["Nq"] for entry in recognition.found] == [N, N, N + 3, N + 3, N + 3]
    assert recognition.found[0].site.dims["D"] == D


class Alternating(nn.Module):
    """Two stacks of the same shape whose layers take turns."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.ModuleList(Block("layer") for _ in range(2)), nn.ModuleList(Block("layer") for _ in range(2))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for one, two in zip(self.one, self.two, strict=True):
            x, y = one(x), two(y)
        return x + y


def test_stacks_that_take_turns_are_told_apart() -> None:
    assert placed(recognised(Alternating(), x(), x())) == [(0, 0, 2), (1, 0, 2), (0, 1, 2), (1, 1, 2)]
