"""Keys cut into pieces: the same results, whatever the number of pieces."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import attention_forms as forms
import interpreted
import pytest
import torch
from attention_forms import Shape, operands
from budget import expected, expected_lse, output_budget, score_error

from codegen.split_keys import LEAST_BLOCKS, join, partial_results, pieces_for, reason_against_split
from rewrite.ir import Attend

DECODING = Shape(n_queries=1, n_keys=131)
FORMS: dict[str, tuple[Attend, Shape]] = {
    "one query": (forms.causal(), DECODING),
    "a few queries": (forms.causal(), Shape(n_queries=5, n_keys=131)),
    "bias": (forms.biased("hij"), DECODING),
    "mask": (forms.masked("bij"), DECODING),
    "empty rows": (forms.empty_rows(), Shape(n_queries=7, n_keys=100)),
    "relative table": (forms.relative_table(), Shape(n_queries=3, n_keys=90)),
    "gated": (forms.gated("h"), DECODING),
    "neighbourhood": (forms.neighbourhood_1d(131, 7), Shape(n_queries=131, n_keys=131)),
}


@pytest.fixture(scope="module")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    with interpreted.start() as pool:
        yield pool


@pytest.mark.parametrize("pieces", [3, 20])
@pytest.mark.parametrize("form", FORMS)
def test_pieces_make_the_whole(interpreter: ProcessPoolExecutor, form: str, pieces: int) -> None:
    attend, shape = FORMS[form]
    values = operands(attend, shape)
    given = [values[name] for name in ("query", "key", "value", *attend.tensors())]
    out, lse = interpreter.submit(interpreted.run, attend.to_json(), given, (16, 16), pieces).result()
    assert not out.isnan().any()
    assert ((out.double() - expected(attend, values)).abs() <= 2 * output_budget(attend, values, torch.float32)).all()
    reference = expected_lse(attend, values)
    assert torch.equal(lse == -torch.inf, reference == -torch.inf)
    finite = reference.isfinite()
    assert (lse[finite].double() - reference[finite]).abs().le(2 * score_error(attend, values)).all()


def test_what_stays_whole_says_why() -> None:
    assert "masses" in str(reason_against_split(forms.grouped()))
    assert "softmax" in str(reason_against_split(forms.linear()))
    assert "sink" in str(reason_against_split(forms.sinks("h")))
    assert reason_against_split(forms.causal()) is None


def test_number_of_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("codegen.split_keys._multiprocessors", lambda device: 132)
    device = torch.device("cuda")
    assert pieces_for(8, 1000, device) == 16
    assert pieces_for(8, 10 * LEAST_BLOCKS, device) == 10
    assert pieces_for(132, 1000, device) == pieces_for(4096, 1000, device) == 1
    assert pieces_for(8, 1, device) == 1


def test_one_piece_is_the_result_itself() -> None:
    out, lse = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3)
    parts, part_lse = partial_results(out, lse, 1)
    assert parts.data_ptr() == out.data_ptr()
    join(parts, part_lse, out, lse)
    assert partial_results(out, lse, 3)[0].shape == (3, 1, 2, 3, 4)
