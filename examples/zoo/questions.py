"""Templated questions about a scene, each with an answer of one word.

Questions of existence are in the manner of POPE (Li et al. 2023): half of them are answered yes, and those answered no ask for a thing
that is drawn at random, is popular (of the kinds that scenes have most of), or is adversarial: a colour and a kind that are both in the
picture, on different things.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .names import COLOURS, DIGITS, KINDS, PLACES, SHAPES, TEXTURES
from .scenes import SIZE, SMALL_DIGIT, TEXTURED, Scene, Thing

# Pixels between two things from which on one is said to be left of, or above, the other.
APART = 12
# From a line between the thirds of the picture: places of things whose middle is nearer are not asked for.
CLEAR = 4


@dataclass(frozen=True)
class Question:
    """text: words between spaces, the last "?"; answer: one word; topic: which template; fine: it is about a thing that is at most two
    patches across."""

    text: str
    answer: str
    topic: str
    fine: bool


Template = Callable[[np.random.Generator, Scene], Question | None]


def _pick(random: np.random.Generator, among: list[Thing]) -> Thing | None:
    return among[random.integers(len(among))] if among else None


def _is_fine(*things: Thing) -> bool:
    return min(thing.size for thing in things) <= SMALL_DIGIT[1]


def unique(shown: Scene, **shared: str) -> bool:
    """Whether one thing alone has these properties."""
    return sum(all(getattr(thing, key) == value for key, value in shared.items()) for thing in shown.things) == 1


def _stands_clearly(thing: Thing) -> bool:
    """Whether a thing's middle is away from the lines between places."""
    return all(abs(at - line * SIZE / 3) >= CLEAR for at in (thing.x, thing.y) for line in (1, 2))


def _of_one_kind(shown: Scene) -> list[Thing]:
    """The things that their kind says which they are."""
    return [thing for thing in shown.things if unique(shown, kind=thing.kind)]


def _exists(random: np.random.Generator, shown: Scene, negative: str) -> Question | None:
    """A question that is answered yes half of the time; by kind alone, or by colour and kind."""
    there = {(thing.colour, thing.kind) for thing in shown.things}
    colours, kinds = list(COLOURS), (SHAPES if negative == "popular" else KINDS)
    with_colour = negative == "adversarial" or random.random() < 0.5
    topic = f"existence {negative}"
    if random.random() < 0.5:
        # Of the same kinds as the noes, so that the words do not tell.
        thing = _pick(random, [one for one in shown.things if one.kind in kinds])
        if thing is None:
            return None
        fine = _is_fine(*(one for one in shown.things if one.kind == thing.kind and (one.colour == thing.colour or not with_colour)))
        return Question(f"is there a {thing.colour + ' ' if with_colour else ''}{thing.kind} ?", "yes", topic, fine)
    if negative == "adversarial":
        crossed = [(a.colour, b.kind) for a in shown.things for b in shown.things if (a.colour, b.kind) not in there]
        if not crossed:
            return None
        colour, kind = crossed[random.integers(len(crossed))]
    else:
        kind = kinds[random.integers(len(kinds))]
        if negative == "random" and random.random() < 0.55:  # the share of shapes in scenes
            kind = SHAPES[random.integers(len(SHAPES))]
        colour = colours[random.integers(len(colours))]
        if any(one.kind == kind and (not with_colour or one.colour == colour) for one in shown.things):
            return None
    return Question(f"is there a {colour + ' ' if with_colour else ''}{kind} ?", "no", topic, False)


def _colour(random: np.random.Generator, shown: Scene) -> Question | None:
    thing = _pick(random, _of_one_kind(shown))
    return None if thing is None else Question(f"which colour is the {thing.kind} ?", thing.colour, "colour", _is_fine(thing))


def _what(random: np.random.Generator, shown: Scene) -> Question | None:
    if random.random() < 0.2:
        return Question("what is the largest thing ?", shown.main.kind, "what", False)
    if random.random() < 0.5:
        thing = _pick(random, [one for one in shown.things if unique(shown, colour=one.colour)])
        return None if thing is None else Question(f"what is {thing.colour} ?", thing.kind, "what", _is_fine(thing))
    thing = _pick(random, [one for one in shown.things if unique(shown, place=one.place) and all(map(_stands_clearly, shown.things))])
    return None if thing is None else Question(f"what is at the {thing.place} ?", thing.kind, "what", _is_fine(thing))


def _where(random: np.random.Generator, shown: Scene) -> Question | None:
    thing = _pick(random, [one for one in _of_one_kind(shown) if _stands_clearly(one)])
    return None if thing is None else Question(f"where is the {thing.kind} ?", thing.place, "where", _is_fine(thing))


def _how_many(random: np.random.Generator, shown: Scene) -> Question | None:
    if random.random() < 0.5:
        return Question("how many things are there ?", str(len(shown.things)), "count", _is_fine(*shown.things))
    colour = shown.things[random.integers(len(shown.things))].colour
    counted = [thing for thing in shown.things if thing.colour == colour]
    return Question(f"how many {colour} things are there ?", str(len(counted)), "count", _is_fine(*counted))


def _relation(random: np.random.Generator, shown: Scene) -> Question | None:
    among = _of_one_kind(shown)
    if len(among) < 2:
        return None
    a, b = (among[number] for number in random.permutation(len(among))[:2])
    words, apart = [("left of", b.x - a.x), ("above", b.y - a.y)][random.integers(2)]
    if abs(apart) < APART:
        return None
    return Question(f"is the {a.kind} {words} the {b.kind} ?", "yes" if apart > 0 else "no", "relation", _is_fine(a, b))


def _texture(random: np.random.Generator, shown: Scene) -> Question | None:
    thing = _pick(random, [one for one in _of_one_kind(shown) if one.kind in SHAPES and one.size >= TEXTURED])
    return None if thing is None else Question(f"which texture is the {thing.kind} ?", thing.texture, "texture", False)


EXISTENCE = ("random", "popular", "adversarial")
# How often each is asked, of 16.
TEMPLATES: tuple[tuple[Template, int], ...] = (
    *((lambda random, shown, negative=negative: _exists(random, shown, negative), 2) for negative in EXISTENCE),
    (_colour, 2),
    (_what, 3),
    (_where, 2),
    (_how_many, 1),
    (_relation, 1),
    (_texture, 1),
)
_OFTEN = np.array([often for _, often in TEMPLATES]) / sum(often for _, often in TEMPLATES)


def questions(shown: Scene, number: int) -> list[Question]:
    """So many questions about a scene, the same for the same scene."""
    random = np.random.default_rng((*shown.seed, 2))
    found: list[Question] = []
    while len(found) < number:
        question = TEMPLATES[random.choice(len(TEMPLATES), p=_OFTEN)][0](random, shown)
        if question is not None:
            found.append(question)
    return found


# Words of the templates that are no names.
PLAIN = ("?", "is", "there", "a", "which", "what", "where", "how", "many", "things", "thing", "are", "the", "at", "largest", "left", "of",
         "above", "colour", "texture", "yes", "no")  # fmt: skip
WORDS = tuple(dict.fromkeys((*PLAIN, *KINDS, *COLOURS, *TEXTURES, *(place for row in PLACES for place in row), *map(str, range(1, 7)))))
assert set(DIGITS) <= set(WORDS)
