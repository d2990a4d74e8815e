"""BOME: first-order, a dynamic barrier on the lower level's suboptimality."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from hypergrad._flat import Params
from hypergrad._result import Stats
from hypergrad._tape import add, upper_gradient
from hypergrad.methods._refusals import (
    check_fixed_point,
    check_initial,
    check_loss,
    check_number,
    check_option,
    check_run,
    check_start,
)
from hypergrad.methods._run import joint_gradient, objective, require_dependence, upper_objective
from hypergrad.methods._sampled import step_size_of
from hypergrad.methods.base import Method, Total, UpperLoss
from hypergrad.step import Recording
from hypergrad.trajectory import Trajectory


@dataclass(frozen=True)
class BOME(Method):
    r"""A first-order direction that lowers the upper loss while it drives the lower level's suboptimality to zero.

    .. math:: q(w, u) = L(w, u) - L(w_K, u), \quad
        \lambda = \max\Big(\frac{\phi - \langle \nabla f, \nabla q\rangle}{\lVert \nabla q \rVert^2}, 0\Big), \qquad
        (\theta, u) \mathrel{-}= \xi\, (\nabla f + \lambda \nabla q) \text{ at } (\theta, u)

    with upper loss f, lower loss L (with the lower optimizer's coupled weight decay), the copy theta of the lower
    parameters, the run's end w_K held constant, gradients over theta and u together, and phi = eta norm(grad q)^2 or
    eta q. The part in u is returned; the new theta is the `h.state`. L is taken on the run's last batch.

    *The published algorithm.* This object does the step on theta and the direction in u. The lower run is the T plain
    gradient steps, **begun at theta**: `descend(loss, traj.named(h.state), ...)` each time, with no `state=`, since
    theta is where the run begins. The upper step is the upper optimizer's, SGD with learning rate xi. An engine keeps
    theta in its state beside lower parameters that go on where they ended, so w_K there is a better solution than T
    steps from theta give; all else is the same.

    Cost: 2 gradients of each loss in lower and upper parameters together, and one of the lower loss in `upper`.

    Bias: it is the gradient of no function of u alone: it descends on the pair (theta, u), and its fixed points are
    those of the bilevel problem where w_K is a solution.

    Args:
        step_size: xi > 0, of the step on theta; None for the learning rate of the run's last step.
        eta: how fast suboptimality is to fall, > 0.
        barrier: what eta multiplies: "gradient", the squared norm of the gradient of q, or "value", q itself.

    Raises:
        ValueError: for options out of range; for `solved` without a state, where no run began at theta.

    Reference: B. Liu, M. Ye, S. Wright, P. Stone, Q. Liu, "BOME! Bilevel optimization made easy: A simple first-order
        approach", NeurIPS 2022, arXiv 2209.08709.
    """

    perturbs: ClassVar[bool] = True

    step_size: float | None = None
    eta: float = 0.5
    barrier: Literal["gradient", "value"] = "gradient"

    def __post_init__(self) -> None:
        """Validate the options."""
        check_number("BOME", "step_size", self.step_size, none=True)
        check_number("BOME", "eta", self.eta)
        check_option(self.barrier in ("gradient", "value"), "BOME", "barrier", self.barrier, "'gradient' or 'value'")

    @property
    def differentiates_optimizer(self) -> bool:
        """Return whether the learning rate is read."""
        return self.step_size is None

    @property
    def fixed_point(self) -> Literal["refuse"]:
        """Return that the run must end at a fixed point."""
        return "refuse"

    def recording(self, num_steps: int) -> Recording:
        """Return that the start of the run is read."""
        return Recording(first=0, every=max(num_steps, 1))

    def total(
        self, upper_loss: UpperLoss, trajectory: Trajectory, upper: Params, batch: Any, state: Tensor | None
    ) -> Total:
        """Return the direction in `upper`, and the next theta as the state; the value is at the run's end."""
        check_loss(self, trajectory)
        check_fixed_point(self, trajectory, upper, decoupled="refuse")
        check_initial(self, state, trajectory.end_flat.shape, warm_start=True)
        theta = self._began(trajectory) if state is None else state
        step_size = step_size_of(self, self.step_size, trajectory, upper)
        end = trajectory.end_flat
        upper_at = upper_objective(upper_loss, trajectory, batch)
        _, f_lower, f_upper = joint_gradient(upper_at, theta, upper)
        lower_here, q_lower, at_theta = joint_gradient(lambda w, u: objective(self, trajectory, w, u), theta, upper)
        q_upper = add(at_theta, upper_gradient(lambda u: -objective(self, trajectory, end, u), upper))
        check_start(self, trajectory, upper, at_theta)
        require_dependence(upper, {**f_upper, **q_upper})
        norm = torch.dot(q_lower, q_lower) + _dot(q_upper, q_upper)
        if self.barrier == "gradient":
            phi = self.eta * norm
        else:
            phi = self.eta * (lower_here - objective(self, trajectory, end, upper).detach())
        aligned = torch.dot(f_lower, q_lower) + _dot(f_upper, q_upper)
        positive = norm > 0
        strength = torch.where(positive, torch.relu(phi - aligned) / torch.where(positive, norm, 1.0), 0.0)
        grad = add(f_upper, {name: strength * g for name, g in q_upper.items()})
        following = theta - step_size * (f_lower + strength * q_lower)
        value = upper_at(end, upper).detach()
        count = torch.full((), 5, dtype=torch.int64, device=end.device)
        return Total(grad, None, Stats(num_gradients=count, strength=strength), following, value)

    def _began(self, trajectory: Trajectory) -> Tensor:
        """Return where the run began."""
        check_run(self, trajectory, "begins its copy of the lower parameters where the run began")
        flat = trajectory.steps[0].flat
        if flat is None:
            raise ValueError(
                "BOME: the record of this run was thinned and does not hold where it began. Record it for this method: "
                "descend(..., recording=method.recording(num_steps))."
            )
        return flat


def _dot(one: Params, other: Params) -> Tensor | float:
    """Return the inner product over the names that both have."""
    total: Tensor | float = 0.0
    for name in one.keys() & other.keys():
        total = total + torch.sum(one[name] * other[name])
    return total
