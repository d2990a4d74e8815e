"""Curves for Weights & Biases."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from hypergrad.callbacks.base import Callback, Runnable, logs
from hypergrad.history import History, Record


class WandB(Callback):
    """Log every quantity of the record, under "problem/quantity", to one run that is gone on with after a resume.

    Args:
        every: log each n-th step of the top level, >= 1; only then are values read back from a device, all at once.
        **options: passed to `wandb.init`, for example `project="mine"` or `mode="offline"`.

    Raises:
        ImportError: if the package `wandb` is not installed, with the command that installs it.
    """

    def __init__(self, *, every: int = 10, **options: Any) -> None:
        if every < 1:
            raise ValueError(f"WandB: every must be >= 1 steps, got {every}.")
        try:
            wandb = importlib.import_module("wandb")
        except ImportError as error:
            raise ImportError("callbacks.WandB needs the package wandb: pip install wandb") from error
        self.every = every
        self._init: Any = wandb.init
        self._options = options
        self._run: Any = None

    def on_step(self, engine: Runnable, record: Record) -> None:
        """Log the record if it is due; the first one begins the run."""
        step = int(record["step"])
        if step % self.every or not logs(engine):
            return
        if self._run is None:
            self._run = self._init(**self._options)
            self._options = self._options | {"id": self._run.id, "resume": "allow"}
        values = {key.replace(".", "/", 1): value for key, value in record.numbers().items() if key != "step"}
        self._run.log(values, step=step)

    def on_end(self, engine: Runnable, history: History) -> None:  # noqa: ARG002
        """Upload what is left."""
        if self._run is not None:
            self._run.finish()
            self._run = None

    def state_dict(self) -> dict[str, Any]:
        """Return the run's name at Weights & Biases."""
        return {key: self._options[key] for key in ("id", "resume") if key in self._options}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Log to the same run."""
        self._options = self._options | dict(state)
