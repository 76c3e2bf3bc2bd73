"""The sweep over heads: its scores are those of the pass on each head alone, and it leaves no trace."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch
from torch import nn

from rewrite import (
    Fits,
    HeadSweep,
    NotApplicableError,
    Pass,
    PassError,
    RewriteError,
    Site,
    parameter,
    parse_pass,
    rewrite,
    sweep_heads,
)
from rewrite.ir import H

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from architectures import llava, llava_inputs

LAYERS, HEADS, WIDTH = 2, 3, 24
PAIRS = [(layer, head) for layer in range(LAYERS) for head in range(HEADS)]
# The heads by which the targets of the small model's task are made.
RIGHT = ((0, 0), (1, 1))


@dataclass(frozen=True)
class Sharpened(Pass):
    """The scores of the listed heads, times three. Not registered: a sweep is not tied to passes by name."""

    name, family, paper, formula = "sharpened", "redistribute", "none", "softmax(3 score) in the listed heads"
    fits = Fits(causal=True)

    heads: tuple[tuple[int, int], ...] = parameter((), "(layer, head)")
    layers: tuple[int, ...] = parameter((0, 1), "where to work")

    def declines(self, site: Site) -> str | None:
        return None if any(layer == site.layer for layer, _ in self.heads if layer in self.layers) else "none of its heads is listed"

    def transform(self, site: Site) -> Site:
        listed = sympy.Or(*(sympy.Eq(H, head) for layer, head in self.heads if layer == site.layer))
        return site.with_operations(replace(site.attend, score=site.attend.score * sympy.Piecewise((3, listed), (1, True))))


class Layer(nn.Module):
    """Causal attention and a residual. By hand, the scores of the heads listed are multiplied by three."""

    def __init__(self, sharpened: tuple[int, ...]) -> None:
        super().__init__()
        self.linear, self.drop, self.sharpened = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Dropout(0.5), sharpened
        nn.init.normal_(self.linear.weight, std=0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.linear(x).unflatten(-1, (3, HEADS, WIDTH // HEADS)).permute(2, 0, 3, 1, 4)
        if self.sharpened:
            factor = torch.tensor([3.0 if head in self.sharpened else 1.0 for head in range(HEADS)])
            query = query * factor[:, None, None].to(query)
        scores = query @ key.mT / (WIDTH // HEADS) ** 0.5
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        heads = scores.masked_fill(later, -torch.inf).softmax(-1) @ value
        return x + self.drop(heads.transpose(1, 2).flatten(2))


class Small(nn.Module):
    """Two layers; broken: a graph ends between them."""

    def __init__(self, sharpened: tuple[tuple[int, int], ...] = (), broken: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second = (Layer(tuple(head for of, head in sharpened if of == layer)) for layer in range(LAYERS))
        self.register_buffer("calls", torch.zeros(()))
        self.broken = broken

    def forward(self, x: torch.Tensor, target: torch.Tensor | None = None) -> torch.Tensor:
        self.calls += 1
        x = self.first(x)
        if self.broken:
            torch._dynamo.graph_break()
        return self.second(x)


def nearness(output: torch.Tensor, inputs: Any) -> torch.Tensor:
    """Per row, how near the output is to the target."""
    target = inputs["target"] if isinstance(inputs, dict) else inputs[1]
    return -(output - target).double().square().mean((1, 2))


def task() -> list[dict[str, torch.Tensor]]:
    """Batches of unequal size and length; targets are what the model computes with the right heads sharpened, by hand."""
    generator, oracle = torch.Generator().manual_seed(5), Small(RIGHT).eval()
    samples = []
    for batch, length in ((2, 9), (1, 12), (3, 7)):
        x = torch.randn(batch, length, WIDTH, generator=generator)
        samples.append({"x": x, "target": oracle(x).detach()})
    return samples


def rows_by_hand(heads: tuple[tuple[int, int], ...]) -> list[torch.Tensor]:
    """The scores of the task's rows, batch by batch, in float64."""
    model = Small(heads).double().eval()
    with torch.no_grad():
        return [nearness(model(each["x"].double()), each) for each in task()]


def by_hand(heads: tuple[tuple[int, int], ...]) -> float:
    return float(torch.cat(rows_by_hand(heads)).mean())


class Shuffled:
    """A loader with an order of its own each time."""

    def __init__(self, samples: list[Any]) -> None:
        self.samples, self.generator = samples, torch.Generator().manual_seed(1)

    def __iter__(self) -> Iterator[Any]:
        return iter([self.samples[place] for place in torch.randperm(len(self.samples), generator=self.generator)])


