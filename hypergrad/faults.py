"""What an engine does when a hypergradient cannot be trusted, or a value is not finite."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from hypergrad._flat import Params
from hypergrad._result import Result, SolveError
from hypergrad.history import Record
from hypergrad.runner import Runner
from hypergrad.undo import Before

OnBreakdown = Literal["raise", "warn", "skip"]
OnNonfinite = Literal["raise", "skip", "rollback"]

MAX_ROLLBACKS = 5
"""Failures in a row, each with new batches, after which the batches are not to blame."""


class NonFiniteError(SolveError):
    """A loss, hypergradient or residual is not finite; the message names the level, the step and the tensor."""

    def __init__(self, context: str) -> None:
        """Lead the code's message by `context`."""
        super().__init__(Result.NON_FINITE, context)


@dataclass(frozen=True)
class Gradient:
    """A problem's gradient at its present values, and what its parts reported."""

    runner: Runner
    value: Tensor
    grad: Params
    codes: list[Tensor]
    batch: Any
    is_hypergradient: bool
    """Whether levels below respond in it."""
    residuals: Mapping[str, Tensor]
    """Residual norms of the solves, by the problem solved."""
    involved: tuple[Runner, ...] = ()
    """The problem and those below that took part, whose scales an overflow is blamed on."""


class Faults:
    """Decides about each own step of a problem before it is taken.

    On a CPU every loss is looked at in its own step. On an accelerator, where a look makes the host wait, the losses'
    flags are collected and read together with the code of the next hypergradient: one small read for each of those.
    Only "skip" needs to know at once, and reads one flag an own step.
    """

    def __init__(self, on_breakdown: OnBreakdown, on_nonfinite: OnNonfinite | None) -> None:
        """Validate the options."""
        if on_breakdown not in get_args(OnBreakdown):
            raise ValueError(f"Engine: on_breakdown must be 'raise', 'warn' or 'skip', got {on_breakdown!r}.")
        if on_nonfinite is not None and on_nonfinite not in get_args(OnNonfinite):
            raise ValueError(f"Engine: on_nonfinite must be 'raise', 'skip', 'rollback' or None, got {on_nonfinite!r}.")
        self.on_breakdown = on_breakdown
        self.on_nonfinite: OnBreakdown | OnNonfinite = on_nonfinite or on_breakdown
        self.step = 0
        self._pending: list[tuple[Runner, int, Tensor]] = []

    def attempt(self, step: Callable[[], Record], runners: Mapping[str, Runner]) -> Record:
        """Return the record of `step`, taken again from where it began while it fails and the policy is to go back."""
        rolls_back = self.on_nonfinite == "rollback"
        for count in range(MAX_ROLLBACKS):
            before = Before.of(runners.values()) if rolls_back else None
            self._pending.clear()
            try:
                record = step()
                self._settle()
            except NonFiniteError:
                if before is None or count == MAX_ROLLBACKS - 1:
                    raise
                before.restore()
                continue
            if count:
                record["rollbacks"] = count
            return record
        raise AssertionError

    def admits(self, gradient: Gradient, record: Record) -> bool:
        """Return whether to step along `gradient`; raise or warn as the policy says."""
        if gradient.is_hypergradient:
            return self._admits_hypergradient(gradient, record)
        runner, value = gradient.runner, gradient.value
        moves = runner.losses.scale is not None and runner.losses.scale.rule is not None
        if self.on_nonfinite == "skip" or moves:
            finite = bool(torch.isfinite(value) & torch.isfinite(_norm(gradient)))
            found = "" if finite else _culprit(gradient)
            if not found:
                _note_good(gradient, record)
                return True
            return not _overflowed(gradient, record) and self._refuses(
                f"gradient of {self._where(runner, runner.window_size)}: {found}"
            )
        if value.device.type != "cpu":
            self._pending.append((runner, runner.window_size, torch.isfinite(value)))
            return True
        if not math.isfinite(value):
            return self._refuses(f"loss of {self._where(runner, runner.window_size)} is {float(value)}")
        if self.on_nonfinite == "rollback" and not math.isfinite(_norm(gradient)) and (found := _culprit(gradient)):
            return self._refuses(f"gradient of {self._where(runner, runner.window_size)}: {found}")
        return True

    def _admits_hypergradient(self, gradient: Gradient, record: Record) -> bool:
        """Read one number back, and decide."""
        runner, value = gradient.runner, gradient.value
        norm = _norm(gradient)
        record.put(runner.name, "grad_norm", norm)
        checked = [norm, value, *gradient.residuals.values()]
        numbers = self._read([*checked, *gradient.codes])
        result = Result(int(max(numbers[len(checked) :], default=0)))
        unexplained = not all(map(math.isfinite, numbers[: len(checked)])) and not result.is_breakdown
        found = _culprit(gradient) if unexplained or result is Result.NON_FINITE else ""
        if unexplained and found:  # not so where entries are so large that only their norm overflows
            result = Result.NON_FINITE
        record.put(runner.name, "result", int(result))
        if not result.is_breakdown:
            _note_good(gradient, record)
            return True
        if result is Result.NON_FINITE and _overflowed(gradient, record):
            return False
        where = f"hypergradient of {self._where(runner)}"
        if result is Result.NON_FINITE:
            return self._refuses(f"{where}{found and ', ' + found}")
        if self.on_breakdown == "raise":
            raise SolveError(result, f"{where} at step {self.step}: ")
        if self.on_breakdown == "warn":  # without the step, so that the same warning is shown once
            warnings.warn(f"{where}: {result.message}", RuntimeWarning, stacklevel=2)
            return True
        return False

    def _refuses(self, what: str) -> bool:
        """Raise or warn about `what` is not finite, or return whether to step all the same."""
        if self.on_nonfinite == "skip":
            return False
        if self.on_nonfinite == "warn":
            warnings.warn(f"{what}: {Result.NON_FINITE.message}", RuntimeWarning, stacklevel=2)
            return True
        raise NonFiniteError(f"{what} at step {self.step}: ")

    def _read(self, values: Sequence[Tensor]) -> list[float]:
        """Return 0-dim tensors as numbers, with every flag still to be read in the same transfer."""
        pending, self._pending = self._pending, []
        several = [*values, *(flag for _, _, flag in pending)]
        if not pending and all(x.is_cpu for x in values):
            numbers = [float(x) for x in values]
        else:
            numbers = torch.stack([x.to(several[0]) for x in several]).tolist()
        for (runner, index, _), finite in zip(pending, numbers[len(values) :], strict=True):
            if not finite:
                self._refuses(f"loss of {self._where(runner, index)} is not finite")
                break
        return numbers[: len(values)]

    def _settle(self) -> None:
        """Read the flags of own steps that no hypergradient followed."""
        if self._pending:
            self._read([])

    def _where(self, runner: Runner, index: int | None = None) -> str:
        own = "" if index is None or runner.problem.steps == 1 else f", own step {index},"
        return f"problem {runner.name!r} (level {runner.graph.level_of[runner.name]}){own}"


