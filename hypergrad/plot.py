"""`hypergrad plot RUN`: the curves of a run, from what `callbacks.JSONLines` wrote."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Line = Mapping[str, Any]
Curve = tuple[list[float], list[float]]

_PANELS = (
    ("loss", "losses"),
    ("grad_norm", "hypergradient norms"),
    ("residual_norm", "residuals of the solves"),
    ("stationarity", "stationarity of the solutions"),
)
_TIME = "share of the host's time, %"
_LEFT_OUT = ("result", "num_products", "num_steps")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("path", metavar="RUN", type=Path, help="a file of JSON lines, or a folder that holds one")
    parser.add_argument("--out", type=Path, help="where the figure goes (default: curves.png beside the file)")


def run(options: argparse.Namespace) -> int:
    """Draw the figure, print where it is, and return 0."""
    file = find(options.path)
    out = options.out or file.with_name("curves.png")
    draw(read(file), out, title=f"{file.resolve().parent.name}/{file.name}")
    print(out)
    return 0


def find(path: Path) -> Path:
    """Return the file of a run: `path` itself, or the only file of JSON lines in that folder.

    Raises:
        ValueError: where there is none, or several.
    """
    if path.is_file():
        return path
    found = sorted(path.glob("*.jsonl"))
    if len(found) != 1:
        what = "no file" if not found else f"{len(found)} files ({', '.join(p.name for p in found)})"
        raise ValueError(f"{path} holds {what} of JSON lines (*.jsonl). Name the file that callbacks.JSONLines wrote.")
    return found[0]


def read(file: Path) -> list[Line]:
    """Return the lines of a run; a last one that was cut short is left out.

    Raises:
        ValueError: if there is no whole line, or one that is not what `JSONLines` writes.
    """
    lines: list[Line] = []
    for number, text in enumerate(file.read_text(encoding="utf-8").splitlines(keepends=True), start=1):
        if not text.endswith("\n"):
            continue
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}, line {number} is no JSON: {error}.") from error
        if not isinstance(line, dict) or "step" not in line:
            raise ValueError(f"{file}, line {number} has no step: is this a file that callbacks.JSONLines wrote?")
        lines.append(line)
    if not lines:
        raise ValueError(f"{file} has no whole line yet.")
    return lines


def curve(lines: Sequence[Line], key: str) -> Curve:
    """Return the steps and the values of one quantity; a value that was not finite is a gap."""
    points = [(line["step"], math.nan if line[key] is None else line[key]) for line in lines if key in line]
    return [x for x, _ in points], [y for _, y in points]


def panels(lines: Sequence[Line]) -> dict[str, dict[str, Curve]]:
    """Return what is drawn: title -> label -> curve."""
    keys = list(dict.fromkeys(key for line in lines for key in line if "." in key))
    found: dict[str, dict[str, Curve]] = {title: {} for _, title in _PANELS}
    phases, metrics = [key for key in keys if key.startswith("seconds.")], {}
    for key in (key for key in keys if key not in phases):
        problem, quantity = key.split(".", 1)
        title = dict(_PANELS).get(quantity)
        if title is not None:
            found[title][problem] = curve(lines, key)
        elif quantity not in _LEFT_OUT:
            metrics[key] = curve(lines, key)
    shares = {}
    for phase in phases:
        timed = [(line["step"], line.get(phase) or 0.0, sum(line.get(p) or 0.0 for p in phases)) for line in lines]
        shares[phase.removeprefix("seconds.")] = ([x for x, *_ in timed], [100 * s / (w or 1.0) for _, s, w in timed])
    found |= {"metrics": metrics, _TIME: shares}
    return {title: curves for title, curves in found.items() if curves}


def draw(lines: Sequence[Line], out: Path, *, title: str) -> None:
    """Save a figure of all panels.

    Raises:
        ImportError: if matplotlib is not installed, with the command that installs it.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("hypergrad plot needs matplotlib: pip install matplotlib") from error
    content = panels(lines)
    problems = list(dict.fromkeys(key.split(".")[0] for line in lines for key in line if "." in key))
    colors = {name: f"C{k}" for k, name in enumerate(p for p in problems if p != "seconds")}
    columns = min(len(content), 2)
    rows = math.ceil(len(content) / columns)
    figure = Figure(figsize=(5.5 * columns, 3.2 * rows), layout="constrained")
    figure.suptitle(title)
    for place, (name, curves) in enumerate(content.items(), start=1):
        axes = figure.add_subplot(rows, columns, place)
        if name == _TIME:
            steps = next(iter(curves.values()))[0]
            axes.stackplot(steps, [y for _, y in curves.values()], labels=list(curves), alpha=0.8)
        else:
            for label, (x, y) in curves.items():
                marker = "o" if len(x) == 1 else ""
                axes.plot(x, y, label=label, color=colors.get(label), marker=marker, linewidth=1.3)
            values = [v for _, y in curves.values() for v in y if not math.isnan(v)]
            if name != "metrics" and values and min(values) > 0:
                axes.set_yscale("log")
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("step of the top level")
        axes.grid(alpha=0.3)
        beside: Any = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)}
        axes.legend(fontsize=8, **(beside if name == _TIME else {}))
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
