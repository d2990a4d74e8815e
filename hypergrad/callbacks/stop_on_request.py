"""Ending a run between two steps when someone asks for it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

from hypergrad.callbacks.base import Callback, Runnable
from hypergrad.history import History, Record


class StopOnRequest(Callback):
    """End the run after the present step on a signal, or once a file appears; `Checkpoint` then saves that step.

    A cluster sends SIGTERM before it takes a machine back, Ctrl-C is SIGINT. The first signal finishes the step; a
    second one does what it would have done without this callback. Handlers are put back when the run ends.

    Args:
        file: the run ends once it exists; it is removed then.
        signals: which to answer.
        interval: seconds between two looks for the file, >= 0.

    Raises:
        ValueError: for a negative interval, and when a run starts outside the main thread, where Python handles no
            signals; pass `signals=()` there.

    Attributes:
        request: what asked for the end, "SIGTERM" or the file's path; None if nothing did.
    """

    order: ClassVar[int] = -100

    def __init__(
        self,
        file: str | Path | None = None,
        *,
        signals: Sequence[signal.Signals] = (signal.SIGINT, signal.SIGTERM),
        interval: float = 1.0,
    ) -> None:
        if interval < 0:
            raise ValueError(f"StopOnRequest: interval must be >= 0 seconds, got {interval}.")
        self.interval = interval
        self.file = None if file is None else Path(file)
        self.signals = tuple(signals)
        self.request: str | None = None
        self._before: dict[int, Any] = {}
        self._looked = 0.0

    def on_start(self, engine: Runnable, num_steps: int) -> None:  # noqa: ARG002
        """Listen from now on."""
        self.request, self.should_stop, self._looked = None, False, 0.0
        if self.signals and threading.current_thread() is not threading.main_thread():
            raise ValueError(
                "StopOnRequest: Python handles signals in the main thread only, and this run is in another. Pass "
                "signals=() and use file=."
            )
        for number in self.signals:
            self._before[number] = signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self._end(signal.Signals(number).name)
        signal.signal(number, self._before.pop(number))
        message = f"\n{self.request}: the run ends after this step; once more to end it now\n"
        os.write(2, message.encode())  # print is not safe in a handler

    def _end(self, request: str) -> None:
        self.request, self.should_stop = request, True

    def on_step(self, engine: Runnable, record: Record) -> None:  # noqa: ARG002
        """Look for the file."""
        now = time.monotonic()
        if self.file is None or now - self._looked < self.interval:
            return
        self._looked = now
        if self.file.exists():
            self.file.unlink(missing_ok=True)
            self._end(str(self.file))

    def on_end(self, engine: Runnable, history: History) -> None:  # noqa: ARG002
        """Put the handlers back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