def _note_good(gradient: Gradient, record: Record) -> None:
    """Count a step without overflow for the scale of its problem's loss."""
    runner = gradient.runner
    if runner.losses.scale is not None and runner.losses.scale.rule is not None:
        runner.losses.scale = runner.losses.scale.after_good()
        record.put(runner.name, "loss_scale", runner.losses.scale.value)


def _overflowed(gradient: Gradient, record: Record) -> bool:
    """Return whether scales can be blamed for a gradient that is not finite, and lower them if so."""
    if not math.isfinite(gradient.value):
        return False
    lowered = False
    for runner in gradient.involved:
        lower = None if runner.losses.scale is None else runner.losses.scale.after_overflow()
        if lower is not None:
            runner.losses.scale, lowered = lower, True
            record.put(runner.name, "loss_scale", lower.value)
    return lowered


def _norm(gradient: Gradient) -> Tensor:
    """Return the norm of the whole gradient."""
    if not gradient.grad:
        return torch.zeros_like(gradient.value)
    layout = gradient.runner.layout
    tensors = list(gradient.grad.values())
    norm = torch.linalg.vector_norm(tensors[0]) if len(tensors) == 1 else get_total_norm(tensors)
    return norm if layout.over_shards is None else layout.sum(norm.square()).sqrt()


def _culprit(gradient: Gradient) -> str:
    """Return which tensor is not finite, in words; empty if all are."""
    if not torch.isfinite(gradient.value):
        return f"its loss is {float(gradient.value)}"
    layout = gradient.runner.layout
    for key, g in gradient.grad.items():
        wrong = int(layout.sum((~torch.isfinite(g)).sum()))
        if wrong:
            size = int(layout.sum(torch.tensor(g.numel(), device=g.device)))
            return f"{wrong} of {size} entries for {key!r} are not finite"
    for name, residual in gradient.residuals.items():
        if not torch.isfinite(residual):
            return f"the residual of the solve for {name!r} is {float(residual)}"
    return ""
