"""What selecting passes ask for, and what they say where tokens cannot leave."""

from __future__ import annotations

from dataclasses import replace

import pytest
from synthetic_sites import SITES, example

from rewrite.ir import Contextual, Count, Handed, NotApplicableError, PassError, Program, Received, Select, Site, parse_pass
from rewrite.ir.semantics import evaluate_site

CASES = {"tower": "grid, CLS", "text": "image and text"}


def stack(number: int, kind: str, depth: int, **facts: object) -> tuple[Site, ...]:
    sites = (replace(SITES[CASES[kind]], name=f"{kind}.{layer}", layer=layer, depth=depth, stack=number) for layer in range(depth))
    return tuple(replace(site, **facts) for site in sites)  # type: ignore[arg-type]


TOWER, TEXT = stack(0, "tower", 4), stack(1, "text", 4, pictured="tower.2")
WHOLE = Program(TOWER + TEXT)


def reasons(program: Program) -> dict[str, str]:
    return {name: reason for name, _, reason in program.declined}


def test_where_patches_leave_the_later_sites_have_no_grid() -> None:
    program = parse_pass("evit(keep=0.5, layers=(1, 2))").apply(WHOLE)
    by = "evit(keep=0.5, layers=(1, 2))"
    assert program.selections == tuple(
        Select(0, layer, "between", "patches", Count(0.5, "ceil"), Received((f"tower.{layer}",), (0, 1)), by, fuse=True) for layer in (1, 2)
    )
    # Layer 1 is read, and sees every token itself.
    assert [name for name, _ in program.touched] == ["tower.1", "tower.2", "tower.3"]
    assert [site.layout.grid for site in program.sites[:4]] == [(8, 9), (8, 9), None, None]
    assert "before layer 2" in reasons(program)["tower.0"]
    assert "causal" in reasons(program)["text.1"]


def test_the_language_model_is_scored_by_its_own_attention_or_by_the_tower() -> None:
    (one,) = parse_pass("fastv(layer=2, drop=0.75)").apply(WHOLE).selections
    assert (one.layer, one.place, one.rule, one.count.number(16, 16)) == (2, "before", Received(("text.1",), (-1, None)), 4)
    stages = parse_pass("pyramid(layers=(1, 3))").apply(WHOLE).selections
    assert [(stage.layer, stage.rule) for stage in stages] == [(layer, Received((f"text.{layer}",), (-1, None))) for layer in (1, 3)]
    assert [stage.count.number(8, 16) for stage in stages] == [8, 4]
    (one,) = parse_pass("cls_prune").apply(WHOLE).selections
    assert (one.stack, one.layer, one.rule) == (1, 0, Received(("tower.2",), (0, 1)))
    (one,) = parse_pass("dominant_contextual(summed=True)").apply(WHOLE).selections
    assert (one.rule, one.contextual) == (Received(("tower.2",), (0, 1)), Contextual("tower.2", Count(0.052), True))
    assert (one.count.number(576, 576), one.contextual.count.number(576, 576)) == (190, 30)
    (one,) = parse_pass("cls_ensemble(first=1)").apply(WHOLE).selections
    assert one.rule == Received(("tower.1", "tower.2"), (0, 1))


def test_what_an_image_of_several_pictures_keeps() -> None:
    (one,) = parse_pass("hired(crops=(2, 2), alpha=0.5)").apply(WHOLE).selections
    assert (one.rule, one.reads) == (Received(("tower.2",), (0, 1)), ("tower.2", "tower.0"))
    # LLaVA-NeXT at 20%: of 5 x 576 patches 576 in all, half of them the thumbnail's.
    assert one.crops is not None
    assert one.crops.numbers(one.count, 576) == (288, 288, 288)
    (one,) = parse_pass("hired").apply(WHOLE).selections
    assert (one.crops, one.count.number(576, 576)) == (None, 115)


def test_pictures_that_leave_their_tower_are_chosen_from_for_a_later_graph() -> None:
    leaving = replace(TOWER[2], leaves=True)
    program = parse_pass("cls_ensemble(first=1)").apply(Program((*TOWER[:2], leaving, TOWER[3])))
    assert [one.rule for one in program.choices] == [Received(("tower.1", "tower.2"), (0, 1))]
    assert not program.touched
    assert not parse_pass("cls_ensemble(keep=1.0)").apply(Program((leaving,))).choices
    with pytest.raises(NotApplicableError, match=r"cls_ensemble.* and cls_prune.* both choose"):
        parse_pass("cls_prune").apply(program)
    by = "cls_prune(keep=0.5)"
    later = parse_pass(by).apply(Program(stack(0, "text", 4, pictured="tower.2", chosen=by)))
    assert [one.rule for one in later.selections] == [Handed()]


def test_sites_behind_a_merge_count_keys_by_their_size() -> None:
    program = parse_pass("merge(r=5, layers=(1, 2))").apply(WHOLE)
    assert [(one.layer, one.number(73), one.number(9)) for one in program.selections] == [(1, 5, 4), (2, 5, 4)]
    sized = program.sized()
    assert ["log_size[b, j]" in str(site.attend) for site in sized.sites] == [False, False, True, True, False, False, False, False]
    # Fusion reads the layer in front of which it happens, sizes included.
    program = parse_pass("fuse(r=16, layers=(1, 2))").apply(WHOLE)
    assert [(one.layer, one.number(73), one.number(25), one.number(12)) for one in program.selections] == [(1, 16, 12, 2), (2, 16, 12, 2)]
    assert ["log_size[b, j]" in str(site.attend) for site in program.sized().sites[:4]] == [False, True, True, True]
    assert parse_pass("merge(proportional=False)").apply(WHOLE).sized().sites[3].body == TOWER[3].body


