"""The demo's pictures: which tokens a layer works on, what a token sees, and what that costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

YELLOW, BLUE, GREY = "#ffd400", "#1f77b4", "#c8ccd2"
GIGA = 1e9


def draw_token_exit(photo: np.ndarray, kept: Sequence[int], grid: int, path: Path) -> Path:
    """The photograph once per layer of the language model, with the grid of the visual tokens that the layer works on."""
    columns = min(4, len(kept))
    rows = math.ceil(len(kept) / columns)
    figure = Figure(figsize=(3 * columns, 3.3 * rows + 0.4), layout="constrained")
    figure.suptitle("token_exit: the visual tokens that each layer of the language model works on", fontsize=13)
    for layer, (axes, count) in enumerate(zip(np.ravel(figure.subplots(rows, columns)), kept, strict=False)):
        _photograph(axes, photo if count else _faded(photo))
        if count:
            _grid_lines(axes, photo, grid)
        axes.set_title(f"layer {layer}: {count} visual tokens", fontsize=11, color="black" if count else "#a03020")
    figure.savefig(path, dpi=120, bbox_inches="tight")
    return path


@dataclass(frozen=True)
class Panel:
    """What one method keeps. seen: the share of the layers that see each patch, groups: which patches were merged into one, or None; both
    [grid, grid]."""

    title: str
    seen: np.ndarray
    groups: np.ndarray | None = None


def draw_kept(photo: np.ndarray, panels: Sequence[Panel], path: Path, heading: str) -> Path:
    """The photograph once per method: patches as bright as there are layers that see them, and merged ones in the mean of their colours."""
    columns = min(4, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(3.2 * columns, 3.6 * rows + 0.5), layout="constrained")
    figure.suptitle(heading, fontsize=13)
    for axes in np.ravel(figure.subplots(rows, columns, squeeze=False))[len(panels) :]:
        axes.remove()
    for axes, panel in zip(figure.axes, panels, strict=True):
        grid = len(panel.seen)
        of_patch = np.arange(photo.shape[0]) * grid // photo.shape[0]
        picture = photo if panel.groups is None else _merged(photo, panel.groups[of_patch][:, of_patch])
        share = panel.seen[of_patch][:, of_patch, None]
        _photograph(axes, share * picture + (1 - share) * _faded(photo))
        _grid_lines(axes, photo, grid)
        axes.set_title(panel.title.replace("(", "\n(", 1), fontsize=11)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    return path


def _merged(photo: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """The photograph with the pixels of each group, [height, width] of numbers, in their mean colour."""
    flat, counts = groups.ravel(), np.maximum(np.bincount(groups.ravel()), 1)
    means = np.stack([np.bincount(flat, photo[..., channel].ravel()) / counts for channel in range(3)], -1)
    return means[flat].reshape(photo.shape)


def draw_patches(photo: np.ndarray, grid: int, window: int, agents: int, path: Path) -> Path:
    """What one patch attends to with `neighborhood`, inside and at a corner, and what each agent is pooled from with `agent`."""
    figure = Figure(figsize=(13.5, 5.1), layout="constrained")
    inside, corner, pooled = figure.subplots(1, 3)
    for axes, query in ((inside, (grid // 2 - 1, grid // 2)), (corner, (0, grid - 2))):
        _draw_window(axes, photo, grid, window, query)
    inside.set_title(f"neighborhood: a patch (yellow) attends\nto the {window} x {window} around it", fontsize=12)
    corner.set_title("neighborhood: at the border the window\nis shifted, not cut", fontsize=12)
    side = math.isqrt(agents)
    _photograph(pooled, photo)
    _grid_lines(pooled, photo, grid)
    patch = photo.shape[0] / grid
    for row in range(side):
        for column in range(side):
            (top, bottom), (left, right) = _cell(row, grid, side), _cell(column, grid, side)
            inset = patch / 6
            corner = (left * patch + inset, top * patch + inset)
            extent = ((right - left) * patch - 2 * inset, (bottom - top) * patch - 2 * inset)
            pooled.add_patch(_box(corner, extent, YELLOW if (row + column) % 2 else BLUE, 2))
    overlap = "neighbours share patches" if grid % side else "no patch is in two"
    pooled.set_title(f"agent: {agents} agents, each the mean of the queries\nof the patches it outlines ({overlap})", fontsize=12)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    return path


def draw_costs(shown: Sequence[tuple[str, tuple[int, int], tuple[int, int]]], path: Path) -> Path:
    """Multiply-adds before and after, attention apart from everything else. shown: (label, attention, total), each (before, after)."""
    figure = Figure(figsize=(10, 1.5 + 1.1 * len(shown)), layout="constrained")
    axes = figure.subplots()
    for place, (label, attention, total) in enumerate(shown):
        for moment in (0, 1):
            y = place * 2.6 + moment
            rest = (total[moment] - attention[moment]) / GIGA
            axes.barh(y, rest, 0.85, color=GREY, label="everything else" if y == 0 else None)
            axes.barh(y, attention[moment] / GIGA, 0.85, left=rest, color=BLUE, label="attention: scores and values" if y == 0 else None)
            ratio = f"  ({total[0] / total[1]:.2f} times fewer)" if moment and total[1] != total[0] else ""
            axes.text(total[moment] / GIGA, y, f" {total[moment] / GIGA:.3g} G{ratio}", va="center", fontsize=10)
        axes.text(0, place * 2.6 - 0.6, label, va="bottom", fontsize=11, fontweight="bold")
    ticks = [place * 2.6 + moment for place in range(len(shown)) for moment in (0, 1)]
    axes.set_yticks(ticks, ["before", "after"] * len(shown))
    axes.invert_yaxis()
    axes.set_xlim(right=1.35 * max(total[0] for _, _, total in shown) / GIGA)
    axes.set_xlabel("multiply-adds of one forward pass (billions)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    return path


def _draw_window(axes: Axes, photo: np.ndarray, grid: int, window: int, query: tuple[int, int]) -> None:
    """The photograph bright where the query's window is, with the query marked. query: (row, column)."""
    # The window is shifted where it would leave the grid.
    starts = [min(max(place - window // 2, 0), grid - window) for place in query]
    rows, columns = (range(start, start + window) for start in starts)
    edges = [round(place * photo.shape[0] / grid) for place in (rows[0], rows[-1] + 1, columns[0], columns[-1] + 1)]
    lit = _faded(photo)
    lit[edges[0] : edges[1], edges[2] : edges[3]] = photo[edges[0] : edges[1], edges[2] : edges[3]]
    _photograph(axes, lit)
    _grid_lines(axes, photo, grid)
    patch = photo.shape[0] / grid
    axes.add_patch(_box((columns[0] * patch, rows[0] * patch), (window * patch, window * patch), BLUE, 3))
    axes.add_patch(_box((query[1] * patch, query[0] * patch), (patch, patch), YELLOW, 3))


def _cell(index: int, length: int, count: int) -> tuple[int, int]:
    """The patches [first, last) of one axis that adaptive average pooling of `length` to `count` puts into a cell."""
    return index * length // count, -(-(index + 1) * length // count)


def _box(corner: tuple[float, float], extent: tuple[float, float], color: str, line: float) -> Rectangle:
    """An outline from (left, top), of (width, height); matplotlib's pixels are centred on whole numbers, hence the half."""
    return Rectangle((corner[0] - 0.5, corner[1] - 0.5), *extent, fill=False, edgecolor=color, linewidth=line)


def _photograph(axes: Axes, photo: np.ndarray) -> None:
    """The photograph without axes; set_axis_off() would leave titles out of the layout."""
    axes.imshow(photo)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def _faded(photo: np.ndarray) -> np.ndarray:
    """The photograph in pale grey."""
    grey = photo.mean(axis=-1, keepdims=True).repeat(3, axis=-1)
    return 0.75 + 0.25 * grey


def _grid_lines(axes: Axes, photo: np.ndarray, grid: int) -> None:
    size = photo.shape[0]
    places = np.arange(grid + 1) * size / grid - 0.5
    axes.hlines(places, -0.5, size - 0.5, color="white", linewidth=0.5, alpha=0.7)
    axes.vlines(places, -0.5, size - 0.5, color="white", linewidth=0.5, alpha=0.7)
