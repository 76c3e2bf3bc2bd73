"""Programs that share the key blocks of all tiles: the same results, however many they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import attention_forms as forms
import interpreted
import pytest
import sympy
import torch
from attention_forms import Shape, operands
from budget import expected, expected_lse, output_budget, score_error
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from codegen import TARGETS as CAPABILITIES
from codegen import emit
from codegen.block_list import block_list
from codegen.masks import static_key
from codegen.split_kernel import WARPS_OF_GROUPS
from codegen.split_keys import LEAST_BLOCKS, MOST_TURNS, MOST_WEIGHTS, list_owners, reason_against_split, units_for
from codegen.tiles import tile_for
from rewrite.ir import Attend, Groups, I, J, RewriteError


def window(size: int = 40, sinks: int = 4) -> Attend:
    """As a step of decoding has it: rows whose lists are of uneven length."""
    attend = forms.causal()
    far = attend.mask.args[1] - J
    return replace(attend, mask=sympy.And(attend.mask, sympy.Or(sympy.Lt(J, sinks), sympy.Lt(far, size))))


FORMS: dict[str, Callable[[], Attend]] = {
    "plain": forms.plain,
    "causal": forms.causal,
    "window": window,
    "bias": lambda: forms.biased("hij"),
    "mask": lambda: forms.masked("bij"),
    "empty rows": forms.empty_rows,
    "no key at all": lambda: replace(forms.plain(), mask=sympy.And(J < 0, I >= 0)),
    "packed": lambda: forms.packed(forms.causal().mask),
    "relative table": forms.relative_table,
    "gated": lambda: forms.gated("h"),
    "sinks": lambda: forms.sinks("bhi"),
    "sinks, empty rows": forms.sinks_and_empty_rows,
    "groups": forms.grouped,
    "groups by head": forms.grouped_by_head,
    "linear": forms.linear,
    "rectified": forms.rectified,
    "sigmoid": forms.flash_sigmoid,
}


@pytest.fixture(scope="module")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    with interpreted.start() as pool:
        yield pool


def check(interpreter: ProcessPoolExecutor, attend: Attend, shape: Shape, dtype: torch.dtype, units: int) -> None:
    values = operands(attend, shape, dtype)
    given_ = [values[name] for name in ("query", "key", "value", *attend.tensors())]
    out, lse = interpreter.submit(interpreted.run, attend.to_json(), given_, (16, 16), units).result()
    assert not out.isnan().any()
    # Joined in another order than the budget's: each part's sum is off once more.
    assert ((out.double() - expected(attend, values)).abs() <= 2 * output_budget(attend, values, dtype)).all()
    reference = expected_lse(attend, values)
    assert torch.equal(lse == -torch.inf, reference == -torch.inf)
    finite = reference.isfinite()
    assert (lse[finite].double() - reference[finite]).abs().le(2 * score_error(attend, values)).all()


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=2, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(
    batch=st.integers(1, 2),
    heads=st.sampled_from([(2, 2), (2, 1)]),
    n_queries=st.sampled_from([1, 1, 5, 21]),
    n_keys=st.sampled_from([1, 37, 70, 99]),
    head_dim=st.sampled_from([8, 24, 64]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    units=st.sampled_from([1, 2, 3, 7, 50]),
)
def test_shares_make_the_whole(
    interpreter: ProcessPoolExecutor,
    form: str,
    batch: int,
    heads: tuple[int, int],
    n_queries: int,
    n_keys: int,
    head_dim: int,
    dtype: torch.dtype,
    units: int,
) -> None:
    check(interpreter, FORMS[form](), Shape(batch, *heads, n_queries, n_keys, head_dim, head_dim), dtype, units)


def test_shares_of_uneven_lists(interpreter: ProcessPoolExecutor) -> None:
    """Tiles of one and of many blocks, and some of none between them: programs that hold many tiles, and tiles of many programs."""
    some = sympy.Or(sympy.Lt(I, 16), sympy.And(I >= 64, I < 80, J < 5), I >= 112)
    attend = replace(forms.plain(), mask=sympy.And(some, J >= 0))
    for units in (2, 11):
        check(interpreter, attend, Shape(1, 2, 1, 130, 67), torch.float32, units)


def test_results_repeat(interpreter: ProcessPoolExecutor) -> None:
    attend = forms.grouped()
    values = operands(attend, Shape(1, 2, 1, 3, 90))
    given_ = [values[name] for name in ("query", "key", "value", *attend.tensors())]
    first, again = (interpreter.submit(interpreted.run, attend.to_json(), given_, (16, 16), 7).result() for _ in range(2))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])


def test_owners_of_visits() -> None:
    """Every visit of the list is its owner's."""
    cpu = torch.device("cpu")
    for attend in (window(), forms.empty_rows(), forms.neighbourhood_1d(70, 7)):
        static = static_key(attend.mask)
        made, owners = (function(static, 70, 70, (16, 16), cpu) for function in (block_list, list_owners))
        counts = torch.bincount(owners.tiles.long(), minlength=5)
        assert counts.tolist() == (made.starts[2::2] - made.starts[:-2:2]).tolist()
        assert owners.longest == counts.max()
        assert len(owners.tiles) == len(made.blocks) - 1


def test_what_stays_whole_says_why() -> None:
    names = tuple(f"group{index}" for index in range(MOST_WEIGHTS + 1))
    many = replace(forms.plain(), groups=Groups("member", names, tuple(sympy.Integer(index + 1) for index in range(len(names)))))
    assert f"{MOST_WEIGHTS + 1} weights other than 0" in str(reason_against_split(many))
    assert all(reason_against_split(form()) is None for form in FORMS.values())
    with pytest.raises(RewriteError, match="no form 'split'"):
        emit(many).compile(form="split")


def test_number_of_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("codegen.split_keys.multiprocessors", lambda device: 132)
    device = torch.device("cuda")

    def units(tiles: int, blocks: int) -> int:
        return units_for(tiles, tiles * blocks, blocks, device)

    assert units(8, 1000) == units(100, 1000) == 132
    assert units(8, 10 * LEAST_BLOCKS) == 8 * 10
    # One turn and a single tile: shared out, all are done after little more than a turn.
    assert units(133, 1000) == 132
    # Nothing to gain, too little to do, or too many tiles.
    assert units(132, 1000) == units(1, 1) == units(100, LEAST_BLOCKS) == units(MOST_TURNS * 132 + 1, 1000) == 0
    # Two tiles of uneven lists.
    assert units_for(132, 132 * 10, 100, device) == 132


@pytest.mark.parametrize("form", ["causal", "groups"])
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_nothing_spills(form: str, target: str) -> None:
    kernel, tile = emit(FORMS[form]()), tile_for(128, 128, 2, CAPABILITIES[target], n_queries=1)
    tile = tile._replace(warps=WARPS_OF_GROUPS) if form == "groups" else tile
    for part in ("split", "join"):
        assert kernel.compile(target, torch.bfloat16, 128, tile=tile, form=part).spills == 0
