"""The value-function penalty: fully first-order, no best response."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from hypergrad._flat import Params
from hypergrad._functional import in_transform
from hypergrad._result import Stats
from hypergrad._tape import add, gradient, upper_gradient
from hypergrad.methods._refusals import (
    check_fixed_point,
    check_loss,
    check_number,
    check_option,
    check_start,
    refuse_state,
)
from hypergrad.methods._run import objective, require_dependence, upper_objective
from hypergrad.methods.base import Method, Total, UpperLoss, partials
from hypergrad.optim import SGD, Decay, Optimizer
from hypergrad.step import Recording
from hypergrad.trajectory import Trajectory


@dataclass(frozen=True)
class Penalty(Method):
    r"""d(upper loss)/d(upper) from gradients alone, by penalizing the lower level's suboptimality.

    .. math:: w_\lambda = \arg\min_w \tfrac1\lambda f(w, u) + L(w, u), \qquad
        \frac{d}{du} f(w^*(u), u) \approx \partial_u f(w_\lambda, u)
        + \lambda \big(\partial_u L(w_\lambda, u) - \partial_u L(w^*, u)\big)

    with upper loss f, lower loss L (with the lower optimizer's coupled weight decay) and penalty strength lambda. The
    error is O(1/lambda) plus lambda times the error of w_lambda and w^*, so a larger strength needs better solved
    levels. w_lambda is found by `steps` of `optimizer` from w^*, the end of the run, with its last batch.

    Cost: 2 gradients per step, and 3 more. There is no best response, so nothing can be chained above it.

    Bias: O(1/strength) at solved levels.

    Args:
        strength: lambda > 0.
        optimizer: one of `hypergrad.optim`; None for SGD with the learning rate `1e-1`.
        steps: steps towards w_lambda, >= 1.

    Reference: J. Kwon, D. Kwon, S. Wright, R. Nowak, "A fully first-order method for stochastic bilevel optimization",
        ICML 2023, arXiv 2301.10945; B. Liu, M. Ye, S. Wright, P. Stone, Q. Liu, "BOME! Bilevel optimization made easy",
        NeurIPS 2022, arXiv 2209.08709.
    """

    perturbs: ClassVar[bool] = True

    strength: float = 10.0
    optimizer: Optimizer = field(default_factory=lambda: SGD(lr=0.1))
    steps: int = 20

    def __post_init__(self) -> None:
        """Validate the options."""
        check_number("Penalty", "strength", self.strength)
        check_option(isinstance(self.steps, int) and self.steps >= 1, "Penalty", "steps", self.steps, "an int >= 1")
        check_option(
            isinstance(self.optimizer, Optimizer), "Penalty", "optimizer", self.optimizer, "one of hypergrad.optim"
        )
        check_option(
            not self.optimizer.maximize and self.optimizer.decay() == Decay(),
            "Penalty",
            "optimizer",
            self.optimizer,
            "one that minimizes, without weight decay: the penalized problem has its own objective",
        )

    @property
    def serves_shards(self) -> bool:
        """Return that gradients are all it takes."""
        return True

    @property
    def differentiates_optimizer(self) -> bool:
        """Return that only the weight decay is read."""
        return False

    @property
    def fixed_point(self) -> Literal["refuse"]:
        """Return that the run must end at a fixed point."""
        return "refuse"

    @property
    def num_batches(self) -> int:
        """Return that the last batch is read."""
        return 1

    def recording(self, num_steps: int) -> Recording:
        """Return that only the last state is read."""
        return Recording(first=num_steps)

    def total(
        self, upper_loss: UpperLoss, trajectory: Trajectory, upper: Params, batch: Any, state: Tensor | None
    ) -> Total:
        """Return the penalty's estimate, direct term included; the value is that at the lower solution."""
        refuse_state(self, state)
        check_loss(self, trajectory)
        check_fixed_point(self, trajectory, upper, decoupled="refuse")
        upper_at = upper_objective(upper_loss, trajectory, batch)
        value, _, _ = partials(upper_loss, trajectory, upper, batch)
        penalized = self._descend(upper_at, trajectory, upper)
        direct = upper_gradient(lambda u: upper_at(penalized, u), upper)
        ahead = upper_gradient(lambda u: objective(self, trajectory, penalized, u), upper)
        behind = upper_gradient(lambda u: objective(self, trajectory, trajectory.end_flat, u), upper)
        check_start(self, trajectory, upper, ahead)
        require_dependence(upper, {**direct, **ahead})
        response = {name: self.strength * (ahead[name] - behind[name]) for name in ahead if name in behind}
        count = torch.full((), 2 * self.steps + 3, dtype=torch.int64, device=penalized.device)
        return Total(add(direct, response), None, Stats(num_gradients=count), None, value)

    def _descend(self, upper_at: Callable[[Tensor, Params], Tensor], trajectory: Trajectory, upper: Params) -> Tensor:
        """Return w_lambda, flat."""

        def penalized(flat: Tensor) -> Tensor:
            return upper_at(flat, upper) / self.strength + objective(self, trajectory, flat, upper)

        flat = trajectory.end_flat
        state = self.optimizer.init(flat)
        for _ in range(self.steps):
            with torch.no_grad() if not in_transform() else contextlib.nullcontext():
                flat, state = self.optimizer.update(flat, gradient(penalized, flat), state)
        return flat
