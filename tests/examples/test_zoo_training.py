"""The zoo's training: an interrupted run goes on as if it had not been, packed questions are those asked alone, and what ships loads."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from examples.zoo import training
from examples.zoo.questions import questions
from examples.zoo.scenes import render, scene
from examples.zoo.statements import statements
from examples.zoo.tasks import prompts
from examples.zoo.train_classifier import RECIPE, Supervised, batch, classifier, loss
from examples.zoo.train_llava import ALIGNMENT, PROMPT, SAID, SCENES_OF_A_STAGE, aligned, alignment_loss, llava, packed
from examples.zoo.training import Recipe, rate_at, train
from examples.zoo.training_attention import use_map
from examples.zoo.words import END, VOCABULARY, save_processor


class Little(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        return self.head(self.inside(given).relu())


def trained(name: str, stop: int | None = None) -> tuple[nn.Module, list[float]]:
    """The model after six steps, or what is left when its batches end at one."""
    torch.manual_seed(0)
    model = Little()

    def given(step: int) -> torch.Tensor:
        if step == stop:
            raise KeyboardInterrupt
        return torch.randn(8, 4, generator=torch.Generator().manual_seed(step))

    def squared(model: nn.Module, inputs: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
        return model(inputs).float().square().mean(), {"half": 0.5}

    train(model, Recipe(steps=6, batch=8, warmup=2), given, squared, name)
    with (training.RUNS / name / "loss.csv").open() as file:
        return model, [float(row["loss"]) for row in csv.DictReader(file)]


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "RUNS", tmp_path)
    monkeypatch.setattr(training, "SAVE_EVERY", 2)
    monkeypatch.setattr(training, "LOG_EVERY", 1)
    whole, losses = trained("whole")
    with pytest.raises(KeyboardInterrupt):
        trained("interrupted", stop=5)
    resumed, same = trained("interrupted")
    assert losses == same
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_rate_rises_and_falls() -> None:
    recipe = Recipe(steps=100, batch=1, warmup=10)
    rates = [rate_at(recipe, step) for step in range(100)]
    assert rates[9] == rates[10] == 1.0
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 0.001


def test_training_attention_is_attention() -> None:
    """The map in bfloat16 does what the model's own attention does, up to its precision; gradients reach every parameter."""
    torch.manual_seed(0)
    model = Supervised(classifier())
    given = batch(Recipe(steps=1, batch=2), 0)
    before, _ = loss(model, given)
    use_map(model.model)
    with torch.autocast("cpu", torch.bfloat16):
        after, shown = loss(model, given)
    after.backward()
    assert after.item() == pytest.approx(before.item(), rel=0.02)
    assert shown.keys() == {"accuracy", "patch kind", "patch colour", "patch texture"}
    assert all(one.grad is not None and one.grad.abs().sum() > 0 for one in model.parameters())
    matrices, others = (group["params"] for one in training.optimisers(model, RECIPE) for group in one.param_groups)
    assert all(one.ndim == 2 for one in matrices)
    assert len(matrices) == 6 * 6
    assert len(matrices) + len(others) == len(list(model.parameters()))


def test_packed_questions_are_those_asked_alone(tmp_path: Path) -> None:
    """What a question's answer is predicted by in a packed row is what the model says to it alone, through tokenizer and picture."""
    torch.manual_seed(0)
    model: Any = llava().eval()
    model.save_pretrained(tmp_path)
    save_processor(tmp_path)
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    again = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    given, shown = packed(Recipe(steps=1, batch=2, seed=1), 0), scene("train", SCENES_OF_A_STAGE + 1)
    ends = (given.targets[1] == VOCABULARY[END]).nonzero().flatten()
    with torch.no_grad():
        tokens = model.model.vision_tower(given.pixels[1:], output_hidden_states=True).hidden_states[-1][:, 1:]
        words = model.get_input_embeddings()(given.ids[1:])
        stream = torch.cat([words[:, :1], model.model.multi_modal_projector(tokens), words[:, PROMPT:]], 1)
        row = model(inputs_embeds=stream, attention_mask=given.seen[1:].float(), position_ids=given.positions[1:]).logits[0]
        for number in (0, 5, 15):
            question = questions(shown, 16)[number]
            alone = again(**prompts(again.config, tokenizer, [question.text], [render(shown).image])).logits[0, -1]
            assert torch.allclose(row[ends[number] - 1], alone, atol=1e-3 * float(alone.abs().max()))
            assert given.targets[1][ends[number] - 1] == VOCABULARY[question.answer]
    asked = tokenizer("Is there a red Circle?").input_ids
    assert tokenizer.decode(asked) == "<s> is there a red circle ?"


