"""Models that no table knows: two that spell attention unusually, and three of timm's that the corpus lacks.

Nothing in the compiler was written for them. Each is recognised whole, and computes the same when every site is lowered as it was read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from rewrite import rewrite
from tests.models.corpus.cases import ENTRIES
from tests.models.corpus.entry import Entry
from tests.models.corpus.survey import survey
from tests.models.corpus.training import backward, tensors, without_chance
from tests.models.corpus.weights import settle, stir
from tests.models.test_corpus import EPSILON, AsItIs

WIDTH, HEADS, SHARED, TOKENS = 96, 6, 3, 20


class Grouped(nn.Module):
    """Causal attention with ALiBi slopes; query heads on two axes, exponentials and their sum written out by hand."""

    def __init__(self) -> None:
        super().__init__()
        size = WIDTH // HEADS
        self.query = nn.Parameter(torch.randn(WIDTH, HEADS // SHARED, SHARED, size))
        self.key = nn.Parameter(torch.randn(WIDTH, HEADS // SHARED, size))
        self.value = nn.Parameter(torch.randn(WIDTH, HEADS // SHARED, size))
        self.out = nn.Parameter(torch.randn(HEADS // SHARED, SHARED, size, WIDTH))
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=WIDTH**-0.5)
        self.register_buffer("slopes", 2.0 ** -torch.arange(1, HEADS + 1).view(HEADS // SHARED, SHARED))

    def forward(self, x: Tensor) -> Tensor:
        query = torch.einsum("bnc,cgrd->bngrd", x, self.query) / self.query.shape[-1] ** 0.5
        key, value = torch.einsum("bnc,cgd->bngd", x, self.key), torch.einsum("bnc,cgd->bngd", x, self.value)
        places = torch.arange(x.shape[1])
        behind = places[:, None] - places[None, :]
        scores = torch.einsum("bigrd,bjgd->bgrij", query, key) - self.slopes[:, :, None, None] * behind
        scores = scores.masked_fill(behind < 0, float("-inf"))
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        mixed = torch.einsum("bgrij,bjgd->bigrd", weights / weights.sum(-1, keepdim=True), value)
        return torch.einsum("bigrd,grdc->bic", mixed, self.out)


class Transposed(nn.Module):
    """Channels first, projections by one convolution, and scores whose rows are the keys: the softmax runs down the columns."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(WIDTH)
        self.projections = nn.Conv2d(WIDTH, 3 * WIDTH, 1)
        self.positions = nn.Parameter(torch.randn(HEADS, TOKENS, TOKENS))
        self.out = nn.Conv2d(WIDTH, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, width, height, breadth = x.shape
        parts = self.projections(self.norm(x)).chunk(3, dim=1)
        query, key, value = (part.reshape(batch * HEADS, width // HEADS, height * breadth) for part in parts)
        positions = self.positions.repeat(batch, 1, 1)
        scores = torch.baddbmm(positions, key.transpose(-2, -1), query, beta=1.0, alpha=(width // HEADS) ** -0.5)
        mixed = torch.bmm(value, scores.softmax(dim=-2))
        return self.out(mixed.view(batch, width, height, breadth))


class Stack(nn.Module):
    """Residual layers."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def stack(layer: Callable[[], nn.Module]) -> Callable[[str], nn.Module]:
    def build(_: str) -> nn.Module:
        torch.manual_seed(0)
        return Stack([layer(), layer()]).eval()

    return build


def timm_model(name: str, size: int) -> Callable[[str], nn.Module]:
    def build(_: str) -> nn.Module:
        import timm

        torch.manual_seed(0)
        model = settle(stir(timm.create_model(name).eval()), pictures(size)(2))
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False
        return model

    return build


def pictures(size: int) -> Callable[[int], Mapping[str, Tensor]]:
    return lambda batch: {"x": torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))}


def numbers(*shape: int) -> Callable[[int], Mapping[str, Tensor]]:
    return lambda batch: {"x": torch.randn(batch, *shape, generator=torch.Generator().manual_seed(1))}


@dataclass(frozen=True)
class Outsider:
    """A model, the class of its modules that are an attention each, how many there are, and words that the text of each contains."""

    entry: Entry
    module: str
    sites: int
    says: str = "softmax"
    causal: bool = False


OUTSIDERS = (
    Outsider(Entry("grouped", stack(Grouped), numbers(TOKENS, WIDTH)), "Grouped", 2, "where=", causal=True),
    Outsider(Entry("transposed", stack(Transposed), numbers(WIDTH, 4, 5)), "Transposed", 2, "bias"),
    Outsider(Entry("sebotnet33ts_256", timm_model("sebotnet33ts_256", 256), pictures(256)), "BottleneckAttn", 4, "bias"),
    Outsider(Entry("pit_xs_distilled_224", timm_model("pit_xs_distilled_224", 224), pictures(224)), "Attention", 12),
    Outsider(Entry("mobilevit_xs", timm_model("mobilevit_xs", 256), pictures(256)), "Attention", 9),
)

each = pytest.mark.parametrize("outsider", OUTSIDERS, ids=lambda outsider: outsider.entry.name)


@each
@pytest.mark.parametrize("batch", [1, 2])
def test_every_site_is_recognised(outsider: Outsider, batch: int) -> None:
    seen = survey(outsider.entry, "", batch)
    calls = sum(type(module).__name__ == outsider.module for module in outsider.entry.build("").modules())
    assert calls == outsider.sites
    assert len(seen.found) == outsider.sites, [miss.reason for miss in seen.misses]
    assert not seen.misses
    assert all(outsider.says in str(site.attend) for site in seen.sites), [str(site.attend) for site in seen.sites]
    assert all(site.causal == outsider.causal for site in seen.sites)
    assert {site.kind for site in seen.sites} == {"self"}


@each
def test_outputs_and_gradients_are_the_models_own(outsider: Outsider) -> None:
    model, inputs = without_chance(outsider.entry.build("")), dict(outsider.entry.inputs(2))
    changed = rewrite(model, [AsItIs()], example_inputs=inputs)
    assert changed.rewrite_report.counts()["rewritten"] == outsider.sites
    (expected,), (actual,) = ([*tensors(each(**inputs))] for each in (model, changed))
    assert (actual - expected).abs().max() <= 256 * outsider.sites * EPSILON * expected.abs().max()
    for output in (expected, actual):
        backward([output])
    largest = max(parameter.grad.abs().max() for parameter in model.parameters() if parameter.grad is not None)
    theirs = dict(model.named_parameters())
    for name, parameter in changed.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad - theirs[name].grad).abs().max() <= 256 * outsider.sites * EPSILON * largest, name


def test_the_corpus_has_none_of_them() -> None:
    assert not {outsider.entry.name for outsider in OUTSIDERS} & {entry.name for entry in ENTRIES}
