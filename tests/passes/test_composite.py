"""Visual tokens see themselves alone, with and without a cache, padding and shared heads."""

from __future__ import annotations

import json
from typing import Any

import pytest
import sympy
import torch
from synthetic_sites import CAUSAL, SITES, example, site
from test_every_pass import applied

from codegen.fused_block import fused_block
from codegen.score_block import ScoreBlock
from codegen.tile_list import tile_list
from codegen.tile_masks import split_tiles
from codegen.torch_streaming import attend_forward
from passes import Composite
from rewrite.ir import Program
from rewrite.ir.expression import to_json

VISUAL_SITES = [name for name, case in SITES.items() if case.layout.visual and not case.map_read]


@pytest.mark.parametrize("case", VISUAL_SITES)
def test_visual_queries_keep_their_value_and_text_what_it_had(case: str) -> None:
    shown, program = example(SITES[case]), applied(Composite(), case)
    assert program.touched
    queries = SITES[case].dims["Nq"]
    visual, value = shown.visual[:, -queries:], shown.inputs({}).value[:, :, -queries:]
    output, before = shown.output(program, {}), shown.output(Program((SITES[case],)), {})
    for row in range(len(visual)):
        torch.testing.assert_close(output[row, :, visual[row]], value[row, :, visual[row]])
        torch.testing.assert_close(output[row, :, ~visual[row]], before[row, :, ~visual[row]], rtol=0, atol=0)


def test_new_images_behind_a_cache() -> None:
    """Four new tokens, two of them visual, behind keys of any kind."""
    shown = example(SITES["step of four"])
    visual = torch.tensor([[False, True, True, False]] * 2)
    shown.visual[:, -4:] = visual
    shown.operands["visual"][:] = visual
    output = shown.output(applied(Composite(), "step of four"), {})
    torch.testing.assert_close(output[:, :, 1:3], shown.inputs({}).value[:, :, -3:-1])
    torch.testing.assert_close(output, Composite().reference(shown.inputs({})))


def test_blocks_of_visual_queries_visit_themselves_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the torch lowering and in the lists that kernels walk; 640 tokens, of which 70 to 549 are an image."""
    tokens, image = 640, range(70, 550)
    before = site(tokens, mask=CAUSAL, visual=True)
    (changed,) = Composite().apply(Program((before,))).sites
    shown = example(before)
    shown.visual[:] = False
    shown.visual[:, image] = True
    query, key, value = (shown.operands[name].float() for name in ("query", "key", "value"))
    visits: list[tuple[range, int]] = []

    def counted(block: ScoreBlock, operands: tuple[torch.Tensor, ...], *rest: Any) -> Any:
        visits.append((range(tokens)[block.visit.rows], operands[1].shape[2]))
        return fused_block(block, operands, *rest)

    monkeypatch.setattr("codegen.torch_streaming.fused_block", counted)
    out, _ = attend_forward(changed.attend, query, key, value, {"visual": shown.visual})
    expected = Composite().reference(shown.inputs({}))
    assert (out - expected).abs().max() <= 64 * torch.finfo(torch.float32).eps * expected.abs().max()
    assert sum(len(rows) for rows, _ in visits) == tokens
    assert sum(rows[0] in image and rows[-1] in image for rows, _ in visits) > 1
    for rows, keys in visits:
        assert keys == (len(rows) if rows[0] in image and rows[-1] in image else rows[-1] + 1)

    monkeypatch.setattr("codegen.tile_list.LEAST_WORK", 0)
    split = split_tiles(changed.attend)
    predicate = json.dumps(to_json(sympy.And(split.by_position, split.by_tile)))
    found = tile_list(predicate, {"visual": shown.visual}, (query, key, value), (64, 32))
    for block in range(tokens // 64):
        cut = found.blocks[found.starts[2 * block] : found.starts[2 * block + 2]].tolist()
        rows = range(64 * block, 64 * block + 64)
        assert sorted(cut) == list(range(0 if set(rows) - set(image) else 2 * block, 2 * block + 2)), block


@pytest.mark.parametrize(
    ("setting", "case", "words"),
    [
        (Composite(), "text", "no visual tokens"),
        (Composite(layers=(0,)), "image and text", "layers=(0,) leaves that one out"),
    ],
)
def test_declines(setting: Composite, case: str, words: str) -> None:
    ((_, _, reason),) = setting.apply(Program((SITES[case],))).declined
    assert words in reason
