"""FlexAttention: score and mask functions read as expressions, proved, and lowered as read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from capture import Capture, relowered
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from rewrite.recognise.regions import find_regions
from rewrite.recognise.verify import structure
from rewrite.recognise.writes import overwritten, remaining_writes

B, H, N, D = 2, 4, 7, 8
SCALE = "0.353553390593274*qk"

bias = torch.randn(H, N, N)
table = torch.randn(2 * N - 1)
slopes = torch.rand(H)
document = torch.tensor([0, 0, 0, 1, 1, 1, 1])
prefix = torch.tensor([3, 4])
visible = torch.rand(B, N) < 0.7
visible[:, 0] = True
offset = torch.tensor(2)
grid = torch.randn(H, N, 3)


class Flex(nn.Module):
    """A FlexAttention call on its inputs."""

    def __init__(self, score: Any = None, mask: Any = None, shared: int = H, keys: int = N, **options: Any) -> None:
        super().__init__()
        self.score, self.options, self.shared, self.keys = score, options, shared, keys
        self.blocks: BlockMask | None = None if mask is None else create_block_mask(mask, B, H, N, keys, device="cpu")

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        return flex_attention(q, k, v, self.score, self.blocks, enable_gqa=self.shared != H, **self.options)

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return torch.randn(B, H, N, D), torch.randn(B, self.shared, self.keys, D), torch.randn(B, self.shared, self.keys, D)


def causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return i >= j


def documents(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return document[i] == document[j]


def window(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return (i - j <= 2) & (j - i <= 2)


def prefix_language(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return (j < prefix[b]) | (i >= j)


def rows_of_a_grid(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return (i // 3 == j // 3) | (i % 3 == j % 3)


def padded(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return visible[b, j] & ~(i + offset < j)


def soft_cap(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return 20.0 * torch.tanh(s / 20.0)


def relative(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return s + bias[h, i, j]


def by_difference(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return s + table[i - j + N - 1]


def alibi(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return s + slopes[h] * (j - i)


def computed_alibi(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return s - torch.exp2(-((h + 1) * 8.0 / H)) * (i - j).abs()


def hidden_by_score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return torch.where(i >= j, s * 2 + 1, -float("inf")) + 1


def read_twice(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return s + grid[h, i, j // 3] - grid[h][j][i % 3]


def clamped(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return torch.sigmoid(s) * (i - j).clamp(min=-2, max=2) + torch.maximum(s, table[j])


@dataclass(frozen=True)
class Case:
    name: str
    make: Callable[[], Flex]
    text: tuple[str, ...] = ()
    dims: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("plain", Flex, (f"softmax({SCALE})",)),
    Case("scaled", lambda: Flex(scale=0.25), ("softmax(0.25*qk)",)),
    Case("causal", lambda: Flex(mask=causal), (f"softmax({SCALE}, where=i >= j)",)),
    Case("relative", lambda: Flex(relative), (f"{SCALE} + bias0[h, i, j]",)),
    Case("by_difference", lambda: Flex(by_difference), (f"bias0[i - j + {N - 1}]",)),
    Case("alibi", lambda: Flex(alibi), ("(-i + j)*bias0[h]",)),
    Case("computed_alibi", lambda: Flex(computed_alibi), ("Abs(i - j)", "exp(")),
    Case("soft_cap", lambda: Flex(soft_cap, causal), ("20.0*tanh(", "where=i >= j")),
    Case("documents", lambda: Flex(mask=documents), ("Eq(index0[i], index1[j])",)),
    Case("window", lambda: Flex(mask=window), ("where=",)),
    Case("prefix_language", lambda: Flex(mask=prefix_language), ("(i >= j) | (j < index0[b])",)),
    Case("rows_of_a_grid", lambda: Flex(mask=rows_of_a_grid), ("Eq(Mod(i, 3), Mod(j, 3))", "floor(i/3)")),
    Case("padded", lambda: Flex(mask=padded), ("Ne(mask", "[b, j]")),
    Case("hidden_by_score", lambda: Flex(hidden_by_score), ("where=i >= j",)),
    Case("read_twice", lambda: Flex(read_twice), ("[h, i, floor(j/3)]", "[h, j, Mod(i, 3)]")),
    Case("clamped", lambda: Flex(clamped), ("Max(", f"[Min({2 * N - 2}, j)]")),
    Case("shared_heads", lambda: Flex(relative, causal, shared=2), ("bias0[h, i, j]",), {"Hkv": 2}),
    Case("one_shared_head", lambda: Flex(shared=1), (), {"Hkv": 1}),
    Case("cross", lambda: Flex(keys=5), (), {"Nk": 5}),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_is_read_and_lowered_as_read(case: Case) -> None:
    model = case.make()
    inputs = model.inputs()
    with torch.no_grad():
        expected = model(*inputs)
    actual, capture = relowered(model, *inputs)
    assert capture.recognition.misses == []
    assert capture.proofs == [None]
    (found,) = capture.recognition.found
    assert found.site.dims.items() >= ({"B": B, "H": H, "Hkv": H, "Nq": N, "Nk": N, "D": D, "Dv": D} | case.dims).items()
    for text in case.text:
        assert text in str(found.region.attend)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1.2e-7 * (64 + D + N) * expected.abs().max().item())


# A scale that is given becomes a symbol of the trace too, and is then no number; a table that is longer than the keys, by how much.
@pytest.mark.parametrize("case", [case for case in CASES if case.name not in ("scaled", "clamped")], ids=str)
def test_is_read_where_sizes_are_symbolic(case: Case) -> None:
    model, capture = case.make(), Capture()
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=capture, fullgraph=True, dynamic=True)(*model.inputs())
    assert capture.recognition.misses == []
    (found,) = capture.recognition.found
    for text in case.text:
        assert text in str(found.region.attend)


def test_reading_how_it_was_weighted_is_told() -> None:
    from torch.nn.attention.flex_attention import AuxRequest

    class Both(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
            out, aux = flex_attention(q, k, v, return_aux=AuxRequest(lse=True))
            return out, aux.lse

    model, inputs = Both(), Flex().inputs()
    with torch.no_grad():
        expected = model(*inputs)
    actual, capture = relowered(model, *inputs)
    (found,) = capture.recognition.found
    assert found.site.map_read
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def made_in_the_graph(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    blocks = create_block_mask(causal, None, None, q.shape[2], k.shape[2], device="cpu")
    return flex_attention(q, k, v, soft_cap, blocks)


def test_a_mask_made_in_the_graph() -> None:
    class Inside(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return made_in_the_graph(q, k, v)

    model, inputs = Inside(), Flex().inputs()
    with torch.no_grad():
        expected = model(*inputs)
    actual, capture = relowered(model, *inputs)
    (found,) = capture.recognition.found
    assert "where=i >= j" in str(found.region.attend)
    assert overwritten(found.region, remaining_writes(capture.graphs[0].graph)) is None
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def sine(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return s + torch.sin(i)


def by_content(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return s + table[document[i]]


def capped_infinity(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return torch.tanh(torch.where(i >= j, s, -float("inf")))


def blocks_alone() -> Flex:
    model = Flex()
    model.blocks = BlockMask.from_kv_blocks(
        torch.ones(1, 1, 1, dtype=torch.int32), torch.zeros(1, 1, 1, 1, dtype=torch.int32), seq_lengths=(N, N)
    )
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Flex(sine), "its functions use sin, which is not read"),
        (lambda: Flex(by_content), "an index is an integer expression in b, h, i, j, Nq and Nk"),
        (lambda: Flex(capped_infinity), "compute on with minus infinity (tanh)"),
        (blocks_alone, "its list of blocks may leave out pairs"),
    ],
)
def test_what_is_not_read_is_told(make: Callable[[], Flex], reason: str) -> None:
    model = make()
    _, capture = relowered(model, *model.inputs())
    (miss,) = capture.recognition.misses
    assert reason in miss.reason
    assert capture.recognition.found == []


def test_equal_expressions_of_other_functions_are_proved_apart() -> None:
    class Two(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return flex_attention(flex_attention(q, k, v, soft_cap), k, v, lambda s, b, h, i, j: torch.tanh(s / 20.0) * 20.0)

    _, capture = relowered(Two(), *Flex().inputs())
    regions = [entry.region for entry in capture.recognition.found]
    assert len(regions) == 2
    assert regions[0].attend == regions[1].attend
    assert structure(regions[0]) != structure(regions[1])


def test_blocks_are_no_part_of_the_region() -> None:
    _, capture = relowered(Flex(), *Flex().inputs())
    assert find_regions(capture.graphs[0].graph) == ([], [])
