"""Hessian products each on a batch of its own, as stochastic methods take them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from torch import Tensor

from hypergrad._flat import Params
from hypergrad._tape import Tape, tape
from hypergrad.methods._refusals import check_option
from hypergrad.methods._run import last_learning_rate
from hypergrad.methods.base import Method, ResponseMethod
from hypergrad.stationarity import Responding, samples_of, stationarity
from hypergrad.step import Recording
from hypergrad.trajectory import Trajectory


def tapes(trajectory: Trajectory, upper: Params, *, batches: int, count: int) -> Iterator[Tape]:
    """Yield `count` tapes of the stationarity condition at the end of the run, one at a time.

    They take the run's last `batches` in turn, from the oldest; a single batch is taped once.
    """
    samples = samples_of(trajectory, batches)
    responding = Responding.of(trajectory, None)
    present: Tape | None = None
    for index in range(count):
        if present is None or len(samples) > 1:
            condition = stationarity(trajectory, responding, [samples[index % len(samples)]])
            present = tape(condition, trajectory.end_flat, upper, kind="auto")
        yield present


def step_size_of(method: Method, given: float | None, trajectory: Trajectory, upper: Params) -> Tensor | float:
    """Return the given step size, or the learning rate of the run's last step."""
    return last_learning_rate(method, trajectory, upper) if given is None else given


def check_fresh(owner: str, fresh: bool) -> None:
    """Raise a ValueError for `fresh` outside an engine, which draws the batches."""
    if fresh:
        raise ValueError(
            f"{owner}: fresh=True draws batches from a Problem's data, so it needs an hg.Engine. Here, pass the "
            "batches to hg.descend and leave fresh=False."
        )


def check_count(owner: str, option: str, value: object) -> None:
    """Raise a ValueError unless `value` is an int >= 1."""
    check_option(
        isinstance(value, int) and not isinstance(value, bool) and value >= 1, owner, option, value, "an int >= 1"
    )


class SampledRule(ResponseMethod):
    """What rules share that take each product on a batch of its own, with a step size of their own or the run's."""

    step_size: float | None
    batches: int
    fresh: bool

    def check_functional(self) -> None:
        """Raise a ValueError for `fresh`, whose batches an engine draws."""
        check_fresh(type(self).__name__, self.fresh)

    @property
    def differentiates_optimizer(self) -> bool:
        """Return whether the learning rate is read."""
        return self.step_size is None

    @property
    def fixed_point(self) -> Literal["refuse"]:
        """Return that the run must end at a fixed point."""
        return "refuse"

    @property
    def num_batches(self) -> int:
        """Return how many of the run's last batches are read."""
        return 1 if self.fresh else self.batches

    @property
    def num_fresh(self) -> int:
        """Return how many batches are drawn anew."""
        return self.batches if self.fresh else 0

    def recording(self, num_steps: int) -> Recording:
        """Return that only the last state is read."""
        return Recording(first=num_steps)
