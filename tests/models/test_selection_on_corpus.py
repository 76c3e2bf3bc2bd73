"""Selecting passes on models of the corpus: the result is the original's with the tokens masked (or merged), or the refusal says why not.

`make test` runs a few different cases; REWRITE_CORPUS=all every pass on every model that has visual tokens, or patches.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rewrite import NotApplicableError, Report, rewrite
from rewrite.ir.errors import NoAttentionError
from tests.models.corpus.cases import BY_NAME, ENTRIES, EVERYTHING
from tests.models.corpus.entry import Entry
from tests.models.corpus.training import tensors
from tests.models.masked_rules import PATCHES, VISUAL, Prompts, of_patches, setting

EPSILON = torch.finfo(torch.float32).eps

# name -> passes: rotary tables behind a prefix; a pooling attention behind the layers; a head that lays the tokens of every layer out on
# their grid; tokens of a detector behind the grid.
CORE = {"flava": ("evit",), "dinov3-vit": ("evit",), "vit_base_patch16_siglip_224": ("merge",), "dpt": ("evit",), "yolos": ("evit",)}

# Its tokens are the patches laid out anew, which has an oracle of its own: tests/models/test_relaid_pictures.py.
ELSEWHERE = {"llava-next": ("cls_prune", "cls_ensemble", "hired", "outlier_tokens")}

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
    text = [one for one in VISUAL if visual and one not in ELSEWHERE.get(entry.name, ())]
    return (*text, *(PATCHES if any(group.grid and not group.window for group in entry.sites) else ()))


def chosen() -> list[tuple[str, str]]:
    table = {entry.name: fitting(entry) for entry in ENTRIES if entry.truth} if EVERYTHING else CORE
    return [(name, one) for name, passes in table.items() for one in passes]


def rewritten_or_skipped(prompts: Prompts, one: str) -> Any:
    """The model under a pass; where every case is run, one that is refused is skipped, and the reason told."""
    try:
        text = setting(one, prompts) if one in VISUAL else PATCHES[one]
        with torch.no_grad():
            return rewrite(prompts.entry.build(prompts.entry.implementations[0]), [text], example_inputs=prompts.inputs)
    except (NotApplicableError, NoAttentionError) as refusal:
        if not EVERYTHING:
            raise
        pytest.skip(str(refusal))


def touched(report: Report) -> Any:
    names = [site.qualified_name for site in report.sites if site.passes]
    return lambda site: any(name.endswith(site.name) for name in names)  # behind a break paths are shorter


@pytest.mark.parametrize(("name", "one"), chosen())
def test_what_is_left_is_the_originals_with_the_others_masked(name: str, one: str) -> None:
    entry = BY_NAME[name]
    inputs = dict(entry.inputs(2))
    prompts = Prompts(entry, inputs)
    changed = rewritten_or_skipped(prompts, one)
    with torch.no_grad():
        actual = list(tensors(changed(**inputs)))
    if one in VISUAL:
        oracle = prompts.masked()
        VISUAL[one][1](oracle, prompts)
    else:
        oracle = of_patches(one, touched(changed.rewrite_report))
    real = inputs["attention_mask"].bool() if one in VISUAL else None
    oracle.joined = JOINED.get(name)
    expected = list(tensors(oracle.run(entry.build(entry.implementations[0]), inputs)))
    alive = oracle.alive
    assert alive is not None
    assert oracle.groups if oracle.merges or oracle.fuses else not alive.all(), "no token left"
    for got, wanted in zip(actual, expected, strict=True):
        assert got.shape == wanted.shape
        if oracle.remade and wanted.shape[:2] != alive.shape:
            # The features themselves are given as they were.
            continue
        left = torch.ones_like(wanted, dtype=torch.bool)
        beside = oracle.behind_all(alive)
        if beside is not None and wanted.shape[:2] == beside.shape:
            left[~beside] = False
        for count in (alive.shape[1], alive.shape[1] - oracle.prefix):
            if one in VISUAL and wanted.shape[:2] == (len(alive), count):
                left[~alive[:, -count:]] = False
        if oracle.spare is not None and wanted.shape[:2] == alive.shape:
            # What was fused is none of the model's tokens.
            left[range(len(alive)), oracle.spare] = False
        if real is not None and wanted.shape[:2] == real.shape:
            left[~real] = False
        error = (got - wanted)[left].abs().max()
        assert error <= 2e3 * EPSILON * wanted[left].abs().max(), f"{error:.3g}"


@pytest.mark.parametrize(("name", "one"), REFUSED)
def test_a_refusal_says_why(name: str, one: str) -> None:
    entry = BY_NAME[name]
    with pytest.raises(NotApplicableError, match=REFUSED[name, one]), torch.no_grad():
        rewrite(entry.build(entry.implementations[0]), [PATCHES[one]], example_inputs=dict(entry.inputs(2)))
