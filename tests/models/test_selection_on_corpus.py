"""Selecting passes on models of the corpus: the result is the original's with the tokens masked (or merged), or the refusal says why not.

`make test` runs a few different cases; REWRITE_CORPUS=all every pass on every model that has visual tokens, or patches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from rewrite import NotApplicableError, Report, Site, rewrite
from rewrite.ir.errors import NoAttentionError
from tests.models.corpus.cases import BY_NAME, ENTRIES, EVERYTHING
from tests.models.corpus.entry import Entry
from tests.models.corpus.survey import survey
from tests.models.corpus.training import tensors
from tests.models.corpus.transformers_parts import PICTURE
from tests.models.masked_graphs import Masked, by_tower, last_query
from tests.models.oracles import cls_row

EPSILON = torch.finfo(torch.float32).eps

# Of prompts, and of patches; the corpus's models have two layers.
VISUAL = {"fastv": "fastv(layer=1)", "pyramid": "pyramid(layers=(1,))", "cls_prune": "cls_prune(keep=0.5)"}
PATCHES = {"evit": "evit(keep=0.6, layers=(0,), fuse=False)", "merge": "merge(r=3, layers=(0,))"}

# name -> passes: rotary tables behind a prefix; a pooling attention behind the layers; a head that lays the tokens of every layer out on
# their grid; tokens of a detector behind the grid.
CORE = {"flava": ("evit",), "dinov3-vit": ("evit",), "vit_base_patch16_siglip_224": ("merge",), "dpt": ("evit",), "yolos": ("evit",)}

# Its tokens are the patches laid out anew, which has an oracle of its own: tests/models/test_relaid_pictures.py.
ELSEWHERE = {("llava-next", "cls_prune")}

# Models that join patches to other tokens behind their stack: (tokens in front of them, all of them).
JOINED = {"flava": (1, 67), "kosmos2": (0, 25), "git": (0, 33)}

# (name, pass) -> what the refusal says.
REFUSED = {
    ("swin_tiny_patch4_window7_224", "merge"): "windows",
    ("vit_small_patch16_18x2_224", "merge"): "attends beside it",
    ("crossvit_9_240", "evit"): "of these some had left in an earlier stack",
    ("yolos", "merge"): "an entry for every token of the model's own, and none for tokens that were merged",
}


def fitting(entry: Entry) -> tuple[str, ...]:
    """The passes whose tokens a model has."""
    visual = "input_ids" in entry.inputs(2) and any(group.visual for group in entry.sites)
    text = [one for one in VISUAL if visual and (entry.name, one) not in ELSEWHERE]
    return (*text, *(PATCHES if any(group.grid and not group.window for group in entry.sites) else ()))


def chosen() -> list[tuple[str, str]]:
    table = {entry.name: fitting(entry) for entry in ENTRIES if entry.truth} if EVERYTHING else CORE
    return [(name, one) for name, passes in table.items() for one in passes]


@dataclass
class Tower:
    """The attention of a vision tower that visual tokens went through last, by name, and the tokens in front of its patches."""

    name: str
    prefix: int


def tower_of(entry: Entry) -> Tower:
    sites = {site.name: site for site in survey(entry, entry.implementations[0], 2).sites}
    name = next(site.pictured for site in sites.values() if site.pictured)
    return Tower(name, sites[name].layout.prefix)


def masked(entry: Entry, one: str, report: Report, inputs: dict[str, Any]) -> tuple[Masked, torch.Tensor | None]:
    """The oracle, and which rows of the results are no padding."""
    if one in PATCHES:
        touched = [site.qualified_name for site in report.sites if site.passes]

        def begin(oracle: Masked, site: Site) -> None:
            oracle.prefix, oracle.suffix = site.layout.prefix, site.layout.suffix
            if one == "evit":
                oracle.behind[0] = cls_row(0.6, oracle.prefix, oracle.suffix)

        # Behind a break paths are shorter.
        return Masked(lambda s: any(name.endswith(s.name) for name in touched), merges={0: 3} if one == "merge" else {}, begin=begin), None
    visual = inputs["input_ids"] == PICTURE
    half, length = math.floor(int(visual[0].sum()) / 2 + 0.5), visual.shape[1]
    oracle = Masked(lambda s: s.kind == "self" and s.dims["Nq"] == s.dims["Nk"] == length)
    if one == "fastv":
        oracle.behind[0] = last_query(visual, half)
    elif one == "pyramid":
        oracle.before[1] = last_query(visual, half)
    else:
        tower = tower_of(entry)
        oracle.before[0] = by_tower(oracle, tower.name, tower.prefix, visual, 0.5)
    return oracle, inputs["attention_mask"].bool()


@pytest.mark.parametrize(("name", "one"), chosen())
def test_what_is_left_is_the_originals_with_the_others_masked(name: str, one: str) -> None:
    entry, text = BY_NAME[name], {**VISUAL, **PATCHES}[one]
    inputs, implementation = dict(entry.inputs(2)), entry.implementations[0]
    try:
        with torch.no_grad():
            changed = rewrite(entry.build(implementation), [text], example_inputs=inputs)
    except (NotApplicableError, NoAttentionError) as refusal:
        if not EVERYTHING:
            raise
        pytest.skip(str(refusal))
    with torch.no_grad():
        actual = list(tensors(changed(**inputs)))
    oracle, real = masked(entry, one, changed.rewrite_report, inputs)
    oracle.joined = JOINED.get(name)
    expected = list(tensors(oracle.run(entry.build(implementation), inputs)))
    alive = oracle.alive
    assert alive is not None
    assert oracle.groups if oracle.merges else not alive.all(), "no token left"
    for got, wanted in zip(actual, expected, strict=True):
        assert got.shape == wanted.shape
        left = torch.ones_like(wanted, dtype=torch.bool)
        beside = oracle.behind_all(alive)
        if beside is not None and wanted.shape[:2] == beside.shape:
            left[~beside] = False
        for count in (alive.shape[1], alive.shape[1] - oracle.prefix):
            if one in VISUAL and wanted.shape[:2] == (len(alive), count):
                left[~alive[:, -count:]] = False
        if real is not None and wanted.shape[:2] == real.shape:
            left[~real] = False
        error = (got - wanted)[left].abs().max()
        assert error <= 2e3 * EPSILON * wanted[left].abs().max(), f"{error:.3g}"


@pytest.mark.parametrize(("name", "one"), REFUSED)
def test_a_refusal_says_why(name: str, one: str) -> None:
    entry = BY_NAME[name]
    with pytest.raises(NotApplicableError, match=REFUSED[name, one]), torch.no_grad():
        rewrite(entry.build(entry.implementations[0]), [{**VISUAL, **PATCHES}[one]], example_inputs=dict(entry.inputs(2)))
