"""Models that Dynamo captures as many graphs: every site is found, what was known in front of a break holds behind it, the rest is told."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from rewrite import NotApplicableError, explain
from rewrite.carried import Carried, Handover
from tests.models.architectures import rewritten
from tests.models.corpus.cases import EVERYTHING
from tests.models.corpus.entry import Entry
from tests.models.corpus.transformers_language import LANGUAGE
from tests.models.corpus.transformers_parts import PICTURE
from tests.models.oracles import visual_masked_from

GREEDY: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
BROKEN = ["qwen2-vl", "qwen2.5-vl", "qwen3-vl", "glm4v", "idefics3", "smolvlm"]
# One of those whose breaks are alike, where not everything is run; for what Qwen2-VL gives see test_generation_on_corpus.py.
SHORT = ["qwen3-vl", "idefics3"]
EXIT = 1


def entry(name: str) -> Entry:
    return next(each for each in LANGUAGE if each.name == name)


def with_language_model(model: nn.Module) -> nn.Module:
    """The oracle looks for the layers at `model.model.language_model`."""
    if not hasattr(model.model, "language_model"):
        object.__setattr__(model.model, "language_model", model.model.text_model)
    return model


@pytest.mark.parametrize("name", BROKEN if EVERYTHING else SHORT)
def test_every_site_is_found_and_every_break_told(name: str) -> None:
    known = entry(name)
    with torch.no_grad():
        report = explain(known.build("sdpa"), dict(known.inputs(2)))
    assert len(report.sites) == known.truth
    # Sizes that depend on data are read as such (by Dynamo from 2.12 on), so that these two stay whole; image grids that are looped over
    # are not.
    assert (report.graphs == 1) == (not report.breaks) == (name in ("idefics3", "smolvlm") and torch.__version__ >= "2.12")
    assert all(one.where.count(":") == 1 and one.where.split(":")[0].endswith(".py") and one.reason for one in report.breaks)
    names = dict(known.build("sdpa").named_modules())
    assert all(site.qualified_name.split(":")[0] in names for site in report.sites)
    text = [site for site in report.sites if site.causal]
    assert len(text) == 2
    assert all(site.token_layout == "text with visual tokens" and not site.cut for site in text)
    assert (f"captured as {report.graphs} graphs" in str(report)) == bool(report.breaks)


def test_what_a_break_hides_is_told() -> None:
    known = entry("qwen2-vl")
    with torch.no_grad():
        report = explain(known.build("sdpa"), dict(known.inputs(2)))
    cut = [site for site in report.sites if site.cut]
    assert [site.qualified_name for site in cut] == [f"model.visual.blocks.{layer}.attn{again}" for layer in (0, 1) for again in ("", ":2")]
    for site in cut:
        assert site.kind == "unknown"
        assert "self or cross, layer and token layout are not known behind the break at transformers/models/qwen2_vl/" in site.cut
    assert "cut off: model.visual.blocks.0.attn" in " ".join(str(report).split())


@pytest.mark.parametrize("name", BROKEN if EVERYTHING else SHORT)
def test_exit_behind_a_break(name: str) -> None:
    """In most of these the merge is in an earlier graph than the layers; in Qwen3-VL the layers are cut from one another too."""
    known = entry(name)
    model, inputs = with_language_model(known.build("sdpa")), dict(known.inputs(2))
    visual = inputs["input_ids"] == PICTURE
    changed = rewritten(model, [f"token_exit(layer={EXIT})"], inputs)
    with torch.no_grad(), visual_masked_from(model, EXIT, visual):
        expected, generated = model(**inputs).logits, model.generate(**inputs, **GREEDY)
    with torch.no_grad():
        actual = changed(**inputs).logits
    real = ~visual & inputs["attention_mask"].bool()
    assert (actual - expected)[real].abs().max() <= 1e3 * torch.finfo(torch.float32).eps * expected[real].abs().max()
    assert torch.count_nonzero(actual[visual]) == 0
    assert torch.equal(changed.generate(**inputs, **GREEDY), generated)
    assert not torch.equal(model.generate(**inputs, **GREEDY), generated)


def test_handover_forgets_what_was_written_into() -> None:
    handover, tensor, known = Handover(), torch.zeros(2, 3, 4), Carried(layers=("layers.0",))
    handover.write(tensor, known)
    assert handover.read(tensor) is known
    assert handover.read(tensor.clone()) is None
    tensor.add_(1)
    assert handover.read(tensor) is None


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        (
            "diverse(keep=0.5)",
            r"layers.1.self_attn: by diverse\(keep=0.5\) some tokens leave in front of an earlier layer, and .* cut into graphs",
        ),
        ("token_exit(relevance=0.5)", "layer 0 is in another graph of the call"),
    ],
)
def test_what_leaves_in_one_graph_cannot_come_back_in_the_next(setting: str, reason: str) -> None:
    """The layers are cut from one another."""
    known = entry("qwen3-vl")
    with pytest.raises(NotApplicableError, match=reason):
        rewritten(known.build("sdpa"), [setting], dict(known.inputs(2)))
