"""The tasks that the models are measured on, `python -m rewrite evaluate --task examples.zoo.tasks:NAME`: held-out scenes throughout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from rewrite.evaluating import Batch, Task

from ..torchvision_or_not import let_transformers_import
from . import floors  # noqa: F401  registers the passes that prune at random
from .dense import pixel_kinds
from .names import KINDS
from .pixels import pixel_values
from .questions import Question, questions
from .scenes import SIZE, Scene, render, scene
from .videos import EVENTS, clip, render_clip

# Pictures of a batch, and questions of one.
BATCH = 50
# Of pictures with a label for each pixel.
DENSE_BATCH = 20
# Of each scene of the task.
ASKED = 4


def classification(folder: Path, samples: int) -> Task:
    """Which kind the largest thing is, of `samples` scenes."""
    let_transformers_import()
    from transformers import AutoModelForImageClassification

    model = AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float32).eval()
    scenes = [scene("test", number) for number in range(samples)]
    batches = []
    for first in range(0, samples, BATCH):
        shown = scenes[first : first + BATCH]
        kinds = torch.tensor([KINDS.index(one.main.kind) for one in shown])
        batches.append(Batch({"pixel_values": pixel_values([render(one).image for one in shown])}, kinds))
    return Task(model, batches, lambda output: output.logits)


def segmentation(folder: Path, samples: int) -> Task:
    """The kind of every pixel, of `samples` scenes."""
    let_transformers_import()
    from transformers import AutoModelForSemanticSegmentation

    model = AutoModelForSemanticSegmentation.from_pretrained(folder, dtype=torch.float32).eval()
    batches = []
    for first in range(0, samples, DENSE_BATCH):
        scenes = [scene("test", number) for number in range(first, min(samples, first + DENSE_BATCH))]
        rendered = [render(one) for one in scenes]
        kinds = torch.from_numpy(np.stack([pixel_kinds(*pair) for pair in zip(scenes, rendered, strict=True)]))
        batches.append(Batch({"pixel_values": pixel_values([one.image for one in rendered])}, kinds))
    return Task(model, batches, lambda output: at_pixels(output.logits, SIZE))


def at_pixels(logits: torch.Tensor, side: int) -> torch.Tensor:
    """Logits [B, classes, h, w] at the pixels of the picture, [B, side, side, classes]."""
    return functional.interpolate(logits, size=(side, side), mode="bilinear", align_corners=False).movedim(1, -1)


def events(folder: Path, samples: int) -> Task:
    """What happens, of `samples` clips."""
    let_transformers_import()
    from transformers import AutoModelForVideoClassification

    model = AutoModelForVideoClassification.from_pretrained(folder, dtype=torch.float32).eval()
    batches = []
    for first in range(0, samples, BATCH):
        clips = [clip("test", number) for number in range(first, min(samples, first + BATCH))]
        labels = torch.tensor([EVENTS.index(one.event) for one in clips])
        batches.append(Batch({"pixel_values": pixel_values([render_clip(one) for one in clips])}, labels))
    return Task(model, batches, lambda output: output.logits)


def answering(folder: Path, samples: int) -> Task:
    """`samples` questions, a few about each scene, answered by the next word; in groups by what is asked, and those of fine detail."""
    return _asked(folder, samples, lambda question: "fine detail" if question.fine else question.topic.split()[0])


def existence(folder: Path, samples: int) -> Task:
    """`samples` questions of existence in the manner of POPE; in groups by how those answered no were drawn."""
    return _asked(folder, samples, lambda question: question.topic.split()[1], "existence")


def _asked(folder: Path, samples: int, group: Any, topic: str = "") -> Task:
    """Questions in batches of one shape, shorter ones padded on the left: with other shapes a model is captured anew."""
    let_transformers_import()
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked = list[tuple[Scene, Question]]()
    number = 0
    while len(asked) < samples:
        shown = scene("test", number)
        some = [question for question in questions(shown, 16) if question.topic.startswith(topic)]
        asked += [(shown, question) for question in dict.fromkeys(some)][:ASKED]
        number += 1
    longest = max(len(question.text.split()) for _, question in asked[:samples])
    batches = []
    for first in range(0, samples, BATCH):
        some = asked[first : min(samples, first + BATCH)]
        texts, images = [question.text for _, question in some], [render(shown).image for shown, _ in some]
        inputs = prompts(model.config, tokenizer, texts, images, longest)
        answers = tokenizer.convert_tokens_to_ids([question.answer for _, question in some])
        batches.append(Batch(inputs, torch.tensor(answers), tuple(group(question) for _, question in some)))
    return Task(model, batches, lambda output: output.logits[:, -1])


def prompts(config: Any, tokenizer: Any, texts: list[str], images: list[np.ndarray], words: int | None = None) -> dict[str, torch.Tensor]:
    """What the model is given for a question about each picture [H, W, 3]: the picture, and the question behind it; shorter ones are padded
    on the left, to the longest, or to so many words."""
    image = tokenizer.convert_ids_to_tokens(config.image_token_id) * config.image_seq_length
    padding = {"padding": True} if words is None else {"padding": "max_length", "max_length": 1 + config.image_seq_length + words}
    told = tokenizer([f"{image} {text}" for text in texts], **padding, return_tensors="pt", return_token_type_ids=False)
    return {**told, "pixel_values": pixel_values(images)}
