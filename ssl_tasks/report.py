"""What a run says: a progress bar while it lasts, estimates over seeds, the table, the environment."""

from __future__ import annotations

import math
import os
import platform
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

from ssl_tasks.store import Row


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
        digits = 1 if abs(self.mean) >= 3 else 2
        spread = "" if math.isnan(self.stderr) else f" +- {self.stderr:.{digits}f}"
        return f"{self.mean:.{digits}f}{spread}"


def summary(rows: Sequence[Row]) -> dict[str, dict[str, Estimate]]:
    """Return arm -> measure -> estimate over seeds, arms in the order in which they first appear."""
    out: dict[str, dict[str, Estimate]] = {}
    for arm in dict.fromkeys(row.arm for row in rows):
        own = [row for row in rows if row.arm == arm]
        shared = [name for name in own[0].measures if all(name in row.measures for row in own)]
        out[arm] = {name: Estimate.of([row.measures[name] for row in own]) for name in shared}
        out[arm]["seconds"] = Estimate.of([row.seconds for row in own])
    return out


def gains(rows: Sequence[Row], *, over: str, measure: str) -> dict[str, list[float]]:
    """Return arm -> differences of `measure` to the arm `over`, seed by seed: a paired comparison."""
    if not any(row.arm == over for row in rows):
        raise ValueError(f"no rows of {over!r} to compare with; arms: {sorted({row.arm for row in rows})}.")
    measured = [row for row in rows if measure in row.measures]
    reference = {row.seed: row.measures[measure] for row in measured if row.arm == over}
    out: dict[str, list[float]] = {}
    for row in measured:
        if row.arm != over and row.seed in reference:
            out.setdefault(row.arm, []).append(row.measures[measure] - reference[row.seed])
    return out


def paired(rows: Sequence[Row], *, over: Sequence[str], measure: str) -> dict[str, dict[str, dict[str, object]]]:
    """Return arm -> control -> paired gain of `measure`: estimate, one-sided 95% bounds, and the values by seed."""
    out: dict[str, dict[str, dict[str, object]]] = {}
    for control in over:
        for arm, values in gains(rows, over=control, measure=measure).items():
            estimate = Estimate.of(values)
            low, high = estimate.lower_bound(), -Estimate.of([-value for value in values]).lower_bound()
            found = {"gain": estimate, "lower_bound_95": low, "upper_bound_95": high, "values": values}
            out.setdefault(arm, {})[control] = found
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
        cells = [arm, *(str(estimates[name]) if name in estimates else "" for name in columns)]
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
