"""Patch grids, prefixes and visual merges, read off traced graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from token_graphs import traced
from token_models import IMAGE_TOKEN, LENGTH, capturing, inputs, module_of, vision_language_model, whole_graphs
from torch import Tensor, fx, nn
from torch.nn import functional as F

from rewrite.tokens.layout import TokenLayouts, layout_of, patch_grid, visual_mask_node, visual_merges

B, C, PATCH = 2, 12, 4


class Transformer(nn.Module):
    """A vision transformer of one layer, with `prefix` learned tokens in front and `suffix` behind."""

    def __init__(self, prefix: int = 1, suffix: int = 0, channels_last: bool = False) -> None:
        super().__init__()
        self.channels_last = channels_last
        self.patch = nn.Conv2d(3, C, PATCH, PATCH)
        self.prefix = nn.Parameter(torch.zeros(1, prefix, C)) if prefix else None
        self.suffix = nn.Parameter(torch.zeros(1, suffix, C)) if suffix else None
        self.place = nn.Parameter(torch.zeros(1, 6 + prefix + suffix, C))
        self.norm = nn.LayerNorm(C)
        self.qkv = nn.Linear(C, 3 * C)
        self.head = nn.Linear(C, 5)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patch(image * 2 - 1)
        x = x.permute(0, 2, 3, 1).reshape(B, -1, C) if self.channels_last else x.flatten(2).transpose(1, 2)
        parts = [part.expand(B, -1, -1) for part in (self.prefix,) if part is not None] + [x]
        parts += [part.expand(B, -1, -1) for part in (self.suffix,) if part is not None]
        x = torch.cat(parts, dim=1) + self.place
        q, k, v = self.qkv(self.norm(x)).reshape(B, -1, 3, 2, C // 2).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        x = x + y.transpose(1, 2).reshape(B, -1, C)
        return self.head(self.norm(x))


def _image() -> Tensor:
    return torch.randn(B, 3, 2 * PATCH, 3 * PATCH)


@pytest.mark.parametrize(("prefix", "suffix", "last"), [(1, 0, False), (0, 0, True), (5, 0, True), (1, 2, False)])
def test_a_vision_transformer(prefix: int, suffix: int, last: bool) -> None:
    graph = traced(Transformer(prefix, suffix, last), _image()).graph
    (patches,) = patch_grid(graph)
    assert patches.grid == (2, 3)
    assert (patches.prefix, patches.suffix, patches.tokens) == (prefix, suffix, 6 + prefix + suffix)
    attention = next(n for n in graph.nodes if n.target is F.scaled_dot_product_attention)
    layouts = TokenLayouts(graph)
    for node in (*attention.args, attention, next(n for n in graph.nodes if n.op == "output").all_input_nodes[0]):
        assert layout_of(node) == (None if suffix else ((2, 3), prefix))
        layout = layouts.of(node)
        assert layout is not None
        assert (layout.grid, layout.prefix, layout.suffix, layout.patches) == ((2, 3), prefix, suffix, 6)


AFTER: dict[str, tuple[Callable[[Tensor], Tensor], Any]] = {
    "without the class token": (lambda x: x[:, 1:] * 2, ((2, 3), 0)),
    "more tokens in front": (lambda x: torch.cat([torch.zeros(B, 2, C), x], 1), ((2, 3), 3)),
    "pruned": (lambda x: x[:, torch.tensor([0, 2])], None),
    "one patch less": (lambda x: x[:, 2:], None),
    "rolled": (lambda x: x.roll(1, 1), None),
    "mixed over tokens": (lambda x: F.linear(x.transpose(1, 2), torch.ones(7, 7)).transpose(1, 2), None),
    "pooled": (lambda x: x.mean(1, keepdim=True), None),
}


@pytest.mark.parametrize("case", AFTER)
def test_what_becomes_of_a_layout(case: str) -> None:
    after, wanted = AFTER[case]
    patch, token = nn.Conv2d(3, C, PATCH, PATCH), torch.zeros(B, 1, C)

    def function(image: Tensor) -> Tensor:
        return after(torch.cat((token, patch(image).flatten(2).transpose(1, 2)), 1))

    graph = traced(function, _image()).graph
    assert layout_of(next(n for n in graph.nodes if n.op == "output").all_input_nodes[0]) == wanted


def test_video_patches_and_what_is_no_patch_embedding() -> None:
    tubes = traced(lambda x, w: F.conv3d(x, w, stride=(2, 4, 4)).flatten(2).mT, torch.randn(1, 3, 4, 8, 12), torch.randn(C, 3, 2, 4, 4))
    (patches,) = patch_grid(tubes.graph)
    assert (patches.grid, patches.tokens) == ((2, 2, 3), 12)
    others = {
        "overlapping": lambda x, w: F.conv2d(x, w, stride=2).flatten(2).mT,
        "padded": lambda x, w: F.conv2d(x, w, stride=4, padding=1).flatten(2).mT,
        "on features": lambda x, w: F.conv2d(F.conv2d(x, w[:3], padding="same"), w, stride=4).flatten(2).mT,
        "never tokens": lambda x, w: F.conv2d(x, w, stride=4).mean((2, 3)),
    }
    for name, function in others.items():
        assert not patch_grid(traced(function, _image(), torch.randn(C, 3, 4, 4)).graph), name


IDS = torch.tensor([[1, 9, 9, 2, 3], [9, 4, 9, 5, 6]])
FEATURES = torch.randn(4, C)
TABLE = torch.randn(10, C)


def _scatter(ids: Tensor, features: Tensor, table: Tensor, mask: Callable[[Tensor], Tensor]) -> Tensor:
    embeddings = F.embedding(ids, table)
    return embeddings.masked_scatter(mask(ids == 9), features) * 2


def _where(ids: Tensor, features: Tensor, table: Tensor, inverted: bool) -> Tensor:
    embeddings = F.embedding(ids, table) * 1.5
    mask = (ids == 9).unsqueeze(-1)
    spread = torch.zeros(2, 5, C) + features.mean()
    return torch.where(~mask, embeddings, spread) if inverted else torch.where(mask, spread, embeddings)


def _indexed(ids: Tensor, features: Tensor, table: Tensor) -> Tensor:
    embeddings = F.embedding(ids, table).clone()
    embeddings[ids == 9] = features
    return embeddings * 2


def _flat(ids: Tensor, features: Tensor, table: Tensor) -> Tensor:
    embeddings = F.embedding(ids, table).reshape(10, C)
    embeddings[ids.reshape(10) == 9] = features
    return embeddings.reshape(2, 5, C)


MERGES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "masked_scatter, mask [B, N, 1]": lambda i, f, t: _scatter(i, f, t, lambda m: m.unsqueeze(-1)),
    "masked_scatter, mask [B, N, C]": lambda i, f, t: _scatter(i, f, t, lambda m: m[..., None].expand(2, 5, C)),
    "where": lambda i, f, t: _where(i, f, t, False),
    "where, inverted": lambda i, f, t: _where(i, f, t, True),
    "indexed": _indexed,
    "indexed, flat": _flat,
}


@pytest.mark.parametrize("case", MERGES)
def test_visual_merges(case: str) -> None:
    module = traced(MERGES[case], IDS, FEATURES, TABLE)
    (merge,) = visual_merges(module.graph)
    assert merge.inverted == ("inverted" in case)
    assert merge.source is not None
    mask = visual_mask_node(module.graph, merge)
    next(n for n in module.graph.nodes if n.op == "output").args = ((mask,),)
    module.graph.lint()
    (got,) = fx.GraphModule(module, module.graph)(*module.meta["inputs"])
    assert torch.equal(got, IDS == 9)


SPANS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "cat": lambda i, f, t: torch.cat([F.embedding(i[:, :1], t), f.view(2, 2, C) * 2, F.embedding(i[:, 1:], t)], dim=1),
    "slice": lambda i, f, t: _spanned(F.embedding(torch.cat([i, i[:, :2]], 1), t) * 1, f.view(2, 2, C)),
}


def _spanned(embeddings: Tensor, features: Tensor) -> Tensor:
    embeddings[:, 1:3] = features
    return embeddings * 2


@pytest.mark.parametrize("case", SPANS)
def test_visual_spans(case: str) -> None:
    module = traced(SPANS[case], IDS, FEATURES, TABLE)
    (merge,) = visual_merges(module.graph)
    assert merge.span == (1, 3)
    assert merge.mask is None
    mask = visual_mask_node(module.graph, merge)
    next(n for n in module.graph.nodes if n.op == "output").args = ((mask,),)
    module.graph.lint()
    (got,) = fx.GraphModule(module, module.graph)(*module.meta["inputs"])
    assert torch.equal(got, torch.tensor([[0, 1, 1, 0, 0, 0, 0]] * 2).bool())


NOT_MERGES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "a causal mask": lambda i, f, t: torch.where((i == 9)[:, None, None, :], torch.zeros(()), -1e9).expand(2, 1, 5, 5),
    "padding set to zero": lambda i, f, t: torch.where((i == 9)[..., None], torch.zeros(()), F.embedding(i, t)),
    "two embeddings": lambda i, f, t: torch.where((i == 9)[..., None], F.embedding(i, t) * 2, F.embedding(i, t)),
    "rotated halves": lambda i, f, t: torch.cat([F.embedding(i, t)[..., 6:], F.embedding(i, t)[..., :6]], -1),
}


class _Prompted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.prompt = nn.Parameter(torch.zeros(1, 2, C))

    def forward(self, ids: Tensor, table: Tensor) -> Tensor:
        return torch.cat([self.prompt.expand(2, -1, -1), F.embedding(ids, table)], 1)


def test_a_learned_prompt_is_no_visual_merge() -> None:
    assert not visual_merges(traced(_Prompted(), IDS, TABLE).graph)


@pytest.mark.parametrize("case", NOT_MERGES)
def test_what_is_no_visual_merge(case: str) -> None:
    assert not visual_merges(traced(NOT_MERGES[case], IDS, FEATURES, TABLE).graph)


@whole_graphs
def test_a_vision_language_model() -> None:
    model: Any = vision_language_model("sdpa")
    call = inputs()
    found: list[Any] = []

    def backend(module: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        (merge,), (patches,) = visual_merges(module.graph), patch_grid(module.graph)
        mask = visual_mask_node(module.graph, merge)
        attention = [n for n in module.graph.nodes if getattr(n.target, "__name__", "") == "scaled_dot_product_attention"]
        layouts = TokenLayouts(module.graph)
        found.extend([patches, [("vision" in module_of(n), layouts.of(n.args[0])) for n in attention], mask.meta["example_value"].shape])
        return module.forward

    with torch.no_grad(), capturing():
        torch.compile(model, backend=backend)(**call)
    patches, attention, shape = found
    assert (patches.grid, patches.prefix, patches.tokens) == ((4, 4), 1, 17)
    assert shape == (2, LENGTH)
    assert IMAGE_TOKEN in call["input_ids"]
    assert attention
    for vision, layout in attention:
        assert (layout is not None) == vision
        assert layout is None or (layout.grid, layout.prefix) == ((4, 4), 1)
