"""A progress line on the terminal."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from hypergrad.callbacks.base import Callback, Runnable
from hypergrad.history import History, Record


class Progress(Callback):
    """Show the step, the losses and the time left, on one line that is rewritten.

    Values are read back from the device only when the line is drawn, at most every `interval` seconds.

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
        self._total = 0
        self._done = 0
        self._began = 0.0
        self._drawn = 0.0
        self._width = 0

    def on_start(self, engine: Runnable, num_steps: int) -> None:  # noqa: ARG002
        """Start the clock."""
        self._total, self._done = num_steps, 0
        self._began = time.monotonic()
        self._drawn = self._began - self.interval

    def on_step(self, engine: Runnable, record: Record) -> None:  # noqa: ARG002
        """Draw the line if it is time."""
        self._done += 1
        now = time.monotonic()
        if now - self._drawn >= self.interval or self._done == self._total:
            self._drawn = now
            self._draw(self.line(record, now))

    def on_end(self, engine: Runnable, history: History) -> None:  # noqa: ARG002
        """Leave the last line on the screen."""
        print(file=self._stream or sys.stderr, flush=True)

    def line(self, record: Record, now: float) -> str:
        """Return the text of the line."""
        elapsed = now - self._began
        left = elapsed / self._done * (self._total - self._done)
        losses = "  ".join(f"{key} {record.read(key):.4g}" for key in record if key.endswith(".loss"))
        return f"step {self._done}/{self._total}  {losses}  {_clock(elapsed)} elapsed, {_clock(left)} left"

    def _draw(self, text: str) -> None:
        padded = text.ljust(self._width)
        self._width = len(text)
        print(f"\r{padded}", end="", file=self._stream or sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