def test_the_language_model_starts_with_looking_for_alike_tokens() -> None:
    """A word's query meets a token that holds the same word among others with a greater score than one that does not."""
    torch.manual_seed(0)
    model: Any = llava()
    words = torch.nn.functional.normalize(model.get_input_embeddings().weight, dim=-1)
    asked, other = words[VOCABULARY["circle"]], words[VOCABULARY["seven"]]
    both = torch.nn.functional.normalize(torch.stack([asked + words[VOCABULARY["red"]], other + words[VOCABULARY["red"]]]), dim=-1)
    for layer in model.model.language_model.layers:
        query, keys = layer.self_attn.q_proj(asked), layer.self_attn.k_proj(both)
        assert keys[0] @ query > keys[1] @ query
        read = layer.self_attn.o_proj(layer.self_attn.v_proj(asked))
        assert torch.allclose(read, 0.5 * asked, atol=1e-5)


def test_patches_are_aligned_with_the_words_of_what_they_show() -> None:
    """Projections that are the sum of the words of their patch have next to no loss; gradients reach the projector."""
    torch.manual_seed(0)
    model: Any = llava()
    given = aligned(Recipe(steps=1, batch=2, seed=ALIGNMENT.seed), 0)
    value, shown = alignment_loss(model, given)
    value.backward()
    assert all(one.grad is not None and one.grad.abs().sum() > 0 for one in model.model.multi_modal_projector.parameters())
    assert shown.keys() == {f"patch {group}" for group in SAID}
    patches = given[1]
    said = torch.zeros(*patches[:, 0].shape, 128)
    for words, labels in zip(SAID.values(), patches.unbind(1), strict=True):
        said += model.get_input_embeddings().weight.detach()[torch.tensor([VOCABULARY[word] for word in ("<pad>", *words)])[labels]]
    said *= model.get_input_embeddings().weight.norm(dim=-1).mean() / said.norm(dim=-1, keepdim=True)
    model.model.multi_modal_projector = nn.Identity()
    model.model.vision_tower = _Said(said)
    after, shown = alignment_loss(model, given)
    assert all(share == 1.0 for share in shown.values())
    assert after < value


class _Said(nn.Module):
    """A tower whose patches [B, N, C] are given, behind a CLS token."""

    def __init__(self, patches: torch.Tensor) -> None:
        super().__init__()
        self.hidden_states = (torch.nn.functional.pad(patches, (0, 0, 1, 0)),)

    def forward(self, pixels: torch.Tensor, output_hidden_states: bool) -> _Said:
        return self


def test_statements_are_what_the_scene_says() -> None:
    for number in range(50):
        shown = scene("test", number)
        asked = questions(shown, 16)
        found = statements(shown, asked)
        assert sum(one.words[-1] in ("yes", "no") for one in found) == sum(one.topic.startswith("existence") for one in asked)
        for one in found:
            named, told = one.words[: one.told], one.words[one.told :]
            assert told
            if told[0] in ("yes", "no"):
                there = any({thing.kind, thing.colour} >= {*named[1:]} for thing in shown.things)
                assert told == ("yes" if there else "no",)
            else:
                things = [thing for thing in shown.things if named[0] in (thing.kind, thing.colour, thing.place)]
                assert len(things) == 1
                assert {*told} <= {things[0].kind, things[0].colour, things[0].texture, things[0].place}
