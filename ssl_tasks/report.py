"""What a run leaves behind: a progress bar while it lasts, a table, results.json, a figure."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and its standard error (NaN for one seed)."""

    mean: float
    stderr: float
    count: int

    @staticmethod
    def of(values: Sequence[float]) -> Estimate:
        """Return the mean of `values` and s / sqrt(n), s their sample standard deviation.

        Example:
            >>> Estimate.of([1.0, 2.0, 3.0])
            Estimate(mean=2.0, stderr=0.5773502691896258, count=3)
        """
        if not values:
            raise ValueError("an estimate needs at least one value, got none.")
        spread = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        return Estimate(float(np.mean(values)), spread, len(values))

    def lower_bound(self, confidence: float = 0.95) -> float:
        """Return the one-sided lower confidence bound of the mean by Student's t; NaN for one value."""
        if self.count < 2:
            return math.nan
        return self.mean - float(stats.t.ppf(confidence, self.count - 1)) * self.stderr

    def __str__(self) -> str:
        return f"{self.mean:.1f}" + ("" if math.isnan(self.stderr) else f" +- {self.stderr:.1f}")


@dataclass(frozen=True)
class Row:
    """One arm's measures under one seed."""

    arm: str
    seed: int
    seconds: float
    measures: Mapping[str, float]


def summary(rows: Sequence[Row]) -> dict[str, dict[str, Estimate]]:
    """Return arm -> measure -> estimate over seeds, arms in the order in which they first appear."""
    out: dict[str, dict[str, Estimate]] = {}
    for arm in dict.fromkeys(row.arm for row in rows):
        own = [row for row in rows if row.arm == arm]
        out[arm] = {name: Estimate.of([row.measures[name] for row in own]) for name in own[0].measures}
        out[arm]["seconds"] = Estimate.of([row.seconds for row in own])
    return out


def gains(rows: Sequence[Row], *, over: str, measure: str) -> dict[str, list[float]]:
    """Return arm -> differences of `measure` to the arm `over`, seed by seed: a paired comparison."""
    reference = {row.seed: row.measures[measure] for row in rows if row.arm == over}
    if not reference:
        raise ValueError(f"no rows of {over!r} to compare with; arms: {sorted({row.arm for row in rows})}.")
    out: dict[str, list[float]] = {}
    for row in rows:
        if row.arm != over and row.seed in reference:
            out.setdefault(row.arm, []).append(row.measures[measure] - reference[row.seed])
    return out


def table(rows: Sequence[Row], *, over: str, columns: Mapping[str, str], paired: str) -> str:
    """Return the table that is printed: means and standard errors, and the paired gain in `paired` over `over`.

    Args:
        rows: one for each arm and seed.
        over: the arm to compare with.
        columns: measure -> heading.
        paired: the measure whose gain is shown, with its one-sided 95% lower bound where there are seeds
            enough.
    """
    gained = {arm: Estimate.of(values) for arm, values in gains(rows, over=over, measure=paired).items()}
    lines = [["", *columns.values(), "paired gain", "95% >="]]
    for arm, estimates in summary(rows).items():
        cells = [arm, *(str(estimates[name]) for name in columns)]
        gain = gained.get(arm)
        bound = math.nan if gain is None else gain.lower_bound()
        cells += ["" if gain is None else str(gain), "" if math.isnan(bound) else f"{bound:.1f}"]
        lines.append(cells)
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    ]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])


def environment() -> dict[str, Any]:
    """Return hardware and versions that a reader needs to repeat a run; no path, no user, no host name."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "commit": _commit(),
    }


def _commit() -> str | None:
    """Return the checkout's commit, with a + where files differ from it; None outside a checkout."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *arguments], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        if not git("ls-files", "--", "report.py"):  # an installed copy that lies inside someone's checkout
            return None
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` so that a reader sees the old file or the new one, never half of it; NaN becomes null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_plain(content), indent=2, allow_nan=False) + "\n"
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _plain(value: Any) -> Any:
    if isinstance(value, Estimate):
        return {"mean": _plain(value.mean), "stderr": _plain(value.stderr), "count": value.count}
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


@contextmanager
def progress(total: int, title: str) -> Iterator[Callable[..., None]]:
    """Yield a function that advances the bar, `advance(steps=1, note="")`; the bar shows on a terminal only."""
    from tqdm import tqdm

    with tqdm(total=total, desc=title, unit="step", disable=None, dynamic_ncols=True, leave=False) as bar:

        def advance(steps: int = 1, note: str = "") -> None:
            if note:
                bar.set_postfix_str(note, refresh=False)
            bar.update(steps)

        yield advance


def figure(path: Path, rows: Sequence[Row], *, over: str, measures: Mapping[str, str], title: str) -> None:
    """Write a picture of the paired gains over the arm `over`: a panel a measure, a dot a seed, the mean as a bar."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    light, dark = "#9db8d9", "#1f3b60"
    arms = list(gains(rows, over=over, measure=next(iter(measures))))
    canvas = Figure(figsize=(4.6 * len(measures) + 1.4, 0.42 * len(arms) + 1.7), layout="constrained")
    FigureCanvasAgg(canvas)
    panels = canvas.subplots(1, len(measures), sharey=True, squeeze=False)[0]
    for panel, (measure, heading) in zip(panels, measures.items(), strict=True):
        gained = gains(rows, over=over, measure=measure)
        for height, arm in enumerate(arms):
            estimate = Estimate.of(gained[arm])
            error = None if math.isnan(estimate.stderr) else estimate.stderr
            panel.barh(height, estimate.mean, xerr=error, height=0.55, color=light, ecolor=dark, capsize=3)
            panel.plot(gained[arm], [height] * len(gained[arm]), "o", color=dark, ms=3, alpha=0.6)
        panel.axvline(0, color="black", lw=0.8)
        panel.set_yticks(range(len(arms)), arms)
        panel.set_title(heading, fontsize=10)
        panel.set_xlabel(f"gain over {over}, percentage points", fontsize=9)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    canvas.suptitle(title, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(path, dpi=150)
