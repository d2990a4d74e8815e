"""T1-T2: the inverse Hessian replaced by a step size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from hypergrad._flat import Params
from hypergrad._result import Stats
from hypergrad.methods._refusals import check_fixed_point, check_loss, check_number, check_start, refuse_state
from hypergrad.methods._run import last_learning_rate
from hypergrad.methods.base import Pulled, ResponseMethod
from hypergrad.stationarity import linearize
from hypergrad.step import Recording
from hypergrad.trajectory import Trajectory


@dataclass(frozen=True)
class OneStep(ResponseMethod):
    r"""The implicit-function theorem with the inverse Hessian replaced by a step size.

    .. math:: \Big(\frac{dw^*}{du}\Big)^T v \approx -\eta\, (\partial_u F(w_K, u))^T v

    F is the stationarity condition of loss and optimizer, eta the step size. Both F's mixed derivative and the
    cotangent v are taken at the end of the run, w_K, with the batch and the random draws of its last step. It is the
    first term of a Neumann series, and exact only where the Hessian is I / eta: directions of low curvature are shrunk.

    Cost: one gradient of the lower loss and one mixed product.

    Bias: the inverse Hessian is taken to be a multiple of the identity.

    Args:
        step_size: eta > 0; None for the learning rate of the run's last step.

    Raises:
        ValueError: for a step size out of range; for `solved` without an explicit one.

    Reference: J. Luketina, M. Berglund, K. Greff, T. Raiko, "Scalable gradient-based tuning of continuous
        regularization hyperparameters", ICML 2016, arXiv 1511.06727.
    """

    step_size: float | None = None

    def __post_init__(self) -> None:
        """Validate the options."""
        check_number("OneStep", "step_size", self.step_size, none=True)

    @property
    def differentiates_optimizer(self) -> bool:
        """Return whether the learning rate is read."""
        return self.step_size is None

    @property
    def fixed_point(self) -> Literal["ignore"]:
        """Return that the run must end at a fixed point; decoupled decay is left out."""
        return "ignore"

    @property
    def num_batches(self) -> int:
        """Return that the last batch is read."""
        return 1

    def recording(self, num_steps: int) -> Recording:
        """Return that only the last state is read."""
        return Recording(first=num_steps)

    def vjp(self, trajectory: Trajectory, upper: Params, cotangent: Tensor, state: Tensor | None = None) -> Pulled:
        """Return -step_size (dF/du)^T cotangent."""
        refuse_state(self, state)
        check_loss(self, trajectory)
        check_fixed_point(self, trajectory, upper)
        step_size = last_learning_rate(self, trajectory, upper) if self.step_size is None else self.step_size
        lin = linearize(trajectory, upper)
        grad = lin.mixed(-step_size * cotangent)
        check_start(self, trajectory, upper, grad)
        return Pulled(grad, None, Stats(stationarity=lin.value.norm()))
