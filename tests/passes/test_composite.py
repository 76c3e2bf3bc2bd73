"""Visual tokens see themselves alone, with and without a cache, padding and shared heads."""

from __future__ import annotations

import pytest
import torch
from synthetic_sites import SITES, example
from test_every_pass import applied

from passes import Composite
from rewrite.ir import Program

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
