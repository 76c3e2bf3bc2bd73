"""Windows against the formula of the NATTEN library, query by query."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_sites import CAUSAL, SCALE, SITES, example, site
from torch.nn.attention import flex_attention

from codegen.operator import attend
from passes import Neighborhood, SinkRedistribution
from rewrite.ir import PassError, Program, Site
from rewrite.ir.semantics import evaluate_expression, positions


def natten(query: int, length: int, window: int, dilation: int, stride: int, causal: bool) -> set[int]:
    """The keys of one query, as csrc/include/natten/cuda/reference/mask.hpp computes them."""
    left, right = window // 2, window // 2 + window % 2 - 1
    group, place = query % dilation, query // dilation
    size = length // dilation + (1 - ((group + (dilation - length % dilation)) // dilation))
    if causal:
        lead = min(place // stride * stride + stride - 1, size - 1)
        start, end = max(lead - left - right, 0), min(place + 1, size)
    else:
        lead = min(place // stride * stride + stride // 2, size - 1)
        start = max(lead - left, 0) + (size - right - lead - 1 if lead + right >= size else 0)
        end = start + window
    return {group + dilation * key for key in range(start, end)}


def seen(setting: Neighborhood, case: Site) -> torch.Tensor:
    """[Nq, Nk] bool: the rewritten site's mask."""
    program = setting.apply(Program((case,)))
    assert program.touched, program.declined
    queries, keys = case.dims["Nq"], case.dims["Nk"]
    mask = evaluate_expression(program.sites[0].attend.mask, positions(queries, keys, torch.device("cpu")))
    return mask.expand(1, 1, queries, keys)[0, 0]


@st.composite
def axes(draw: st.DrawFn, most: int = 24) -> tuple[int, int, int, int]:
    """(length, window, dilation, stride) with a window that fits and leaves something out."""
    length = draw(st.integers(2, most))
    window = draw(st.integers(1, length - 1))
    return length, window, draw(st.integers(1, length // window)), draw(st.integers(1, window))


@settings(max_examples=40, deadline=None)
@given(axes(), st.integers(0, 3), st.booleans())
def test_windows_along_a_sequence(axis: tuple[int, int, int, int], prefix: int, causal: bool) -> None:
    length, *sizes = axis
    mask = seen(Neighborhood(*sizes, causal), site(length + prefix, prefix=prefix))
    assert mask[:prefix].all()
    assert mask[:, :prefix].all()
    for query in range(length):
        keys = natten(query, length, *sizes, causal)
        assert causal or len(keys) == sizes[0]
        assert set((mask[prefix + query, prefix:]).nonzero().flatten().tolist()) == keys


@settings(max_examples=30, deadline=None)
@given(axes(), st.integers(0, 3), st.booleans(), st.data())
def test_causal_sites_with_and_without_a_cache(axis: tuple[int, int, int, int], prefix: int, asked: bool, data: st.DataObject) -> None:
    length, *sizes = axis
    keys, queries = prefix + length, data.draw(st.integers(1, length))
    mask = seen(Neighborhood(*sizes, asked), site(keys, prefix=prefix, queries=queries, mask=CAUSAL))
    for query in range(queries):
        position = length - queries + query
        expected = {*range(prefix), *(prefix + key for key in natten(position, length, *sizes, causal=True))}
        assert set(mask[query].nonzero().flatten().tolist()) == expected


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(axes(6), st.booleans()), min_size=2, max_size=3), st.sampled_from((0, 1, 5)))
def test_windows_on_a_grid(along: list[tuple[tuple[int, int, int, int], bool]], prefix: int) -> None:
    grid = tuple(axis[0] for axis, _ in along)
    values = zip(*(axis[1:] for axis, _ in along), strict=True)
    setting = Neighborhood(*values, tuple(causal for _, causal in along))
    mask = seen(setting, site(prefix + math.prod(grid), grid, prefix))
    tokens = list(itertools.product(*map(range, grid)))
    for number, token in enumerate(tokens):
        near = [natten(place, *axis, causal) for place, (axis, causal) in zip(token, along, strict=True)]
        keys = {prefix + key for key, other in enumerate(tokens) if all(place in keys for place, keys in zip(other, near, strict=True))}
        assert set(mask[prefix + number].nonzero().flatten().tolist()) == {*range(prefix), *keys}


