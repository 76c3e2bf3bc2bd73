"""Whether what recognition says of the tokens of a model's sites is what its table says."""

from __future__ import annotations

from collections import Counter
from typing import Any

from rewrite.ir.site import Site
from rewrite.recognise.sites import Recognition
from tests.models.corpus.entry import Entry, Sites
from tests.models.corpus.survey import read_from_data

# queries, keys, heads of one attention, and what is said of its tokens: grid, prefix, window
Problem = tuple[int, int, int]
ANY = 0  # heads
Facts = tuple[tuple[int, ...] | None, int, tuple[int, ...] | None]


def stated(group: Sites) -> Facts:
    """What a table says of the tokens of a group; a window that is its whole grid is none."""
    return group.grid, group.prefix if group.grid else 0, None if group.window == group.grid else group.window


def readings(site: Site) -> tuple[Facts, ...]:
    """The same of a recognised site. Tokens that lie apart by a stride are a dilated window to some tables, to others no local part."""
    layout = site.layout
    windows = (None,) if layout.window == layout.grid else (layout.window, None) if layout.partition == "grid" else (layout.window,)
    return tuple((layout.grid, layout.prefix, window) for window in windows)


def layout_differences(entry: Entry, recognition: Recognition) -> list[str]:
    """What was read wrong, in words, for the sites that were found; empty where all is as the table says.

    Sites are told apart by their sizes, and by heads where the graph has them on an axis of their own; the table may have more of a kind
    than were found, in any order.
    """
    wanted: dict[Problem, Counter[Facts]] = {}
    for group in entry.sites:
        for heads in (group.heads, ANY):
            wanted.setdefault((group.queries, group.keys, heads), Counter())[stated(group)] += group.count
    differences: list[str] = []
    for found in recognition.found:
        site = found.site
        queries, keys = site.dims["Nq"], site.dims["Nk"]
        problems = [p for p in ((queries, keys, site.dims["H"]), (queries, keys, ANY)) if p in wanted]
        if read_from_data(found):
            problems = list(wanted)
        right = [(problem, facts) for problem in problems for facts in readings(site) if wanted[problem][facts] > 0]
        if right:
            problem, facts = right[0]
            wanted[problem][facts] -= 1
            continue
        said = f"{queries} queries, {keys} keys, {site.dims['H']} heads on {_told(readings(site)[0])}"
        left = [_told(facts) for problem in problems[:1] for facts, count in wanted[problem].items() if count > 0]
        differences.append(f"{site.name}: {said}, the table has {' or '.join(left) or 'none such'}")
    return differences


def _told(facts: Any) -> str:
    grid, prefix, window = facts
    return f"grid {grid}, prefix {prefix}, window {window}"
