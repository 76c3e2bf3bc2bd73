"""Each rule on a small graph: what is computed token by token equals the original at the kept tokens, and is zero at the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from token_graphs import POSITIONS, B, C, H, K, N, pushed, zeroed
from torch import Tensor
from torch.nn import functional as F

D = C // H


def _augmented(x: Tensor, y: Tensor) -> Tensor:
    z = x * 1
    z += y
    return z


TOKEN_WISE: dict[str, tuple[Callable[..., Any], tuple[tuple[int, ...], ...]]] = {
    "operand [N, C]": (lambda x, y: x + y, ((N, C),)),
    "operand [1, N, C]": (lambda x, y: y * x, ((1, N, C),)),
    "operand [B, N, 1]": (lambda x, y: x - y, ((B, N, 1),)),
    "operand [B, 1, C]": (lambda x, y: x - y, ((B, 1, C),)),
    "operand [C]": (lambda x, y: x - y, ((C,),)),
    "operand used twice": (lambda x, y: (x + y) * torch.sin(y) + y, ((N, C),)),
    "operand out of its size-one axis": (lambda x, y: x + y.expand(B, N, C), ((B, 1, C),)),
    "where": (lambda x, y: torch.where(y > 0, x, x.new_zeros(())), ((B, N, 1),)),
    "masked_fill": (lambda x, y: x.masked_fill(y > 0, 0.0), ((N, 1),)),
    "in place": (lambda x, y: (x * 1).add_(y).mul_(2), ((N, C),)),
    "augmented assignment": (_augmented, ((N, C),)),
    "lerp": (lambda x, y: torch.lerp(x, y, 0.3), ((B, N, C),)),
    "linear and activations": (lambda x, w: F.dropout(F.silu(F.linear(F.gelu(x), w)).to(torch.float32), 0.1, False), ((C, C),)),
    "norms": (lambda x: F.layer_norm(x, (C,)) + F.rms_norm(x, (C,)) + x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6), ()),
    "reductions over features": (lambda x: x.softmax(-1) * x.amax(-1, True) + x.std(-1, keepdim=True) + x.norm(dim=-1, keepdim=True), ()),
    "max with indices": (lambda x: x.max(-1)[0] + x.topk(2, -1)[0].sum(-1) + x.var(-1), ()),
    "argmax": (lambda x: x.argmax(-1), ()),
    "cumsum over features": (lambda x: x.cumsum(-1).sort(-1)[0], ()),
    "heads": (lambda x: x.view(B, N, H, D).transpose(1, 2).contiguous().transpose(1, 2).reshape(B, N, -1), ()),
    "heads with sizes inferred": (lambda x: x.view(B, -1, H, D).permute(0, 2, 1, 3).transpose(1, 2).flatten(2), ()),
    "sizes by name": (lambda x: x.reshape(shape=(B, N, H, D)).mean((2, 3), keepdim=True), ()),
    "unflatten": (lambda x: x.unflatten(-1, (H, D)).movedim(2, 1).swapaxes(1, 2).flatten(-2, -1), ()),
    "position table on heads": (lambda x, y: (x.view(B, N, H, D).transpose(1, 2) + y).transpose(1, 2), ((N, D),)),
    "sequence first": (lambda x, y: (x.transpose(0, 1) + y).transpose(0, 1), ((N, 1, C),)),
    "sequence first, operand without batch": (lambda x, y: (x.permute(2, 1, 0) * y).permute(2, 1, 0), ((N, 1),)),
    "expand": (lambda x: x[:, :, None].expand(B, N, 3, C).reshape(B, N, 3 * C), ()),
    "expand with -1": (lambda x: x.unsqueeze(2).expand(-1, -1, 3, -1).sum(2), ()),
    "expand_as": (lambda x, y: y.unsqueeze(-1).expand_as(x) * x, ((B, N),)),
    "repeat": (lambda x: x.repeat(1, 1, 2) + x.tile((1, 1, 2)), ()),
    "repeat_interleave": (lambda x: x.repeat_interleave(2, dim=-1), ()),
    "slices of features": (lambda x: torch.cat([-x[..., C // 2 :], x[..., : C // 2]], -1), ()),
    "whole slices of tokens": (lambda x: x[:, :N][:, 0:, 1:5][:, :, None, 0], ()),
    "index of features": (lambda x: x[..., 0] + x.select(2, 1) + x.narrow(2, 0, 1).squeeze(-1), ()),
    "index by tensor on features": (lambda x, y: x[:, :, (y * 0).long()], ((3,),)),
    "index by list on features": (lambda x, y: x.view(-1, N, H, D)[..., [-1], :].expand(-1, N, H, D) * y, ((N, 1, 1),)),
    "batch and tokens merged and split": (
        lambda x, w, y: (F.linear(x.view(-1, C), w).relu() * y.expand(B, N, C).reshape(B * N, C)).view(B, N, H, D).flatten(2),
        ((C, C), (N, C)),
    ),
    "batch and tokens merged": (lambda x: F.layer_norm(x.reshape(-1, C), (C,)).softmax(-1).view(x.shape), ()),
    "index_select on features": (lambda x, y: x.index_select(2, (y * 0).long()), ((3,),)),
    "gather of features": (lambda x, y: torch.gather(x, -1, (y > 0).long()), ((B, N, 2),)),
    "pieces": (lambda x: torch.stack([*x.chunk(2, -1), *x.split(C // 2, dim=-1)], 2).unbind(2)[1], ()),
    "stack with a full operand": (lambda x, y: torch.stack([x, y], -1), ((B, N, C),)),
    "cat of features with a full operand": (lambda x, y: torch.cat((x, y), dim=-1), ((B, N, 3),)),
    "pad of features": (lambda x: F.pad(x, (1, 2)), ()),
    "roll of features": (lambda x: x.roll(1, -1), ()),
    "embedding": (lambda x, w: F.embedding((x[..., 0] * 0).long() + 3, w), ((11, C),)),
    "matmul": (lambda x, w: x @ w, ((C, C),)),
    "batched matmul": (lambda x, w: x.bmm(w), ((B, C, C),)),
    "einsum": (lambda x, w, y: torch.einsum("bnc,dc,bn->bnd", x, w, y), ((C, C), (B, N))),
    "einsum with an ellipsis": (lambda x, w: torch.einsum("...c,cd->...d", x, w), ((C, C),)),
    "zeros_like": (lambda x: torch.zeros_like(x) + x, ()),
}


# Functions whose sizes are written with B are for two rows; the others also run on one.
CASES = [
    (case, batch) for case, (function, _) in TOKEN_WISE.items() for batch in (1, B) if batch == B or "B" not in function.__code__.co_names
]


@pytest.mark.parametrize(("case", "batch"), CASES)
def test_token_wise_operators(case: str, batch: int) -> None:
    function, shapes = TOKEN_WISE[case]
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(batch, N, C, generator=generator)]
    for shape in shapes:
        rows = [batch] if shape[0] == B and len(shape) > 1 else [shape[0]]
        inputs.append(torch.randn(*rows, *shape[1:], generator=generator))
    got, result = pushed(function, *inputs)
    torch.testing.assert_close(got, zeroed(function(*inputs)))
    assert not result.short


def test_squeeze_keeps_an_axis_that_became_one() -> None:
    def one(x: Tensor) -> Tensor:
        return x[..., :1].squeeze() * 2

    x = torch.randn(B, N, C)
    got, _ = pushed(one, x, positions=POSITIONS[:, 2:3])
    torch.testing.assert_close(got, zeroed(one(x), positions=POSITIONS[:, 2:3]))


def _attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return ((q * D**-0.5) @ k.transpose(-2, -1) + bias).softmax(-1) @ v


def _bmm_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    q, k, v = (x.reshape(B * H, N, D) for x in (q * D**-0.5, k, v))
    return torch.baddbmm(bias, q, k.transpose(1, 2)).softmax(-1).bmm(v).view(B, H, N, D)


def _einsum_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    weights = (torch.einsum("bhid,bhjd->bhij", q * D**-0.5, k) + bias).softmax(dim=-1)
    return torch.einsum("bhij,bhjd->bhid", weights, v)


sdpa = F.scaled_dot_product_attention
ATTENTION: dict[str, tuple[Callable[..., Tensor], tuple[int, ...]]] = {
    "eager": (_attention, (B, 1, N, N)),
    "eager, bias of the heads": (_attention, (H, N, N)),
    "eager, bias of keys": (_attention, (B, 1, 1, N)),
    "eager, bias of positions": (_attention, (N, N)),
    "sdpa": (lambda q, k, v, m: sdpa(q, k, v, attn_mask=m), (B, 1, N, N)),
    "sdpa, mask of two axes": (lambda q, k, v, m: sdpa(q, k, v, m), (N, N)),  # noqa: PLW0108
    "sdpa, bool mask of keys": (lambda q, k, v, m: sdpa(q, k, v, m == 0), (B, 1, 1, N)),
    "sdpa, heads in the mask": (lambda q, k, v, m: sdpa(query=q, key=k, value=v, attn_mask=m), (1, H, N, N)),
    "einsum": (_einsum_attention, (H, N, N)),
    "baddbmm on merged heads": (_bmm_attention, (B * H, 1, N)),
}


@pytest.mark.parametrize("case", ATTENTION)
@pytest.mark.parametrize("short", ["qkv", "kv", "k", "q"])
def test_attention_equals_masking_the_dropped_keys(case: str, short: str) -> None:
    function, shape = ATTENTION[case]
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, B, H, N, D, generator=generator)
    mask = torch.randn(shape, generator=generator)
    if "bool" in case:
        mask = torch.zeros(shape)
        mask[1, ..., 4] = -torch.inf
    got, _ = pushed(function, q, k, v, mask, short={"qkv".index(name): 2 for name in short})
    bias = mask.view(B, H, 1, N) if mask.shape[0] == B * H else mask
    hidden = torch.ones(B, N, dtype=torch.bool).scatter(1, POSITIONS, False)[:, None, None, :]
    wanted = _attention(q, k, v, bias.masked_fill(hidden, -torch.inf) if "k" in short else bias)
    torch.testing.assert_close(got, zeroed(wanted, 2) if "q" in short else wanted)


def test_causal_order_is_kept() -> None:
    q, k, v = torch.randn(3, B, H, N, D)
    got, _ = pushed(lambda q, k, v: sdpa(q, k, v, is_causal=True), q, k, v, short={0: 2, 1: 2, 2: 2})
    hidden = torch.ones(B, N, dtype=torch.bool).scatter(1, POSITIONS, False)[:, None, None, :]
    bias = torch.zeros(B, 1, N, N).masked_fill(hidden | torch.ones(N, N, dtype=torch.bool).triu(1), -torch.inf)
    torch.testing.assert_close(got, zeroed(_attention(q, k, v, bias).nan_to_num(), 2))


def test_grouped_heads_in_sdpa() -> None:
    q, k = torch.randn(B, 4, N, D), torch.randn(B, 2, N, D)

    def function(q: Tensor, k: Tensor, m: Tensor) -> Tensor:
        return sdpa(q, k, k, attn_mask=m, enable_gqa=True)

    mask = torch.randn(N, N)
    got, _ = pushed(function, q, k, mask, short={1: 2})
    hidden = torch.ones(B, N, dtype=torch.bool).scatter(1, POSITIONS, False)[:, None, None, :]
    torch.testing.assert_close(got, function(q, k, mask.masked_fill(hidden, -torch.inf)))


def test_maps_that_are_outputs_are_restored_on_both_axes() -> None:
    q, k, v = torch.randn(3, B, H, N, D)
    (weights, _), _ = pushed(lambda q, k, v: ((w := (q @ k.mT).softmax(-1)), w @ v), q, k, v, short={0: 2, 1: 2, 2: 2})
    assert weights.shape == (B, H, N, N)
    torch.testing.assert_close(weights, zeroed(zeroed(weights, 2), 3))
    torch.testing.assert_close(weights.sum(-1), zeroed(torch.ones(B, H, N), 2))


CUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "last token": lambda x: x[:, -1],
    "last token, squeezed": lambda x: x[:, -1:].squeeze(1) + x[:, :1].flatten(0, 1),
    "last tokens": lambda x: x[:, -2:, :],
    "without the first": lambda x: x[..., 1:, :].contiguous(),
    "batch and tokens merged": lambda x: x.view(-1, C) * 2,
    "batch and tokens flattened": lambda x: x.flatten(0, 1).unflatten(0, (B, N)),
    "tokens and features merged": lambda x: x.flatten(1),
    "tokens in two axes": lambda x: x.view(B, 2, 3, C)[:, :, 0],
    "row of the batch": lambda x: x[0],
    "rows of the batch": lambda x: torch.cat([x[1:], x[:1]]),
    "tokens by number": lambda x: x[torch.arange(B), torch.tensor([1, 2])],
    "tokens by mask": lambda x: x[torch.zeros(B, N).bool()],
    "rolled": lambda x: x.roll(1, 1),
    "triangle": lambda x: x.tril(),
    "padded": lambda x: F.pad(x, (0, 0, 1, 0)),
    "chunks of tokens": lambda x: x.chunk(2, 1)[0] - x.split(3, 1)[1],
    "repeated tokens": lambda x: x.repeat(1, 2, 1),
    "cat of rows": lambda x: torch.cat([x, x], 0),
}


@pytest.mark.parametrize("case", CUTS)
def test_cut_axes_are_restored_first(case: str) -> None:
    x = torch.randn(B, N, C)
    got, _ = pushed(CUTS[case], x)
    torch.testing.assert_close(got, CUTS[case](zeroed(x)))


def test_concatenation_along_tokens() -> None:
    past, new, mask = torch.randn(B, H, N, D), torch.randn(B, H, 2, D), torch.randn(B, 1, 1, N + 2)

    def function(past: Tensor, new: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        keys = torch.cat([torch.tensor([]), past, new], dim=-2)
        return keys, (new @ keys.transpose(2, 3) + mask).softmax(-1)

    (keys, weights), result = pushed(function, past, new, mask, short={0: 2}, stay=True)
    assert keys.shape == (B, H, K + 2, D)
    assert weights.shape == (B, H, 2, K + 2)
    (selection,) = set(result.short.values())
    assert (selection.length, selection.kept) == (N + 2, K + 2)
    (keys, weights), _ = pushed(function, past, new, mask, short={0: 2})
    full, _ = function(past, new, mask)
    everything = torch.cat([POSITIONS, torch.tensor([[N, N + 1]] * B)], 1)
    hidden = torch.ones(B, N + 2, dtype=torch.bool).scatter(1, everything, False)[:, None, :, None]
    torch.testing.assert_close(keys, full.masked_fill(hidden, 0))
    wanted = (new @ full.transpose(2, 3) + mask.masked_fill(hidden.transpose(2, 3), -torch.inf)).softmax(-1)
    torch.testing.assert_close(weights, wanted)


def test_an_empty_past_keeps_the_selection() -> None:
    x = torch.randn(B, H, N, D)
    got, result = pushed(lambda x: torch.cat([torch.tensor([]), x], dim=-2), x, short={0: 2}, stay=True)
    assert got.shape[2] == K
    assert next(iter(result.short.values())).positions.op == "placeholder"


def test_axes_names_every_short_node() -> None:
    _, result = pushed(lambda x, y: (x + y).transpose(1, 2) * 2, torch.randn(B, N, C), torch.randn(N, C))
    assert [list(axes) for node, axes in result.axes.items() if node.name in {"add", "transpose", "mul"}] == [[1], [2], [2]]