@pytest.mark.parametrize("broken", [False, True], ids=["one graph", "a graph for each layer"])
def test_scores_are_those_of_the_method_by_hand(broken: bool) -> None:
    measured = PAIRS[:1] + PAIRS[-2:] if broken else PAIRS
    found = sweep_heads(Small(broken=broken), Sharpened, Shuffled(task()), nearness, heads=measured if broken else None, progress=False)
    expected = {head: by_hand((head,)) for head in measured}
    assert list(found.scores) == measured
    assert found.samples == 6
    # float32 against float64, two layers.
    assert found.baseline == pytest.approx(by_hand(()), rel=1e-4)
    assert dict(found.scores) == pytest.approx(expected, rel=1e-4)
    # By hand too the right heads gain, and no other one.
    assert {head for head in measured if expected[head] > by_hand(())} == set(RIGHT)
    assert found.kept == RIGHT
    assert found.setting == Sharpened(heads=RIGHT)


def test_a_margin_asks_for_more() -> None:
    gains = {head: by_hand((head,)) - by_hand(()) for head in RIGHT}
    assert 0 < gains[1, 1] < 0.2 < gains[0, 0]
    found = sweep_heads(Small(), Sharpened(), task(), nearness, heads=RIGHT, margin=0.2, progress=False)
    assert found.kept == ((0, 0),)
    assert found.setting == Sharpened(heads=((0, 0),))


def test_calibrate_on_a_llava_as_rewrite_would() -> None:
    model, text = llava("sdpa", layers=2, vision_layers=1), "calibrate(layers=None, threshold=0.05)"
    inputs = llava_inputs()

    def score(output: Any, inputs: Any) -> torch.Tensor:
        return output.logits[:, -1, 3]

    found = sweep_heads(model, text, [inputs], score, progress=False)
    assert list(found.scores) == [(layer, head) for layer in range(2) for head in range(4)]  # of the language model, not of the tower
    setting = parse_pass(text)
    changed = rewrite(model, [replace(setting, heads=((0, 3),))], example_inputs=inputs)  # type: ignore[call-arg]
    with torch.no_grad():
        before, after = (float(score(each(**inputs), inputs).mean()) for each in (model, changed))
    assert abs(after - before) > 1e-3
    assert (found.baseline, found.scores[0, 3]) == pytest.approx((before, after), rel=1e-5)
    assert 0 < len(found.kept) < 8
    assert parse_pass(str(found.setting)) == found.setting == replace(setting, heads=found.kept)  # type: ignore[call-arg]


def test_the_model_is_left_as_it_was_and_the_result_is_repeatable() -> None:
    model, samples = Small(), task()
    model.train()
    model.second.eval()
    before = copy.deepcopy(model.state_dict()), {name: one.training for name, one in model.named_modules()}, set(vars(model))
    pointers = [one.data_ptr() for one in (*model.parameters(), *model.buffers())]
    random = torch.get_rng_state()
    loader = torch.utils.data.DataLoader(samples, batch_size=None, shuffle=True)
    first, second = (sweep_heads(model, Sharpened, loader, nearness, layers=[1], progress=False) for _ in range(2))
    assert first == second
    assert torch.equal(torch.get_rng_state(), random)
    assert {name: one.training for name, one in model.named_modules()} == before[1]
    assert set(vars(model)) == before[2]
    assert [one.data_ptr() for one in (*model.parameters(), *model.buffers())] == pointers
    assert all(torch.equal(value, before[0][name]) for name, value in model.state_dict().items())
    assert all(one.grad is None and one.requires_grad for one in model.parameters())

    def fails(output: Any, inputs: Any) -> float:
        raise KeyError("answer")

    with pytest.raises(KeyError, match="answer"):
        sweep_heads(model, Sharpened, samples, fails, progress=False)
    assert {name: one.training for name, one in model.named_modules()} == before[1]
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[0][name]) for name, value in model.state_dict().items())


def test_which_heads_are_measured_and_how_values_count(capsys: pytest.CaptureFixture[str]) -> None:
    samples = [(each["x"], each["target"]) for each in task()]

    def mean(output: torch.Tensor, inputs: Any) -> float:
        return float(nearness(output, inputs).mean())

    of_rows = sweep_heads(Small(), Sharpened, iter(samples), nearness, heads=[(1, 2), (0, 1)], progress=False)
    assert list(of_rows.scores) == [(0, 1), (1, 2)]
    assert of_rows.samples == 6
    assert not "".join(capsys.readouterr())
    of_batches = sweep_heads(Small(), lambda heads: Sharpened(heads=heads, layers=(1,)), samples, mean)
    assert list(of_batches.scores) == [(1, 0), (1, 1), (1, 2)]  # the pass declines the other layer
    assert of_batches.samples == 3
    out, err = capsys.readouterr()
    assert not out
    assert "sharpened" in err
    # Batches of 2, 1 and 3 rows: a mean of means is another one.
    expected = sum(float(rows.mean()) for rows in rows_by_hand(((1, 2),))) / 3
    assert of_batches.scores[1, 2] == pytest.approx(expected, rel=1e-4)
    assert of_rows.scores[1, 2] == pytest.approx(by_hand(((1, 2),)), rel=1e-4)
    assert abs(expected / by_hand(((1, 2),)) - 1) > 1e-2


