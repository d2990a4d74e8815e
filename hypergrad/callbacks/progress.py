"""How a run is doing, on the terminal."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TextIO

from hypergrad.callbacks.base import Callback, Runnable, logs
from hypergrad.history import History, Record

_COLUMNS = (("loss", "loss"), ("grad_norm", "hypergradient"), ("residual_norm", "residual"))


class Progress(Callback):
    """Show the step, the time left and, for each level, its loss, hypergradient norm, residual and share of the time.

    On a terminal a few lines are rewritten in place, the highest level first; elsewhere (a log file) one line is added
    at a time. Values are read back from the device only when something is drawn, at most every `interval` seconds, all
    in one transfer. "data" is the time that the loaders took. On an accelerator the shares are of the host's time.

    Args:
        interval: seconds between two drawings, > 0.
        stream: where to write; None for standard error.
    """

    def __init__(self, interval: float = 0.5, stream: TextIO | None = None) -> None:
        """Validate the options."""
        if interval <= 0:
            raise ValueError(f"Progress: interval must be > 0 seconds, got {interval}.")
        self.interval = interval
        self._stream = stream
        self._total = self._first = self._done = 0
        self._began = self._drawn = 0.0
        self._height = 0
        self._spent: dict[str, float] = {}

    def on_start(self, engine: Runnable, num_steps: int) -> None:
        """Start the clock."""
        self._first, self._done, self._total = engine.num_steps, 0, engine.num_steps + num_steps
        self._began = time.monotonic()
        self._drawn, self._height = self._began - self.interval, 0
        self._spent = dict(engine.seconds)

    def on_step(self, engine: Runnable, record: Record) -> None:
        """Draw if it is time."""
        self._done += 1
        if not logs(engine):
            return
        now = time.monotonic()
        if now - self._drawn >= self.interval:
            self._drawn = now
            self._draw(engine, record)

    def on_end(self, engine: Runnable, history: History) -> None:
        """Draw the last step, and leave it on the screen."""
        if history and logs(engine):
            self._draw(engine, history[-1])
        self._height = 0

    def _draw(self, engine: Runnable, record: Record) -> None:
        spent = {phase: s - self._spent.get(phase, 0.0) for phase, s in engine.seconds.items()}
        stream = self._stream or sys.stderr
        values, elapsed = record.numbers(), time.monotonic() - self._began
        if not stream.isatty():
            print(self.line(values, elapsed), file=stream, flush=True)
            return
        width = shutil.get_terminal_size().columns - 1
        lines = [text[:width] for text in self.block(engine.names, values, spent, elapsed)]
        up = f"\x1b[{self._height}F" if self._height else ""
        self._height = len(lines)
        print(up + "".join(f"\x1b[K{text}\n" for text in lines), end="", file=stream, flush=True)

    def line(self, values: Mapping[str, float], elapsed: float) -> str:
        """Return one line: the step, the losses, the time."""
        losses = "  ".join(f"{key} {value:.4g}" for key, value in values.items() if key.endswith(".loss"))
        return f"step {self._first + self._done}/{self._total}  {losses}  {self._clock(elapsed)}"

    def block(
        self,
        names: Sequence[Sequence[str]],
        values: Mapping[str, float],
        spent: Mapping[str, float],
        elapsed: float,
    ) -> list[str]:
        """Return a bar and a table of the levels, highest first."""
        step = self._first + self._done
        filled = 24 * step // self._total
        lines = [f"step {step}/{self._total}  {'━' * filled}{'╌' * (24 - filled)}  {self._clock(elapsed)}"]
        whole = sum(spent.values()) or 1.0
        width = max(len(name) for level in names for name in [*level, "data"])
        lines.append(" " * (width + 4) + "".join(f"{title:>15}" for _, title in _COLUMNS) + f"{'time':>8}")
        for number, level in reversed(list(enumerate(names))):
            for name in level:
                cells = (values.get(f"{name}.{key}") for key, _ in _COLUMNS)
                share = sum(s for phase, s in spent.items() if phase.split(".")[0] == name) / whole
                row = "".join(f"{_number(cell):>15}" for cell in cells)
                lines.append(f"{number}  {name:<{width}} {row}{share:>8.0%}")
        lines.append(f"   {'data':<{width}} " + " " * 15 * len(_COLUMNS) + f"{spent.get('data', 0.0) / whole:>8.0%}")
        return lines

    def _clock(self, elapsed: float) -> str:
        if not self._done:
            return f"{_time(elapsed)} elapsed"
        left = elapsed / self._done * (self._total - self._first - self._done)
        return f"{_time(elapsed)} elapsed, {_time(left)} left"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