@pytest.mark.parametrize(
    ("text", "program", "name", "told"),
    [
        ("evit(layers=(1,))", Program(stack(0, "tower", 4, layout=SITES["grid"].layout)), "tower.2", "no CLS token"),
        ("evit(layers=(1, 9))", WHOLE, "tower.2", "no layer 9"),
        ("evit(keep=0.999, layers=(1,))", WHOLE, "tower.2", "changes nothing"),
        (
            "evit(layers=(1,))",
            Program((*TOWER[:3], replace(TOWER[3], dropout=0.1))),
            "tower.2",
            "tower.3 too, and there its attention dropout",
        ),
        ("merge(layers=(1, 9))", WHOLE, "tower.2", "no layer 9"),
        ("merge", Program(TOWER[1:]), "tower.2", "no layer 0"),
        ("merge", Program((*TOWER[:3], replace(TOWER[3], body=SITES["grid, mask"].body))), "tower.2", "tower.3 is masked"),
        ("merge", Program((*TOWER[:3], replace(TOWER[3], body=SITES["grid, bias"].body))), "tower.2", "tower.3 reads bias by position"),
        ("fuse(layers=(1, 9))", WHOLE, "tower.2", "no layer 9"),
        ("fuse(r=0.001)", WHOLE, "tower.2", "changes nothing"),
        ("fuse", Program((*TOWER[:3], replace(TOWER[3], body=SITES["grid, mask"].body))), "tower.2", "tower.3 is masked"),
        ("fastv(layer=4)", WHOLE, "text.3", "stack has 4 layers"),
        ("fastv", Program(TEXT[2:]), "text.2", "layer 1, whose attention is read, is in another graph"),
        ("fastv", Program(stack(1, "text", 4, cached=True, dims={**TEXT[0].dims, "Nq": 1})), "text.2", "changes nothing"),
        ("pyramid(layers=(1, 7))", WHOLE, "text.2", "stack has 4 layers"),
        ("cls_prune", Program(TEXT), "text.0", "not the patches of a vision tower in this graph"),
        ("cls_ensemble(first=3)", WHOLE, "text.0", "none of which is layer 3 or later"),
        ("cls_prune", Program((*TOWER[:2], replace(TOWER[2], map_read=True), *TEXT)), "text.0", "tower.2 is read, and its attention map"),
        (
            "dominant_contextual",
            Program((*TOWER[:2], replace(TOWER[2], map_read=True), *TEXT)),
            "text.0",
            "tower.2 is read, and its attention",
        ),
        ("dominant_contextual", Program(stack(1, "text", 4, pictured="tower.2", chosen="cls_prune")), "text.0", "cls_prune chose among"),
        ("hired(early=3)", WHOLE, "text.0", "not through layer 3"),
        ("hired(crops=(2, 7), bands=True)", WHOLE, "text.0", "72 patches are not cut into 14 equal bands"),
        (
            "hired(crops=(2, 2))",
            Program((replace(TOWER[0], map_read=True), *TOWER[1:], *TEXT)),
            "text.0",
            "tower.0 is read, and its attention",
        ),
        ("matryoshka", WHOLE, "text.0", "8x9 patches are not cut into 36 squares"),
        ("matryoshka", Program(TEXT), "text.0", "not the patches of a vision tower in this graph"),
        ("diverse", Program(TEXT[1:]), "text.1", "first layer of its stack is in another graph"),
        ("fastv", Program(stack(1, "text", 4, layout=SITES["text"].layout)), "text.2", "no visual tokens"),
    ],
)
def test_where_tokens_cannot_leave_a_reason_is_given(text: str, program: Program, name: str, told: str) -> None:
    declined = parse_pass(text).apply(program)
    assert not declined.token_operations()
    assert told in reasons(declined)[name]


def test_what_another_site_chose_is_not_guessed() -> None:
    program = parse_pass("fastv").apply(WHOLE)
    shown = example(SITES["image and text"])
    with pytest.raises(ValueError, match=r"left text.2 is not chosen by its own"):
        evaluate_site(program, replace(TEXT[2], dims=shown.site.dims), shown.operands, shown.visual)


@pytest.mark.parametrize(
    "text",
    [
        "evit(keep=0.0)",
        "evit(layers=())",
        "merge(r=-1)",
        "fuse(r=1.0)",
        "fuse(sized=0.0)",
        "fastv(layer=0)",
        "fastv(drop=1.0)",
        "pyramid(layers=())",
        "pyramid(keep=1.5)",
        "cls_prune(keep=1)",
        "dominant_contextual(contextual=0)",
        "hired(alpha=1.5)",
        "hired(crops=(2,))",
        "matryoshka(tokens=0)",
    ],
)
def test_out_of_range(text: str) -> None:
    with pytest.raises(PassError, match="out of range"):
        parse_pass(text)


def test_counts() -> None:
    assert [Count(0.3, rounding).number(15, 15) for rounding in ("ceil", "floor", "round")] == [5, 4, 5]
    assert (Count(7).number(5, 9), Count(0.01).number(9, 9), Count(0.5, of="all").number(4, 6)) == (5, 1, 3)
    assert (Count(0.1).number(576, 576), Count(0.25).number(576, 576)) == (58, 144)
