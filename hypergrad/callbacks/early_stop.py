"""Stopping when a quantity no longer improves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from hypergrad.callbacks.base import Callback, Runnable
from hypergrad.history import Record


class EarlyStopping(Callback):
    """End the run once a quantity has not improved for `patience` steps of the top level.

    Args:
        quantity: which, "problem.loss" or a metric "problem.name".
        patience: steps without improvement, >= 1.
        every: look at each n-th step only, >= 1; a look reads one value back from the device.
        minimize: whether smaller is better.
        min_change: what counts as an improvement, >= 0.
    """

    def __init__(
        self, quantity: str, *, patience: int, every: int = 1, minimize: bool = True, min_change: float = 0.0
    ) -> None:
        if patience < 1:
            raise ValueError(f"EarlyStopping: patience must be >= 1 steps, got {patience}.")
        if every < 1:
            raise ValueError(f"EarlyStopping: every must be >= 1 steps, got {every}.")
        if min_change < 0:
            raise ValueError(f"EarlyStopping: min_change must be >= 0, got {min_change}.")
        self.quantity = quantity
        self.patience = patience
        self.every = every
        self.minimize = minimize
        self.min_change = min_change
        self.best = math.inf
        self.num_stale = 0

    def on_start(self, engine: Runnable, num_steps: int) -> None:  # noqa: ARG002
        """Forget earlier runs."""
        self.best, self.num_stale, self.should_stop = math.inf, 0, False

    def on_step(self, engine: Runnable, record: Record) -> None:  # noqa: ARG002
        """Compare the quantity with the best so far."""
        if self.quantity not in record:
            raise ValueError(f"EarlyStopping: the run records no {self.quantity!r}; it has {sorted(record)}.")
        if record["step"] % self.every:
            return
        value = record.read(self.quantity) * (1 if self.minimize else -1)
        if value < self.best - self.min_change:
            self.best, self.num_stale = value, 0
        else:
            self.num_stale += self.every
        self.should_stop = self.num_stale >= self.patience

    def state_dict(self) -> dict[str, Any]:
        """Return the best value so far and how long ago it was."""
        return {"best": self.best, "num_stale": self.num_stale}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting, and stay stopped where that was the end."""
        self.best, self.num_stale = state["best"], state["num_stale"]
        self.should_stop = self.num_stale >= self.patience
