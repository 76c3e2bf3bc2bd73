"""What a later capture may lose of what the analysis promised."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import sympy
from torch import nn

from rewrite.ir import CHANGES_NOTHING, QK, Attend, Body, Program, Site, TokenLayout
from rewrite.report import Report
from rewrite.session import Session

NAME, PASS = "layers.0.attn", "some_pass"


def later(reason: str) -> tuple[Session, SimpleNamespace]:
    """A session that was promised a pass at a site, and the record of a graph in which the pass declined it."""
    site = Site(
        name=NAME,
        layer=0,
        depth=1,
        stack=0,
        kind="self",
        body=Body((Attend("output", "query", "key", "value", score=sympy.Rational(1, 2) * QK),)),
        dims={"B": 1, "H": 1, "Hkv": 1, "Nq": 1, "Nk": 8, "D": 4, "Dv": 4},
        layout=TokenLayout(visual=True),
        operands=("query", "key", "value"),
    )
    session = Session(nn.Identity(), (), "eager")
    session.report = Report((PASS,))
    session.report.sites.append(SimpleNamespace(qualified_name=NAME, passes=(PASS,), kind="self"))  # type: ignore[arg-type]
    recognition = SimpleNamespace(found=[SimpleNamespace(site=site)])
    return session, SimpleNamespace(
        program=Program((site,)).with_declined(site, PASS, reason), misses=[], merges=False, recognition=recognition
    )


def test_what_is_declined_is_said() -> None:
    session, record = later("its keys are too many")
    with pytest.warns(UserWarning, match="layers.0.attn runs without some_pass: its keys are too many"):
        session._check_kept(record)  # type: ignore[arg-type]


def test_where_there_is_nothing_to_change_nothing_is_lost() -> None:
    session, record = later(f"it has one query: the pass {CHANGES_NOTHING} here")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        session._check_kept(record)  # type: ignore[arg-type]