def test_nothing_is_kept_where_nothing_gains() -> None:
    found = HeadSweep("sharpened", 0.5, {(0, 0): 0.5, (0, 1): 0.25, (2, 0): 0.4}, 10, 0.0, None)
    assert found.kept == ()
    assert "0 of 3 heads kept" in str(found)
    assert "setting" not in str(found)


def test_printed() -> None:
    found = HeadSweep("sharpened", 0.5, {(0, 0): 0.75, (0, 1): 0.25, (2, 4): 0.625}, 10, 0.1, Sharpened(heads=((0, 0), (2, 4))))
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in str(found).splitlines() if line.startswith("│")]
    assert rows == [["0", "0", "0: +0.25  1: -0.25"], ["2", "4", "4: +0.125"]]
    assert "baseline 0.5 over 10 samples" in str(found)
    assert "2 of 3 heads kept, which gain more than 0.1" in str(found)
    assert "setting: sharpened(heads=((0, 0), (2, 4)))" in str(found)


@dataclass(frozen=True)
class Adding(Sharpened):
    def adds_parameters(self) -> bool:
        return True


@dataclass(frozen=True)
class Flat(Sharpened):
    heads: tuple[int, ...] = parameter((), "head")  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("method", "error", "match"),
    [
        ("calibrte", PassError, "no pass named 'calibrte'; did you mean calibrate"),
        ("calibrate(bta=1)", PassError, "calibrate has no parameter 'bta'"),
        ("temperature", PassError, "temperature takes no heads.*passes that do: calibrate"),
        ("calibrate(heads=[(0, 1)])", PassError, "lists heads already"),
        (Sharpened(heads=((0, 1),)), PassError, "lists heads already"),
        (Flat, PassError, "heads=.*is of type tuple; it must be"),
        (Adding, PassError, "adds parameters"),
        (dict, PassError, "makes a dict"),
        (parse_pass, PassError, "makes no pass of heads"),
        (7, PassError, "7 is neither a pass nor its name"),
    ],
)
def test_a_pass_that_cannot_be_swept(method: Any, error: type[Exception], match: str) -> None:
    model, runs = counting()
    with pytest.raises(error, match=match):
        sweep_heads(model, method, task(), nearness, progress=False)
    assert not runs


def counting() -> tuple[nn.Module, list[int]]:
    model, runs = Small(), list[int]()
    model.register_forward_pre_hook(lambda module, arguments: runs.append(1))
    return model, runs


def test_other_arguments_that_do_not_fit() -> None:
    model, runs = counting()

    def refused(error: type[Exception], match: str, given: Any = model, loader: Any = None, **options: Any) -> None:
        with pytest.raises(error, match=match):
            sweep_heads(given, Sharpened, task() if loader is None else loader, nearness, progress=False, **options)

    refused(TypeError, "takes an nn.Module, not int", given=7)
    refused(RewriteError, "the loader gives no samples", loader=[])
    refused(RewriteError, "the loader gives no samples", loader=iter(()))
    refused(TypeError, "a tuple or a mapping of keyword arguments, not Tensor", loader=[torch.zeros(1, 4, WIDTH)])
    refused(RewriteError, "margin=nan", margin=float("nan"))
    assert not runs
    changed = rewrite(Small().eval(), [Sharpened(heads=RIGHT)], example_inputs=task()[0])
    refused(RewriteError, "rewritten already", given=changed)
    refused(RewriteError, "rewritten already", given=nn.Sequential(changed))


def test_heads_that_the_pass_does_not_rewrite() -> None:
    for options, match in (
        ({"heads": [(0, 1), (1, 3)]}, r"sharpened does not rewrite heads \(1, 3\) of the 6 there are"),
        ({"layers": [5]}, r"any head of the layers \[5\].*there are no such heads"),
    ):
        with pytest.raises(NotApplicableError, match=match):
            sweep_heads(Small(), Sharpened, task(), nearness, progress=False, **options)  # type: ignore[arg-type]
    with pytest.raises(NotApplicableError, match=r"calibrate does not rewrite any head of the 6 there are: .*it is layer 0"):
        sweep_heads(Small(), "calibrate", task(), nearness, progress=False)


@pytest.mark.parametrize(
    ("score", "error", "match"),
    [
        (lambda output, inputs: None, TypeError, "score returns a number or a tensor of one per sample, not NoneType"),
        (lambda output, inputs: float("nan"), RewriteError, "score gave nan for entry 0"),
        (lambda output, inputs: output[:0], RewriteError, "of one value at least"),
    ],
)
def test_scores_that_cannot_be_compared(score: Callable[..., Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        sweep_heads(Small(), Sharpened, task(), score, progress=False)


def test_a_loader_that_loses_samples() -> None:
    class Losing:
        samples = task()

        def __iter__(self) -> Iterator[Any]:
            yield from self.samples
            self.samples = self.samples[:1]

    loader = Losing()
    with pytest.raises(RewriteError, match=r"gave 6 values for the model as it is, and 2 with sharpened\(heads=\(\(0, 0\),\)\)"):
        sweep_heads(Small(), Sharpened, loader, nearness, progress=False)
