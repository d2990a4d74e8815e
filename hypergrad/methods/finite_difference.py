"""DARTS: the mixed product by a finite difference of two gradients, the inverse Hessian replaced by a step size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from hypergrad._flat import Params
from hypergrad._result import Stats
from hypergrad.methods._refusals import check_fixed_point, check_loss, check_number, check_start, refuse_state
from hypergrad.methods._run import difference_quotient, last_learning_rate
from hypergrad.methods.base import Pulled, ResponseMethod
from hypergrad.step import Recording
from hypergrad.trajectory import Trajectory


@dataclass(frozen=True)
class FiniteDifference(ResponseMethod):
    r"""`OneStep` without second derivatives: its mixed product by a central difference.

    .. math:: \Big(\frac{dw^*}{du}\Big)^T v \approx -\eta \lVert v \rVert
        \frac{\nabla_u L(w_K + \epsilon \hat v, u) - \nabla_u L(w_K - \epsilon \hat v, u)}{2 \epsilon},
        \qquad \hat v = v / \lVert v \rVert

    with lower loss L and step size eta. All terms are taken at the end of the run, w_K, with the batch and random draws
    of its last step, the same for both ends. It converges to `OneStep` as epsilon^2, until rounding takes over (about
    1e-3 in float32, 1e-6 in float64 times the scale of w), and inherits its bias: the inverse Hessian is taken to be
    eta I.

    Cost: two gradients of the lower loss in `upper`; no second derivative, no tape of one.

    Bias: that of `OneStep`, and O(epsilon^2).

    Args:
        epsilon: length of the perturbation of the lower parameters, > 0.
        step_size: eta > 0; None for the learning rate of the run's last step, or 1 for `solved`, which has none.

    Reference: H. Liu, K. Simonyan, Y. Yang, "DARTS: Differentiable architecture search", ICLR 2019, arXiv 1806.09055.
    """

    perturbs: ClassVar[bool] = True

    epsilon: float = 1e-2
    step_size: float | None = None

    def __post_init__(self) -> None:
        """Validate the options."""
        check_number("FiniteDifference", "epsilon", self.epsilon)
        check_number("FiniteDifference", "step_size", self.step_size, none=True)

    @property
    def serves_shards(self) -> bool:
        """Return that gradients are all it takes."""
        return True

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
        """Return the difference quotient."""
        refuse_state(self, state)
        check_loss(self, trajectory)
        check_fixed_point(self, trajectory, upper)
        step_size: Tensor | float = 1.0
        if self.step_size is not None:
            step_size = self.step_size
        elif trajectory.steps:
            step_size = last_learning_rate(self, trajectory, upper)
        grad = difference_quotient(trajectory, upper, -step_size * cotangent, self.epsilon)
        check_start(self, trajectory, upper, grad)
        return Pulled(grad, None, Stats(num_gradients=torch.full((), 2, dtype=torch.int64, device=cotangent.device)))
