"""Every kernel form in Triton's interpreter against the float64 reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor

import attention_forms as forms
import interpreted
import pytest
import torch
from attention_forms import Shape, operands
from budget import expected, expected_lse, output_budget, score_error
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from codegen.tiles import Tile
from rewrite.ir import Attend

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Forms that take any number of queries and keys.
ANY_SIZE: dict[str, Callable[[], Attend]] = {
    "plain": forms.plain,
    **{f"bias {axes}": (lambda axes=axes: forms.biased(axes)) for axes in ("hij", "bhij", "ij", "bij")},
    **{f"mask {axes}": (lambda axes=axes: forms.masked(axes)) for axes in ("bij", "bhij")},
    "mask of blocks": forms.masked_by_block,
    "causal": forms.causal,
    "softcap": forms.softcap,
    "empty rows": forms.empty_rows,
    "grouped": forms.grouped,
    "grouped, every pair": lambda: forms.grouped(False),
    "grouped by head": forms.grouped_by_head,
}

NEIGHBOURHOODS: dict[str, tuple[Attend, int]] = {
    "1-D": (forms.neighbourhood_1d(33, 7), 33),
    "1-D, dilated, prefix": (forms.neighbourhood_1d(33, 5, 2, 2), 35),
    "2-D": (forms.neighbourhood_2d(5, 7, 3), 35),
    "2-D, dilated, prefix": (forms.neighbourhood_2d(6, 7, 3, 2, 1), 43),
}

# Beyond softmax attention: what streams all the same.
STREAMED: dict[str, Callable[[], Attend]] = {
    **{f"sink {axes}": (lambda axes=axes: forms.sinks(axes)) for axes in ("", "h", "bhi")},
    "sink, empty rows": forms.sinks_and_empty_rows,
    "decomposed position": forms.decomposed_position,
    "relative table": forms.relative_table,
    "guarded table": forms.guarded_table,
    "linear": forms.linear,
    "rectified": forms.rectified,
    "rectified or scaled by head": forms.rectified_or_scaled,
    "sigmoid": forms.sigmoid,
    "sigmoid, bias by row": forms.flash_sigmoid,
    "temperature by row": forms.row_temperature,
    **{f"gated {axes}": (lambda axes=axes: forms.gated(axes)) for axes in ("h", "bhij")},
    "gated, rectified": forms.gated_rectified,
}

# And what does not: it is known only after all keys, or needs all heads.
NOT_STREAMED: dict[str, Callable[[], Attend]] = {
    "positional gate": forms.positional_gate,
    "renormalised": forms.renormalised,
    "offset under a mask": forms.offset_under_a_mask,
    "talking heads": forms.talking_heads,
    "talking heads without bias": lambda: forms.talking_heads(False),
    "everything": forms.everything,
}

few = settings(max_examples=3, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    with interpreted.start() as pool:
        yield pool


def shapes(sizes: st.SearchStrategy[tuple[int, int]]) -> st.SearchStrategy[Shape]:
    def build(batch: int, heads: tuple[int, int], size: tuple[int, int], widths: tuple[int, int]) -> Shape:
        return Shape(batch, *heads, *size, *widths)

    lengths = st.sampled_from([(2, 2), (2, 1), (3, 3)])
    widths = st.sampled_from([(8, 8), (16, 24), (40, 40), (64, 64), (80, 16), (128, 128), (256, 256)])
    return st.builds(build, st.integers(1, 2), lengths, sizes, widths)


ODD = st.sampled_from([(1, 1), (17, 17), (1, 37), (37, 19), (19, 37), (33, 48)])


def check(interpreter: ProcessPoolExecutor, attend: Attend, shape: Shape, dtype: torch.dtype, broadcast: bool) -> None:
    values = operands(attend, shape, dtype, broadcast=broadcast)
    given = [values[name] for name in ("query", "key", "value", *attend.tensors())]
    job = interpreter.submit(interpreted.run, attend.to_json(), given, (16, 16))
    out, lse = job.result()
    assert out.dtype == dtype
    assert not out.isnan().any()
    assert ((out.double() - expected(attend, values)).abs() <= output_budget(attend, values, dtype)).all()
    reference = expected_lse(attend, values)
    assert torch.equal(lse == -torch.inf, reference == -torch.inf)
    finite = reference.isfinite()
    assert (lse[finite].double() - reference[finite]).abs().le(2 * score_error(attend, values)).all()


@pytest.mark.parametrize("form", ANY_SIZE)
@few
@given(shape=shapes(ODD), dtype=st.sampled_from(DTYPES), broadcast=st.booleans())
def test_form(interpreter: ProcessPoolExecutor, form: str, shape: Shape, dtype: torch.dtype, broadcast: bool) -> None:
    check(interpreter, ANY_SIZE[form](), shape, dtype, broadcast)


@pytest.mark.parametrize("form", STREAMED)
@few
@given(shape=shapes(ODD), dtype=st.sampled_from(DTYPES), broadcast=st.booleans())
def test_unusual_form(interpreter: ProcessPoolExecutor, form: str, shape: Shape, dtype: torch.dtype, broadcast: bool) -> None:
    check(interpreter, STREAMED[form](), shape, dtype, broadcast)


@pytest.mark.parametrize("form", NEIGHBOURHOODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neighbourhood(interpreter: ProcessPoolExecutor, form: str, dtype: torch.dtype) -> None:
    attend, n = NEIGHBOURHOODS[form]
    check(interpreter, attend, Shape(1, 2, 1, n, n, 16, 16), dtype, False)


def test_a_row_that_sees_nothing_is_zero(interpreter: ProcessPoolExecutor) -> None:
    attend = forms.empty_rows()
    values = operands(attend, Shape(1, 1, 1, 9, 9))
    out, lse = interpreter.submit(interpreted.run, attend.to_json(), list(values.values()), (16, 16)).result()
    assert (out[:, :, 1::3] == 0).all()
    assert (lse[:, :, 1::3] == -torch.inf).all()
    assert (lse[:, :, ::3] > -torch.inf).all()


def test_compilation_says_that_kernels_are_interpreted(interpreter: ProcessPoolExecutor) -> None:
    said = interpreter.submit(interpreted.compile_while_interpreting, forms.plain().to_json()).result()
    assert "TRITON_INTERPRET" in said


def test_launches_take_the_tuned_tiles(interpreter: ProcessPoolExecutor) -> None:
    """Forward and backward, with a made-up timer; the second time nothing is timed."""
    attend = forms.biased("hij")
    values = operands(attend, Shape(1, 1, 1, 20, 20, 16, 16))
    given = [values[name] for name in ("query", "key", "value", *attend.tensors())]
    forward, keys = Tile(32, 16, 4, 2), Tile(16, 32, 4, 2)
    for timings in (True, False):
        out, seen, timed = interpreter.submit(interpreted.run_tuned, attend.to_json(), given, [forward]).result()
        assert ((out.double() - expected(attend, values)).abs() <= output_budget(attend, values, torch.float32)).all()
        assert seen == {"attend_biased": forward}
        assert (timed > 1) == timings
        gradients, seen, timed = interpreter.submit(interpreted.run_tuned, attend.to_json(), given, [forward, keys]).result()
        assert seen == {"attend_backward_biased_queries": forward, "attend_backward_biased_keys": keys}
        assert (timed > 1) == timings
        plain = interpreter.submit(interpreted.run_tuned, attend.to_json(), given, []).result()[0]
        for got, wanted in zip(gradients, plain, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
