"""A run's values as lines of JSON, for `hypergrad plot` and for any other tool."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

from hypergrad.callbacks.base import Callback, Runnable, logs
from hypergrad.history import History, Record


class JSONLines(Callback):
    """Append one line of JSON for every n-th step: its quantities, the time, and the seconds spent in each phase.

    A line holds "step", "time" (seconds since 1970), every "problem.quantity" of the record, and "seconds.<phase>",
    what each phase took since the line before. Values that are not finite are written as null. Lines are flushed at
    once; where the disk refuses them the run goes on with a warning, and they are tried again with the next. A run that
    goes on drops the lines of steps that it takes again, and those not written whole, so that the file reads as if it
    had never been interrupted; a run from the beginning begins the file anew. `hypergrad plot PATH` draws it.

    Args:
        path: of the file; made with its folder if need be.
        every: write each n-th step of the top level, >= 1; only then are values read back from a device, all at once.

    Raises:
        ValueError: for `every` below 1.
    """

    def __init__(self, path: str | Path, *, every: int = 10) -> None:
        if every < 1:
            raise ValueError(f"JSONLines: every must be >= 1 steps, got {every}.")
        self.path = Path(path)
        self.every = every
        self._file: IO[str] | None = None
        self._spent: dict[str, float] = {}

    def on_start(self, engine: Runnable, num_steps: int) -> None:  # noqa: ARG002
        """Keep the lines of the steps before this run's, and open the file to append."""
        if not logs(engine):
            return
        kept = [line for line in _lines(self.path) if line["step"] < engine.num_steps]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_name(f".{self.path.name}.writing")
        beside.write_text("".join(f"{json.dumps(line)}\n" for line in kept), encoding="utf-8")
        os.replace(beside, self.path)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - closed in on_end
        self._spent = dict(engine.seconds)

    def on_step(self, engine: Runnable, record: Record) -> None:
        """Write the record if it is due."""
        if record["step"] % self.every or self._file is None:
            return
        line: dict[str, float | None] = {"step": int(record["step"]), "time": time.time()}
        line |= {key: _finite(value) for key, value in record.numbers().items() if key != "step"}
        line |= {f"seconds.{phase}": s - self._spent.get(phase, 0.0) for phase, s in engine.seconds.items()}
        self._spent = dict(engine.seconds)
        with self._disk():
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()

    def on_end(self, engine: Runnable, history: History) -> None:  # noqa: ARG002
        """Close the file."""
        file, self._file = self._file, None
        if file is not None:
            with self._disk():
                file.close()

    @contextlib.contextmanager
    def _disk(self) -> Iterator[None]:
        """Warn where the disk refuses in the body: what was not written is kept, and tried with the next line."""
        try:
            yield
        except OSError as error:
            warnings.warn(f"{self.path} could not be written: {error}. The run goes on.", RuntimeWarning, stacklevel=4)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _lines(path: Path) -> list[Mapping[str, float]]:
    """Return the lines of a file that were written whole; none where there is no file."""
    if not path.is_file():
        return []
    whole = [line for line in path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1] if line]
    found = []
    for line in whole:
        with contextlib.suppress(json.JSONDecodeError):  # a disk that was full, or lost its power
            found.append(json.loads(line))
    return found
