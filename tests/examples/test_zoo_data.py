"""The zoo's data: the same for a seed, labels that agree with the picture, questions whose answers the scene gives, balanced ones."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from examples.zoo.dense import BACKGROUND, GRID, PATCH, patch_labels, pixel_kinds
from examples.zoo.names import COLOURS, KINDS, PLACES, SHAPES
from examples.zoo.pixels import pixel_values
from examples.zoo.questions import WORDS, Question, questions
from examples.zoo.scenes import SIZE, Scene, render, scene
from examples.zoo.shapes import digit_images

SCENES = 60


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [scene("test", number) for number in range(SCENES)]


def test_a_scene_is_the_same_for_its_number() -> None:
    one, again, other = scene("train", 7), scene("train", 7), scene("test", 7)
    assert one == again
    assert one != other
    assert np.array_equal(render(one).image, render(again).image)
    assert questions(one, 8) == questions(again, 8)


def test_training_sees_no_digit_of_the_tests() -> None:
    train, held_out = (np.concatenate(list(digit_images(chosen).values())) for chosen in (False, True))
    seen = {picture.tobytes() for picture in train}
    assert len(train) + len(held_out) == 1797
    # scikit-learn's own set has a few pictures twice.
    assert sum(picture.tobytes() in seen for picture in held_out) < 5


def test_what_the_picture_shows(scenes: list[Scene]) -> None:
    """Pixels that belong to a plain thing have its colour, and all that lie well inside belong to something in front of the background."""
    for shown in scenes:
        rendered = render(shown)
        assert rendered.image.shape == (SIZE, SIZE, 3)
        assert rendered.image.dtype == np.uint8
        for number, thing in enumerate(shown.things):
            own = rendered.image[rendered.owner == number] / 255
            assert len(own) > 12, thing
            if thing.texture == "plain":
                # Edges are darker; the middle half of the pixels is not.
                nearest = np.abs(np.median(own, 0) - np.array(list(COLOURS.values()))).sum(-1).argmin()
                assert list(COLOURS)[nearest] == thing.colour, thing
        kinds = pixel_kinds(shown, rendered)
        assert set(np.unique(kinds)) == {BACKGROUND, *(KINDS.index(thing.kind) + 1 for thing in shown.things)}


def test_labels_of_patches_are_those_of_their_pixels(scenes: list[Scene]) -> None:
    for shown in scenes[:10]:
        rendered = render(shown)
        labels, kinds = patch_labels(shown, rendered), pixel_kinds(shown, rendered)
        assert labels.shape == (3, GRID, GRID)
        assert ((labels == BACKGROUND).all(0) | (labels > BACKGROUND).all(0)).all()
        for row, column in np.argwhere(labels[0] > 0):
            patch = kinds[row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH]
            assert (patch == labels[0, row, column]).any()
        assert not (kinds[np.kron(labels[0] == 0, np.ones((PATCH, PATCH), bool))] > 0).mean() > 0.05


def answer(shown: Scene, asked: Question) -> str:
    """The answer, read from the question's text anew."""
    words = asked.text.split()
    things = shown.things
    if asked.text.startswith("is there"):
        colour, kind = (words[3], words[4]) if len(words) == 6 else (None, words[3])
        return "yes" if any(one.kind == kind and colour in (None, one.colour) for one in things) else "no"
    if words[:2] in (["which", "colour"], ["which", "texture"]):
        (found,) = {getattr(one, words[1]) for one in things if one.kind == words[4]}
        return str(found)
    if words[:2] == ["where", "is"]:
        (place,) = {(int(3 * one.y / SIZE), int(3 * one.x / SIZE)) for one in things if one.kind == words[3]}
        return PLACES[place[0]][place[1]]
    if words[:2] == ["how", "many"]:
        return str(sum(words[2] in ("things", one.colour) for one in things))
    if words[0] == "what":
        largest = max(one.size for one in things)
        of = {"largest": [one for one in things if one.size == largest]}
        (kind,) = {one.kind for one in of.get(words[3], [one for one in things if words[-2] in (one.colour, one.place)])}
        return kind
    first, second = (next(one for one in things if one.kind == kind) for kind in (words[2], words[-2]))
    return "yes" if (first.x < second.x if "left" in words else first.y < second.y) else "no"


def test_answers_are_what_the_scene_says(scenes: list[Scene]) -> None:
    asked = [(shown, question) for shown in scenes for question in questions(shown, 16)]
    for shown, question in asked:
        assert answer(shown, question) == question.answer, (question, shown.things)
        assert {*question.text.split(), question.answer} <= set(WORDS)
    topics = Counter(question.topic.split()[0] for _, question in asked)
    assert set(topics) == {"existence", "colour", "what", "where", "count", "relation", "texture"}
    assert 0.15 < sum(question.fine for _, question in asked) / len(asked) < 0.5


def test_existence_is_balanced_however_it_is_asked(scenes: list[Scene]) -> None:
    asked = [(shown, question) for shown in scenes for question in questions(shown, 64) if question.topic.startswith("existence")]
    for manner in ("random", "popular", "adversarial"):
        answers = Counter(question.answer for _, question in asked if question.topic.endswith(manner))
        assert 0.42 < answers["yes"] / answers.total() < 0.58, (manner, answers)
    for shown, question in asked:
        if question.topic.endswith("adversarial") and question.answer == "no":
            colour, kind = question.text.split()[3:5]
            assert any(one.colour == colour for one in shown.things)
            assert any(one.kind == kind for one in shown.things)
    # Neither the kind nor the colour in a question tells the answer.
    for kind in SHAPES:
        of_kind = Counter(question.answer for _, question in asked if kind in question.text.split())
        assert 0.25 < of_kind["yes"] / of_kind.total() < 0.75, (kind, of_kind)


def test_pixel_values() -> None:
    pictures = np.stack([render(scene("train", number)).image for number in range(2)])
    values = pixel_values(pictures)
    assert values.shape == (2, 3, SIZE, SIZE)
    assert torch.equal(((values[1, 2, 5, 7] + 1) * 127.5).round(), torch.tensor(float(pictures[1, 5, 7, 2])))
