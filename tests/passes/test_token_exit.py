"""One exit per stack of a language model, and none elsewhere."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from synthetic_sites import IMAGE, SITES, example

from passes import TokenExit
from rewrite.ir import Exit, NotApplicableError, PassError, Program, Site


def stack(number: int, case: str, depth: int) -> tuple[Site, ...]:
    return tuple(
        replace(SITES[case], name=f"stack{number}.layers.{layer}", layer=layer, depth=depth, stack=number) for layer in range(depth)
    )


VISION, LANGUAGE = stack(0, "grid, CLS", 3), stack(1, "image and text", 6)


def test_the_language_model_is_left_half_way_and_the_vision_tower_alone() -> None:
    program = TokenExit().apply(Program(VISION + LANGUAGE))
    assert program.exits == (Exit(stack=1, layer=3, by="token_exit"),)
    assert program.touched == tuple((f"stack1.layers.{layer}", "token_exit") for layer in (3, 4, 5))
    left = tuple(replace(site, layout=replace(site.layout, visual=False)) for site in LANGUAGE[3:])
    assert program.sites == VISION + LANGUAGE[:3] + left
    reasons = {name: reason for name, _, reason in program.declined}
    assert [*reasons] == [*(f"stack0.layers.{layer}" for layer in range(3)), *(f"stack1.layers.{layer}" for layer in range(3))]
    assert "no visual tokens" in reasons["stack0.layers.0"]
    assert "before layer 3" in reasons["stack1.layers.2"]


@pytest.mark.parametrize("setting", [TokenExit("never"), TokenExit(6)])
def test_tokens_that_never_leave_change_nothing(setting: TokenExit) -> None:
    program = setting.apply(Program(LANGUAGE))
    assert not program.exits
    assert not program.touched
    assert all("changes nothing" in reason for _, _, reason in program.declined)


def test_a_layer_beyond_the_stack_is_an_error() -> None:
    with pytest.raises(NotApplicableError, match=r"token_exit\(layer=7\): stack1.layers.0 is in a stack of 6 layers"):
        TokenExit(7).apply(Program(VISION + LANGUAGE))
    assert not TokenExit(7).apply(Program(VISION)).exits


def test_a_later_layer_that_cannot_be_changed_keeps_the_tokens_everywhere() -> None:
    sites = (*LANGUAGE[:5], replace(LANGUAGE[5], map_read=True))
    program = TokenExit().apply(Program(sites))
    assert not program.exits
    reasons = {name: reason for name, _, reason in program.declined}
    assert "stack1.layers.5" in reasons["stack1.layers.3"]
    assert "map is read" in reasons["stack1.layers.3"]
    assert TokenExit().apply(Program((replace(LANGUAGE[0], map_read=True), *LANGUAGE[1:]))).exits


def test_a_decoding_step_sees_no_visual_token_in_the_cache() -> None:
    shown = example(replace(SITES["step of one"], layer=4))
    program = TokenExit(4).apply(Program((shown.site,)))
    changed = {**shown.operands, "value": shown.operands["value"].clone()}
    for row in range(2):
        changed["value"][row, :, [row + token for token in IMAGE]] = 1e3
    assert torch.equal(replace(shown, operands=changed).output(program, {}), shown.output(program, {}))


def test_out_of_range() -> None:
    with pytest.raises(PassError, match=r"token_exit: layer=-1 is out of range"):
        TokenExit(-1)
