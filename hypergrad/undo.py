"""Every level as it stands before a step of the top level, to return to if the step fails."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hypergrad.runner import Runner
from hypergrad.snapshot import restore, snapshot
from hypergrad.start import Beginning
from hypergrad.step import Step


@dataclass(frozen=True)
class Before:
    """Copies of the problems' parameters, buffers, optimizers and schedulers, and where their windows stood.

    Data and random draws are left out on purpose: they go on, so that the step taken again is another one.
    """

    kept: tuple[tuple[Runner, dict[str, Any], Window], ...]

    @staticmethod
    def of(runners: Iterable[Runner]) -> Before:
        """Copy what the next step changes."""
        return Before(tuple((runner, snapshot(runner.problem), Window.of(runner)) for runner in runners))

    def restore(self) -> None:
        """Put every level back."""
        for runner, found, window in self.kept:
            restore(runner.problem, found)
            window.restore(runner)


@dataclass(frozen=True)
class Window:
    """Where a problem's window of own steps stands; its records are values, so that none is copied."""

    steps: list[Step]
    size: int
    num_steps: int
    beginning: Beginning | None
    fresh: list[Any]
    warm: dict[str, Tensor]
    snapshot: dict[str, Any] | None

    @staticmethod
    def of(runner: Runner) -> Window:
        """Note where the window stands."""
        return Window(
            list(runner.window),
            runner.window_size,
            runner.num_steps,
            runner.beginning,
            list(runner.fresh),
            dict(runner.warm),
            runner.snapshot,
        )

    def restore(self, runner: Runner) -> None:
        """Put the problem's window back."""
        runner.window, runner.window_size, runner.num_steps = list(self.steps), self.size, self.num_steps
        runner.beginning, runner.fresh, runner.warm = self.beginning, list(self.fresh), dict(self.warm)
        runner.snapshot = self.snapshot
