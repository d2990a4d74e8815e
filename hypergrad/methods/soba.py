"""SOBA: one stochastic step on the linear system for each upper step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hypergrad._flat import Params
from hypergrad._result import Stats
from hypergrad.methods._refusals import check_fixed_point, check_initial, check_loss, check_number, check_start
from hypergrad.methods._sampled import step_size_of
from hypergrad.methods.base import Pulled, ResponseMethod
from hypergrad.stationarity import linearize
from hypergrad.step import Recording
from hypergrad.trajectory import Trajectory


@dataclass(frozen=True)
class SOBA(ResponseMethod):
    r"""The implicit response with one gradient step on its linear system per upper step, carried along in the state.

    .. math:: \Big(\frac{dw^*}{du}\Big)^T v \approx -(\partial_u F)^T x_t, \qquad
        x_{t+1} = x_t + \rho\, (v - (\partial_w F)^T x_t)

    F is the stationarity condition of loss and optimizer at the end of the run on its last batch, v the cotangent, rho
    the step size, x the `h.state`: minus the paper's auxiliary variable. Lower level, linear system and upper level
    move together, each by one stochastic step, and no loop is run to convergence.

    *The published algorithm.* This object does the steps on x and the direction of the upper step, which uses x_t, not
    x_{t+1}. The lower step is the problem's: plain SGD, `steps=1`, whose learning rate is rho; the upper step is the
    upper optimizer's. In an engine the lower step comes first, so that both read the new lower parameters; the paper
    moves all three from the same point. For that order call `hypergradient` on `solved(loss, lower, batch)` with
    `step_size`, and take the lower step after it.

    Cost: one gradient of the lower loss, one product, one mixed product.

    Bias: it tracks the solution of a moving system, and is exact only in the limit of small steps; the residual is
    reported. Without a state x begins one step from zero, at rho v, and the first direction is that of `OneStep`.

    Args:
        step_size: rho, > 0 and below 2 / (largest eigenvalue of the lower Hessian); None for the learning rate of the
            run's last step, as published.

    Raises:
        ValueError: for a step size out of range; for `solved` without one; for a state of another shape.

    Example:
        >>> import torch, hypergrad as hg
        >>> def lower_loss(lower, upper, batch):
        ...     return ((lower["w"] - upper["c"]) ** 2).sum()
        >>> def upper_loss(lower, upper, batch):
        ...     return (lower["w"] ** 2).sum()
        >>> traj, state = hg.solved(lower_loss, {"w": torch.ones(2)}), None
        >>> for _ in range(20):
        ...     h = hg.hypergradient(upper_loss, traj, {"c": torch.ones(2)}, method=hg.SOBA(0.25), state=state)
        ...     state = h.state
        >>> h.grad["c"]
        tensor([2.0000, 2.0000])

    Reference: M. Dagreou, P. Ablin, S. Vaiter, T. Moreau, "A framework for bilevel optimization that enables stochastic
        and global variance reduction algorithms", NeurIPS 2022, arXiv 2201.13409.
    """

    step_size: float | None = None

    def __post_init__(self) -> None:
        """Validate the options."""
        check_number("SOBA", "step_size", self.step_size, none=True)

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
        """Return that the last batch is read."""
        return 1

    def recording(self, num_steps: int) -> Recording:
        """Return that only the last state is read."""
        return Recording(first=num_steps)

    def vjp(self, trajectory: Trajectory, upper: Params, cotangent: Tensor, state: Tensor | None = None) -> Pulled:
        """Return -(dF/du)^T x_t, and x_{t+1} as the state."""
        check_loss(self, trajectory)
        check_fixed_point(self, trajectory, upper, decoupled="refuse")
        check_initial(self, state, cotangent.shape, warm_start=True)
        step_size = step_size_of(self, self.step_size, trajectory, upper)
        x = step_size * cotangent if state is None else state
        lin = linearize(trajectory, upper)
        residual = cotangent - lin.operator.mv(x)
        grad = {name: -g for name, g in lin.mixed(x).items()}
        check_start(self, trajectory, upper, grad)
        stats = Stats(
            num_products=torch.full((), 1, dtype=torch.int64, device=cotangent.device),
            residual_norm=torch.linalg.vector_norm(residual),
            stationarity=lin.value.norm(),
        )
        return Pulled(grad, None, stats, x + step_size * residual)
