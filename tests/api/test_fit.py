"""`fit`: what passes added is trained, and nothing else; from the same seed the same, whether or not it was interrupted."""

from __future__ import annotations

import copy
import functools
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from rewrite import FittingError, fit, load, rewrite
from tests.api.small import images, run, vit

LEARNABLE = "agent(tokens=9, learnable=True)"
SPARSE = "sparsifiner(keep=0.4, reduce_tokens=2)"


class Plain(nn.Module):
    """An attention in no module of its own, in a model whose `forward` takes one tensor and which returns no logits."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Conv2d(3, width, 16, 16)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, 4)

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = self.patches(pixels).flatten(2).transpose(1, 2)
        batch, count, width = tokens.shape
        query, key, value = self.qkv(tokens).view(batch, count, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(batch, count, width)
        return mixed, self.out(mixed.mean(1))


@functools.cache
def rewritten_once(model: Callable[[], nn.Module], text: str) -> nn.Module:
    return rewrite(model(), [text], example_inputs=(images(),))


def rewritten(text: str = LEARNABLE, model: Callable[[], nn.Module] = vit) -> nn.Module:
    return copy.deepcopy(rewritten_once(model, text))


def plain() -> nn.Module:
    return rewritten(model=Plain)


def added(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if name.startswith("rewrite_added.")}


def shuffled(generator: torch.Generator | None = None) -> DataLoader[Any]:
    """Seven images in batches of two, so that the last one is smaller; the labels have no place in the call."""
    return DataLoader(TensorDataset(images(7), torch.arange(7) % 2), batch_size=2, shuffle=True, generator=generator)


def pictures(batch: Any) -> Any:
    return batch[0]


def noisy(batch: Any) -> Any:
    """Another input in each step, from torch's random state."""
    return batch[0] + 0.1 * torch.randn_like(batch[0])


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_only_what_was_added_is_trained_and_it_comes_closer() -> None:
    original, changed, inputs = vit().train(), rewritten(), images()
    state = {name: value.clone() for name, value in changed.state_dict().items()}
    required = {name: parameter.requires_grad for name, parameter in changed.named_parameters()}
    before, random = run(changed, inputs), torch.get_rng_state()
    changed.train()
    assert fit(original, changed, [{"pixel_values": inputs}], steps=(12, 12), learning_rate=0.03, progress=False) is changed
    assert torch.equal(torch.get_rng_state(), random)
    assert original.training
    assert changed.training
    assert same(dict(original.state_dict()), dict(vit().state_dict()))
    for name, value in changed.state_dict().items():
        assert torch.equal(value, state[name]) is not name.startswith("rewrite_added."), name
    assert {name: parameter.requires_grad for name, parameter in changed.named_parameters()} == required
    assert all(parameter.grad is None for model in (original, changed) for parameter in model.parameters())
    wanted = run(original.eval(), inputs)
    assert (run(changed.eval(), inputs) - wanted).norm() < 0.5 * (before - wanted).norm()
    fitting = changed.rewrite_report.fitting
    assert all(last < first for first, last in fitting.sites.values())
    assert len(fitting.sites) == 2
    assert fitting.losses[-1] < fitting.losses[0]
    assert "fitted: 2 sites" in str(changed.rewrite_report)


def test_every_site_has_the_operands_of_the_original() -> None:
    """A site's loss is what it is where it alone is rewritten: nothing of the other sites' rewriting reaches it."""
    original, data = vit(), [images()]
    whole, alone = rewritten(), rewritten("agent(tokens=9, learnable=True, layers=[1])")
    for model in (whole, alone):
        fit(original, model, data, steps=(1, 0), progress=False)
    sites = whole.rewrite_report.fitting.sites
    [(name, losses)] = alone.rewrite_report.fitting.sites.items()
    assert sites[name] == losses
    assert min(first for first, _ in sites.values()) > 0.01


def test_a_map_is_fitted_where_no_gradient_of_the_output_goes() -> None:
    changed = rewritten(SPARSE)
    trained, before = rewritten(SPARSE), added(changed)
    fit(vit(), trained, [images()], steps=(30, 5), progress=False)
    fitting = trained.rewrite_report.fitting
    assert all(last < 0.9 * first for first, last in fitting.sites.values())
    # The model's own loss reaches none of them.
    assert fitting.losses == ()
    assert all(not torch.equal(value, before[name]) for name, value in added(trained).items())


