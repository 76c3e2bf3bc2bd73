"""Whether what recognition says of the tokens of a model's sites is what its table says."""

from __future__ import annotations

from collections import Counter
from typing import Any

from rewrite.ir.site import Site
from rewrite.recognise.sites import Recognition
from tests.models.corpus.entry import Entry, Sites

# queries, keys, heads of one attention, and what is said of its tokens: grid, prefix, window
Problem = tuple[int, int, int]
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
        if group.kind != "linear":
            for heads in (group.heads, 0):
                wanted.setdefault((group.queries, group.keys, heads), Counter())[stated(group)] += group.count
    differences: list[str] = []
    for found in recognition.found:
        site = found.site
        problem = (site.dims["Nq"], site.dims["Nk"], site.dims["H"])
        problem = problem if problem in wanted else (*problem[:2], 0)
        if problem not in wanted:
            differences.append(f"{site.name}: no site of {_told(problem)} is in the table")
        elif right := [facts for facts in readings(site) if wanted[problem][facts] > 0]:
            wanted[problem][right[0]] -= 1
        else:
            left = [told for told, count in wanted[problem].items() if count > 0]
            said = f"{_told(problem)} lies on {_facts(readings(site)[0])}"
            differences.append(f"{site.name}: {said}, the table has {' or '.join(map(_facts, left))}")
    return differences


def _told(problem: Problem) -> str:
    return "{} queries, {} keys, {} heads".format(*problem).replace(", 0 heads", "")


def _facts(facts: Any) -> str:
    grid, prefix, window = facts
    return f"grid {grid}, prefix {prefix}, window {window}"
