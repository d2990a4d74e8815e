"""F2SA: the value-function penalty in a single loop, its penalized copy and its strength carried along."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from hypergrad._flat import Params
from hypergrad._result import Stats
from hypergrad._tape import add, gradient, upper_gradient
from hypergrad.methods._refusals import check_fixed_point, check_initial, check_loss, check_number, check_start
from hypergrad.methods._run import objective, require_dependence, upper_objective
from hypergrad.methods._sampled import check_count, step_size_of
from hypergrad.methods.base import Method, Total, UpperLoss
from hypergrad.step import Recording
from hypergrad.trajectory import Trajectory


@dataclass(frozen=True)
class F2SA(Method):
    r"""d(upper loss)/d(upper) from gradients alone, with a penalized copy of the lower parameters that moves along.

    .. math:: y \leftarrow y - \alpha\, \big(\partial_w f(y, u) + \lambda_k\, \partial_w L(y, u)\big)
        \quad (T \text{ times}), \qquad
        d = \partial_u f(y, u) + \lambda_k \big(\partial_u L(y, u) - \partial_u L(w_K, u)\big), \quad
        \lambda_{k+1} = \lambda_k + \delta

    with upper loss f, lower loss L (with the lower optimizer's coupled weight decay), end of the run w_K, the copy y,
    its step size alpha and the penalty strength lambda. `h.state` holds y and, as its last entry, the next lambda. L is
    taken on the run's last T batches in y's steps and on its last batch in d; f on the upper batch throughout.

    *The published algorithm.* This object does the steps on y, the direction d and the growth of lambda. The T lower
    steps are the problem's (plain SGD with learning rate gamma, `steps=T`, going on where they ended), the upper step
    the upper optimizer's, with learning rate xi alpha. An engine runs them in the published order. Where the paper
    draws the samples of y's steps and of d apart, these are the run's own and the one upper batch.

    Cost: 2 gradients per step on the copy, and 3 more; no second derivative.

    Bias: O(1 / strength) at solved levels, so it goes to zero only as the strength grows; before that, the distance of
    both levels from their solutions times the strength.

    Args:
        strength: lambda_0 > 0.
        growth: delta >= 0, added to the strength by every call.
        step_size: alpha > 0, below 2 / (largest eigenvalue of the Hessian of f + lambda L); None for the learning rate
            of the run's last step over 2 lambda_k, which is how the paper couples them.
        steps: T, >= 1.

    Raises:
        ValueError: for options out of range; for `solved` without a step size; for a state of another shape.

    Reference: J. Kwon, D. Kwon, S. Wright, R. Nowak, "A fully first-order method for stochastic bilevel optimization",
        ICML 2023, arXiv 2301.10945.
    """

    perturbs: ClassVar[bool] = True

    strength: float = 1.0
    growth: float = 0.0
    step_size: float | None = None
    steps: int = 1

    def __post_init__(self) -> None:
        """Validate the options."""
        check_number("F2SA", "strength", self.strength)
        check_number("F2SA", "growth", self.growth, zero=True)
        check_number("F2SA", "step_size", self.step_size, none=True)
        check_count("F2SA", "steps", self.steps)

    @property
    def differentiates_optimizer(self) -> bool:
        """Return whether the learning rate is read."""
        return self.step_size is None

    @property
    def fixed_point(self) -> Literal["refuse"]:
        """Return that the run must end at a fixed point."""
        return "refuse"

    def recording(self, num_steps: int) -> Recording:
        """Return that the start of the last `steps` steps is read."""
        first = max(num_steps - self.steps, 0)
        return Recording(first=first, every=max(num_steps - first, 1))

    def total(
        self, upper_loss: UpperLoss, trajectory: Trajectory, upper: Params, batch: Any, state: Tensor | None
    ) -> Total:
        """Return the direction d, and the copy and the next strength as the state; the value is at the run's end."""
        check_loss(self, trajectory)
        check_fixed_point(self, trajectory, upper, decoupled="refuse")
        begins = self._first_state(trajectory)
        check_initial(self, state, begins.shape, warm_start=True)
        present = begins if state is None else state
        copy, strength = present[:-1], present[-1]
        step_size = step_size_of(self, self.step_size, trajectory, upper)
        if self.step_size is None:
            step_size = step_size / (2 * strength)
        upper_at = upper_objective(upper_loss, trajectory, batch)
        samples = trajectory.samples(self.steps)
        for k in range(self.steps):
            sample = samples[k % len(samples)]

            def penalized(flat: Tensor, sample: Any = sample) -> Tensor:
                return upper_at(flat, upper) + strength * objective(self, trajectory, flat, upper, sample)

            copy = copy - step_size * gradient(penalized, copy)
        at_copy = upper_gradient(lambda u: upper_at(copy, u) + strength * objective(self, trajectory, copy, u), upper)
        at_end = upper_gradient(lambda u: -strength * objective(self, trajectory, trajectory.end_flat, u), upper)
        check_start(self, trajectory, upper, at_end)
        require_dependence(upper, at_copy)
        value = upper_at(trajectory.end_flat, upper).detach()
        count = torch.full((), 2 * self.steps + 3, dtype=torch.int64, device=copy.device)
        stats = Stats(num_gradients=count, strength=strength)
        following = torch.cat([copy, (strength + self.growth)[None]])
        return Total(add(at_copy, at_end), None, stats, following, value)

    def _first_state(self, trajectory: Trajectory) -> Tensor:
        """Return the copy where the run's last `steps` steps began, or at the solution, and the first strength."""
        window = trajectory.steps[-self.steps :]
        began = window[0].flat if window else None
        flat = trajectory.end_flat if began is None else began
        return torch.cat([flat, torch.full_like(flat[:1], self.strength)])