@pytest.mark.parametrize(
    ("window", "dilation", "stride", "causal"),
    [((5, 3), (1, 2), (1, 1), (False, False)), ((4, 6), (2, 1), (2, 3), (False, False)), ((3, 4), (1, 1), (3, 2), (True, False))],
)
def test_flex_attention_with_the_same_mask(
    window: tuple[int, int], dilation: tuple[int, int], stride: tuple[int, int], causal: tuple[bool, bool]
) -> None:
    """The lowered operator against FlexAttention, whose mask is made of the library's formula in tensors."""
    grid = (8, 9)

    def along(query: torch.Tensor, key: torch.Tensor, axis: int) -> torch.Tensor:
        w, d, s, length = window[axis], dilation[axis], stride[axis], grid[axis]
        place, group = query // d, query % d
        size = length // d + (1 - ((group + (d - length % d)) // d))
        left, right = w // 2, w // 2 + w % 2 - 1
        if causal[axis]:
            lead = torch.minimum(place // s * s + s - 1, size - 1)
            near = (key // d >= (lead - left - right).clamp(min=0)) & (key <= query)
        else:
            lead = torch.minimum(place // s * s + s // 2, size - 1)
            start = (lead - left).clamp(min=0) + torch.where(lead + right >= size, size - right - lead - 1, 0)
            near = (key // d >= start) & (key // d < start + w)
        return near & (key % d == group)

    def visible(b: torch.Tensor, h: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return along(query // grid[1], key // grid[1], 0) & along(query % grid[1], key % grid[1], 1)

    shown = example(SITES["grid"])
    operands = [shown.operands[name].float() for name in ("query", "key", "value")]
    block_mask = flex_attention.create_block_mask(visible, None, None, 72, 72, device="cpu")
    expected = flex_attention.flex_attention(*operands, block_mask=block_mask, scale=float(SCALE))
    (changed,) = Neighborhood(window, dilation, stride, causal).apply(Program((shown.site,))).sites
    actual = attend(changed.attend, *operands, {})
    # Sums over at most 30 keys and 4 channels, in float32, in another order.
    assert (actual - expected).abs().max() <= 64 * torch.finfo(torch.float32).eps * expected.abs().max()


def test_a_causal_window_longer_than_the_sequence_sees_all_of_it() -> None:
    assert torch.equal(seen(Neighborhood(100), SITES["text"]), torch.ones(24, 24, dtype=torch.bool).tril())


def test_the_sites_own_mask_stays_and_stays_causal() -> None:
    changed = Neighborhood(4).apply(Program((SITES["image and text, padded"],))).sites[0]
    assert changed.causal
    assert "padding" in changed.attend.tensors()


def test_windows_after_redistribution_keep_its_groups() -> None:
    program = Neighborhood(4).apply(SinkRedistribution().apply(Program((SITES["image and text"],))))
    assert len(program.touched) == 2
    assert program.sites[0].attend.groups is not None


@pytest.mark.parametrize(
    ("setting", "case", "words"),
    [
        (Neighborhood(9), "grid", "window 9 x dilation 1 = 9 is more than the 8 tokens of axis 0"),
        (Neighborhood((3, 3), (1, 4)), "grid", "window 3 x dilation 4 = 12 is more than the 9 tokens of axis 1"),
        (Neighborhood((3, 3)), "sequence", "window=(3, 3) has 2 entries, and its tokens lie along 1 axes"),
        (Neighborhood(3, dilation=(1,)), "grid", "dilation=(1,) has 1 entries"),
        (Neighborhood(3), "grid, other count", "0 prefix tokens and the grid 8x9 make 72 tokens, it has 49"),
        (Neighborhood(3), "cache, not causal", "KV cache of 24 keys"),
        (Neighborhood(3, layers=(0, 1)), "grid", "it is layer 3, and layers=(0, 1)"),
        (Neighborhood((3, 3), causal=(True,)), "grid", "causal=(True,) has 1 entries"),
        (Neighborhood(3, stride=(1, 2)), "text", "stride=(1, 2) has 2 entries"),
        (Neighborhood((8, 9)), "grid", "changes nothing"),
    ],
)
def test_declines(setting: Neighborhood, case: str, words: str) -> None:
    ((_, _, reason),) = setting.apply(Program((SITES[case],))).declined
    assert words in reason


@pytest.mark.parametrize(
    "values",
    [
        {"window": 0},
        {"window": ()},
        {"dilation": -1},
        {"window": "all", "dilation": 2},
        {"window": "all", "causal": True},
        {"layers": (1, 1)},
        {"window": (3, 0)},
        {"window": 3, "stride": 4},
        {"window": (5, 3), "stride": 4},
        {"window": 3, "stride": (3, 4)},
        {"stride": 0},
        {"causal": ()},
    ],
)
def test_out_of_range(values: dict[str, object]) -> None:
    with pytest.raises(PassError, match=r"neighborhood: .* is out of range"):
        Neighborhood(**values)
