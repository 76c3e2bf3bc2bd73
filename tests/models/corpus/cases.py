"""Which models of the corpus a run tests: those of the core by `make test`, all of them by `make test-corpus`."""

from __future__ import annotations

import os

from tests.models.corpus.entry import Entry
from tests.models.corpus.timm_table import TIMM
from tests.models.corpus.transformers_table import TRANSFORMERS

ENTRIES: tuple[Entry, ...] = TIMM + TRANSFORMERS
BY_NAME = {entry.name: entry for entry in ENTRIES}

# Set by `make test-corpus`.
EVERYTHING = os.environ.get("REWRITE_CORPUS") == "all"
# Outside the core, but alone in having a form of attention.
ALSO = frozenset({"groupvit", "llama-flex"})
CORE = tuple(entry for entry in ENTRIES if entry.core or entry.name in ALSO)
TESTED = ENTRIES if EVERYTHING else CORE

Case = tuple[Entry, str]


def cases(entries: tuple[Entry, ...] = TESTED) -> list[Case]:
    """Every entry with every implementation that it has; in the core each with one, the last, in which attention is written out."""
    return [(entry, each) for entry in entries for each in (entry.implementations if EVERYTHING else entry.implementations[-1:])]


def name_of(case: Case) -> str:
    return f"{case[0].name}-{case[1]}"
