"""One figure a problem: error against time, and error against memory, both logarithmic."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hypergrad.bench.measure import Row
from hypergrad.bench.pareto import Cost, front, price
from hypergrad.bench.results import Results

_COLOURS = ("#1f4e9c", "#888888", "#d1711c", "#3f8f4f", "#b03060", "#7a52a3", "#8a6d3b", "#2a9d9d")
_MARKERS = ("o", "s", "^", "v", "D", "P", "X", "*")
_LEAST = 1e-16
"""Errors below are drawn here."""
_PLACES = (((5, -11), "left"), ((5, 5), "left"), ((-5, -11), "right"), ((-5, 5), "right"), ((5, -20), "left"))
"""Where a label may stand beside its point, in points of type, and on which side it begins."""


def draw(results: Results, folder: Path) -> list[str]:
    """Write NAME.png for each problem that has something to draw, and return the names of those."""
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    libraries = sorted({row.library for row in results.rows}, key=lambda name: (name != "hypergrad", name))
    drawn = []
    for problem in results.problems:
        rows = [row for row in results.rows if row.problem == problem and row.relative_error is not None]
        if not rows:
            continue
        figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.6), sharey=True)
        figure.subplots_adjust(left=0.07, right=0.98, bottom=0.12, top=0.9, wspace=0.05)
        _panel(axes[0], rows, libraries, "median", "seconds")
        _panel(axes[1], rows, libraries, "peak_bytes", "MiB above the start")
        axes[0].set_ylabel("relative error")
        figure.suptitle(f"{problem}: error against cost")
        figure.savefig(folder / file_name(problem), dpi=110)
        pyplot.close(figure)
        drawn.append(problem)
    return drawn


def file_name(problem: str) -> str:
    """Return the name of a problem's figure."""
    return problem.replace(":", "-") + ".png"


def _panel(axis: Any, rows: Sequence[Row], libraries: Sequence[str], cost: Cost, label: str) -> None:
    unit = 2**20 if cost == "peak_bytes" else 1
    least = 1e-2 if cost == "peak_bytes" else 0.0
    for index, library in enumerate(libraries):
        points = [row for row in rows if row.library == library and price(row, cost) is not None]
        if points:
            axis.scatter(
                [_across(row, cost, unit, least) for row in points],
                [_up(row) for row in points],
                marker=_MARKERS[index % len(_MARKERS)],
                facecolors=["none" if row.carried else _COLOURS[index % len(_COLOURS)] for row in points],
                edgecolors=_COLOURS[index % len(_COLOURS)],
                s=36,
                label=library,
                zorder=3,
            )
    best = front(rows, cost)
    axis.plot(
        [_across(row, cost, unit, least) for row in best],
        [_up(row) for row in best],
        color="#bbbbbb",
        drawstyle="steps-post",
        zorder=1,
    )
    axis.axhline(1.0, color="#cc4444", linewidth=0.8, linestyle=":")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.margins(x=0.2, y=0.1)
    axis.xaxis.set_minor_formatter(importlib.import_module("matplotlib.ticker").NullFormatter())
    axis.set_xlabel(label)
    axis.grid(True, which="major", color="#eeeeee", zorder=0)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, frameon=False, loc="best")
    _name(axis, [(row.label, (_across(row, cost, unit, least), _up(row))) for row in best])


def _name(axis: Any, points: Sequence[tuple[str, tuple[float, float]]]) -> None:
    """Write each point's label beside it where no label stands yet; one that finds no room is left to the table."""
    axis.figure.draw_without_rendering()
    taken: list[Any] = []
    for label, at in points:
        for where, side in _PLACES:
            text = axis.annotate(label, at, xytext=where, textcoords="offset points", fontsize=7, ha=side)
            box = text.get_window_extent()
            inside = axis.bbox.x0 <= box.x0 and box.x1 <= axis.bbox.x1
            if inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            text.remove()


def _across(row: Row, cost: Cost, unit: int, least: float) -> float:
    found = price(row, cost)
    assert found is not None
    return max(found / unit, least)


def _up(row: Row) -> float:
    assert row.relative_error is not None
    return max(row.relative_error, _LEAST)
