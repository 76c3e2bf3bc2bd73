"""Short statements about a scene, of which a model learns to find things by what is said of them before it learns to answer questions.

From answers alone a small language model does not begin to look for what a question names; from statements it does within a hundred steps.
"""

from __future__ import annotations

from dataclasses import dataclass

from .questions import Question, unique
from .scenes import Scene


@dataclass(frozen=True)
class Statement:
    """words: the whole of it; told: from which word on the picture says what comes."""

    words: tuple[str, ...]
    told: int


def statements(shown: Scene, asked: list[Question]) -> list[Statement]:
    """Of each thing that its kind, colour or place says which it is, the rest; and each question of existence without its frame."""
    found = []
    for thing in shown.things:
        if unique(shown, kind=thing.kind):
            found.append(Statement((thing.kind, thing.colour, thing.texture, thing.place), 1))
        if unique(shown, colour=thing.colour):
            found.append(Statement((thing.colour, thing.kind), 1))
        if unique(shown, place=thing.place):
            found.append(Statement((thing.place, thing.kind), 1))
    for question in asked:
        if question.topic.startswith("existence"):
            words = question.text.removeprefix("is there ").removesuffix(" ?").split()
            found.append(Statement((*words, question.answer), len(words)))
    return found
