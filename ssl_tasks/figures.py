"""The pictures of a run: gains over a control, accuracy by stage, curves over the steps, features in the plane."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ssl_tasks.report import Estimate, gains, summary
from ssl_tasks.saving import whole
from ssl_tasks.store import Row
from ssl_tasks.system import Experiment

LIGHT, DARK = "#9db8d9", "#1f3b60"


def draw(out: Path, rows: Sequence[Row], experiment: Experiment) -> list[Path]:
    """Write the pictures that the rows allow, each whole or not at all, and return their paths.

    figure.png: a panel a measure with each arm's paired gain over the reference, a dot a seed. stages.png: the probe
    at the start, the probe at the end, the fine-tuned accuracy. curves.png: what the arms noted by step.
    features.png: test images of the first seed in the plane of their features' two leading components.
    """
    written = []
    if len(experiment.arms) > 1:
        written.append(_save(out / "figure.png", _gains(rows, experiment)))
        written.append(_save(out / "stages.png", _stages(rows, experiment)))
    if any(row.curves for row in rows):
        written.append(_save(out / "curves.png", _curves(rows, experiment)))
    if any(row.plane for row in rows):
        written.append(_save(out / "features.png", _planes(rows, experiment)))
    return written


def _canvas(width: float, height: float, panels: int, **options: Any) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(canvas)
    return canvas, canvas.subplots(1, panels, squeeze=False, **options)[0]


def _save(path: Path, canvas: Any) -> Path:
    with whole(path) as part:
        canvas.savefig(part, dpi=150)
    return path


def _gains(rows: Sequence[Row], experiment: Experiment) -> Any:
    over, measures = experiment.over, experiment.panels
    arms = list(gains(rows, over=over, measure=next(iter(measures))))
    canvas, panels = _canvas(4.6 * len(measures) + 1.4, 0.42 * len(arms) + 1.7, len(measures), sharey=True)
    for panel, (measure, heading) in zip(panels, measures.items(), strict=True):
        gained = gains(rows, over=over, measure=measure)
        for height, arm in enumerate(arms):
            estimate = Estimate.of(gained[arm])
            error = None if math.isnan(estimate.stderr) else estimate.stderr
            panel.barh(height, estimate.mean, xerr=error, height=0.55, color=LIGHT, ecolor=DARK, capsize=3)
            panel.plot(gained[arm], [height] * len(gained[arm]), "o", color=DARK, ms=3, alpha=0.6)
        panel.axvline(0, color="black", lw=0.8)
        panel.set_yticks(range(len(arms)), arms)
        panel.set_title(heading, fontsize=10)
        panel.set_xlabel(f"gain over {over}", fontsize=9)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    canvas.suptitle(f"{experiment.title}: {experiment.source.data}", fontsize=11)
    return canvas


def _stages(rows: Sequence[Row], experiment: Experiment) -> Any:
    found = summary(rows)
    first = next(iter(found.values()))["probe"]  # the first arm is the start as it is
    canvas, (panel,) = _canvas(6.4, 4.0, 1)
    for k, (arm, estimates) in enumerate(found.items()):
        stages = [first, estimates["probe"], estimates["fine_tuned"]]
        error = [0.0 if math.isnan(e.stderr) else e.stderr for e in stages]
        x = np.arange(3) + 0.03 * (k - len(found) / 2)
        panel.errorbar(x, [e.mean for e in stages], yerr=error, marker="o", ms=4, lw=1.3, capsize=2, label=arm)
    panel.set_xticks(range(3), ["probe at\nthe start", "probe at\nthe end", "fine-tuned"])
    panel.set_ylabel("test accuracy, %")
    panel.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    panel.spines[["top", "right"]].set_visible(False)
    canvas.suptitle(f"{experiment.title}: accuracy by stage", fontsize=11)
    return canvas


def _curves(rows: Sequence[Row], experiment: Experiment) -> Any:
    names = list(dict.fromkeys(name for row in rows for name in row.curves))
    canvas, panels = _canvas(4.6 * len(names) + 0.6, 3.4, len(names))
    colours = _colours([row.arm for row in rows if row.curves])
    for panel, name in zip(panels, names, strict=True):
        for arm, colour in colours.items():
            runs = [_smooth(row.curves[name]) for row in rows if row.arm == arm and name in row.curves]
            for run in runs:
                panel.plot(run, color=colour, lw=0.7, alpha=0.35)
            if runs:
                length = min(len(run) for run in runs)
                panel.plot(np.mean([run[:length] for run in runs], 0), color=colour, lw=1.6, label=arm)
        panel.set_xlabel("step")
        panel.set_ylabel(experiment.curves.get(name, name))
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].legend(fontsize=8, frameon=False)
    canvas.suptitle(f"{experiment.title}: over the steps", fontsize=11)
    return canvas


def _smooth(values: Sequence[float]) -> np.ndarray:
    """Return running means over a fortieth of the curve."""
    window = max(1, len(values) // 40)
    return np.convolve(np.asarray(values, float), np.ones(window) / window, mode="valid")


def _colours(arms: Sequence[str]) -> Mapping[str, str]:
    return {arm: f"C{k}" for k, arm in enumerate(dict.fromkeys(arms))}


def _planes(rows: Sequence[Row], experiment: Experiment) -> Any:
    shown = [row for row in rows if row.plane]
    canvas, panels = _canvas(3.0 * len(shown) + 0.4, 3.3, len(shown))
    for panel, row in zip(panels, shown, strict=True):
        x, y, label = (np.asarray(column) for column in zip(*row.plane, strict=True))
        panel.scatter(x, y, c=label, cmap="tab10", s=5, linewidths=0)
        panel.set_title(row.arm, fontsize=9)
        panel.set_xticks([])
        panel.set_yticks([])
    canvas.suptitle(f"{experiment.title}: test features, two leading components, a colour a class", fontsize=11)
    return canvas
