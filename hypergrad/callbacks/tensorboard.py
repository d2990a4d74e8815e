"""Curves for TensorBoard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hypergrad.callbacks.base import Callback, Runnable, logs
from hypergrad.history import History, Record


class TensorBoard(Callback):
    """Write every quantity of the record as a scalar, under "problem/quantity".

    Args:
        log_dir: folder of the event files.
        every: write each n-th step of the top level, >= 1; only then are values read back from a device, all at once.

    Raises:
        ImportError: if the package `tensorboard` is not installed, with the command that installs it.
    """

    def __init__(self, log_dir: str | Path, *, every: int = 10) -> None:
        if every < 1:
            raise ValueError(f"TensorBoard: every must be >= 1 steps, got {every}.")
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError("callbacks.TensorBoard needs the package tensorboard: pip install tensorboard") from error
        self.every = every
        create: Any = SummaryWriter
        self._writer: Any = create(str(log_dir))

    def on_step(self, engine: Runnable, record: Record) -> None:
        """Write the record if it is due."""
        step = int(record["step"])
        if step % self.every or not logs(engine):
            return
        for key, value in record.numbers().items():
            if key != "step":
                self._writer.add_scalar(key.replace(".", "/", 1), value, step)

    def on_end(self, engine: Runnable, history: History) -> None:  # noqa: ARG002
        """Flush the files."""
        self._writer.flush()