def test_interrupted_and_resumed_is_bitwise_the_same(tmp_path: Path) -> None:
    class InterruptedRunError(Exception):
        pass

    class Breaking:
        """A loader that breaks off at its n-th batch."""

        def __init__(self, last: int) -> None:
            self.left, self.loader = last, shuffled(torch.Generator())

        @property
        def generator(self) -> Any:
            return self.loader.generator

        def __iter__(self) -> Iterator[Any]:
            for batch in self.loader:
                if not self.left:
                    raise InterruptedRunError
                self.left -= 1
                yield batch

    original, settings = Plain(), {"steps": (5, 5), "inputs": noisy, "checkpoint_every": 2, "progress": False}
    straight = fit(original, plain(), shuffled(torch.Generator().manual_seed(8)), seed=3, **settings)
    again = shuffled(torch.Generator())
    # The first batch is looked at once more, in every run.
    for last in (1 + 4, 4 + 1 + 3):
        with pytest.raises(InterruptedRunError):
            fit(original, plain(), Breaking(last), seed=3, checkpoint=tmp_path, **settings)
    resumed = fit(original, plain(), again, seed=3, checkpoint=tmp_path, **settings)
    assert same(added(resumed), added(straight))
    assert resumed.rewrite_report.fitting == straight.rewrite_report.fitting
    assert same(added(load(original, tmp_path, (images(),))), added(straight))
    assert not same(added(fit(original, plain(), again, seed=4, **settings)), added(straight))
    # A run that is done is read and not trained again; another run's checkpoint is refused.
    assert same(added(fit(original, plain(), [images()], seed=3, checkpoint=tmp_path, **{**settings, "inputs": None})), added(straight))
    with pytest.raises(FittingError, match=r"seed=3, and this one has 4"):
        fit(original, plain(), again, seed=4, checkpoint=tmp_path, **settings)


def test_mixed_precision() -> None:
    def fitted(dtype: torch.dtype | None) -> nn.Module:
        return fit(Plain(), plain(), [images()], steps=(3, 3), dtype=dtype, progress=False)

    [(wanted, _)] = fitted(None).rewrite_report.fitting.sites.values()
    for dtype in (torch.bfloat16, torch.float16):
        model = fitted(dtype)
        [(actual, _)] = model.rewrite_report.fitting.sites.values()
        assert actual != wanted
        assert actual == pytest.approx(wanted, rel=8 * torch.finfo(dtype).eps)
        assert not same(added(model), added(plain()))
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_a_loss_of_the_users_own() -> None:
    seen = []

    def by_label(output: Any, wanted: Any, batch: Any) -> torch.Tensor:
        seen.append((tuple(output.logits.shape), tuple(wanted.logits.shape)))
        return functional.cross_entropy(output.logits, batch[1])

    data = [(images(), torch.tensor([0, 1]))]
    changed = fit(vit(), rewritten(), data, steps=(0, 8), loss=by_label, inputs=pictures, progress=False)
    losses = changed.rewrite_report.fitting.losses
    assert seen == [((2, 2), (2, 2))] * 8
    assert losses[-1] < losses[0]
    assert changed.rewrite_report.fitting.sites == {}


def test_a_model_without_logits_and_a_loader_with_labels() -> None:
    changed = fit(Plain(), plain(), iter(list(shuffled())), steps=(3, 6), progress=False)
    losses = changed.rewrite_report.fitting.losses
    assert len(losses) == 6
    assert losses[4] < losses[0]  # the same batch again


def test_what_cannot_be_fitted() -> None:
    original, data = Plain(), [images()]
    with pytest.raises(FittingError, match=r"none of the passes \(window\(window=8\)\) adds parameters"):
        fit(original, rewrite(original, ["window(window=8)"], example_inputs=(images(),)), data)
    with pytest.raises(FittingError, match="was not rewritten"):
        fit(original, original, data)
    with pytest.raises(FittingError, match="takes the model as it was before"):
        fit(plain(), plain(), data)
    with pytest.raises(FittingError, match=r"different architectures: .*is .* in the original, .* in the rewritten"):
        fit(vit(), plain(), data)
    with pytest.raises(FittingError, match="gives no batches"):
        fit(original, plain(), [], progress=False)
    with pytest.raises(FittingError, match="steps=0"):
        fit(original, plain(), data, steps=0)
    with pytest.raises(TypeError, match="the loader gives a int"):
        fit(original, plain(), [1], progress=False)


def test_a_loss_that_is_not_finite_stops_at_the_site_and_the_step() -> None:
    changed, broken = plain(), images()
    broken[0, 0, 0, 0] = torch.nan
    with pytest.raises(FittingError, match=r"the model: the loss is nan at step 2 of fitting site by site"):
        fit(Plain(), changed, [images(), images(seed=2), broken], steps=5, progress=False)
    assert all(value.isfinite().all() for value in added(changed).values())
    assert not same(added(changed), added(plain()))
    with pytest.raises(FittingError, match="the model's output: the loss is inf at step 0 of fitting end to end"):
        fit(Plain(), plain(), [images()], steps=(0, 1), loss=lambda output, *_: output[1].sum() + torch.inf, progress=False)


def test_the_bar_shows_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr("rewrite.fitting.run.Console", lambda **_: Console(file=shown, force_terminal=True, width=120))
    fit(Plain(), plain(), [images()], steps=(2, 1))
    assert "site by site" in shown.getvalue()
    assert "end to end" in shown.getvalue()
    assert "2/2" in shown.getvalue()
