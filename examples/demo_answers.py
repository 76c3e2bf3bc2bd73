"""The demo's first half: a small model that was trained here answers questions about a picture, before passes and after.

The picture is a photograph that scikit-image ships and that the model never saw, with a few things drawn on it; the model is the one in
examples/zoo/weights/llava.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from rewrite import SlowerWarning, rewrite

from .demo_pictures import Panel, draw_kept
from .patches_seen import patches_seen
from .torchvision_or_not import let_transformers_import
from .zoo.backgrounds import photographs
from .zoo.questions import Question, questions
from .zoo.scenes import SIZE, Scene, Thing, paint
from .zoo.tasks import prompts

WEIGHTS = Path(__file__).parent / "zoo" / "weights" / "llava"
PASSES = ("cls_prune(keep=0.25)", "fastv(layer=4, drop=0.75)", "token_exit(layer=6)")
THINGS = (
    Thing("heart", "red", "plain", 27, 80, 40),
    Thing("star", "yellow", "plain", 88, 84, 24),
    Thing("seven", "white", "plain", 91, 22, 18),
    Thing("circle", "blue", "striped", 22, 24, 24),
    Thing("triangle", "green", "plain", 62, 100, 15),
)
SHOWN = Scene(THINGS, seed=(0,), held_out=True)
ASKED = 12
# An answer is a word, and the end.
NEW_TOKENS = 2


def picture() -> np.ndarray:
    """[SIZE, SIZE, 3] uint8."""
    photo = photographs(held_out=True)[0][:SIZE, :SIZE].astype(np.float32) / 255
    # Less contrast than the things have, as the scenes that the model was trained on.
    image, owner = photo * np.float32(0.7) + np.float32(0.1), np.full((SIZE, SIZE), -1, np.int8)
    for number, thing in enumerate(THINGS):
        paint(image, owner, number, thing, np.random.default_rng(number), held_out=True)
    return (np.clip(image, 0, 1) * 255).astype(np.uint8)


def answers(console: Console, out: Path, passes: Sequence[str] = PASSES) -> None:
    """Ask, print a table of the answers of each model, and draw which patches each still sees."""
    let_transformers_import()
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    model = AutoModelForImageTextToText.from_pretrained(WEIGHTS, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS)
    asked = list({question.text: question for question in questions(SHOWN, 4 * ASKED)}.values())[:ASKED]
    image = picture()
    inputs = prompts(model.config, tokenizer, [question.text for question in asked], [image] * ASKED)
    said = {"before": say(model, tokenizer, inputs)}
    grid, panels = int(model.config.image_seq_length**0.5), []
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    console.rule(f"A trained model of {millions:.1f} million parameters answers questions about a picture")
    for text in passes:
        with console.status(text), warnings.catch_warnings():
            warnings.simplefilter("ignore", SlowerWarning)  # what it costs is told of the models below
            rewritten = rewrite(model, [text], example_inputs=inputs)
        said[text] = say(rewritten, tokenizer, inputs)
        panels.append(Panel(text, *patches_seen(rewritten, inputs, grid)))
    console.print(table(asked, said))
    heading = "The patches that the language model sees: bright in all layers, pale in none"
    console.print(f"picture: {draw_kept(np.kron(image, np.ones((6, 6, 1), np.uint8)) / 255, panels, out / 'answers.png', heading)}")


@torch.no_grad()
def say(model: nn.Module, tokenizer: object, inputs: dict[str, torch.Tensor]) -> list[str]:
    """What `generate()` adds to each prompt."""
    ids = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    return [text.strip() for text in tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)]


def table(asked: list[Question], said: dict[str, list[str]]) -> Table:
    """Each question with its right answer and those of each model; wrong ones in red."""
    made = Table(title="Answers before and after each pass, by generate()", show_footer=True)
    made.add_column("question", footer="right")
    made.add_column("true answer")
    for name, words in said.items():
        right = sum(word == question.answer for word, question in zip(words, asked, strict=True))
        made.add_column(name.replace("(", "\n("), footer=f"{right} of {len(asked)}")
    for number, question in enumerate(asked):
        row = [words[number] for words in said.values()]
        made.add_row(question.text, question.answer, *(word if word == question.answer else f"[red]{word}[/red]" for word in row))
    return made
