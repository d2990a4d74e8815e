"""AmIGO: a few stochastic steps on the linear system, warm-started from the last upper step's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hypergrad._flat import Params
from hypergrad._result import Stats
from hypergrad.methods._refusals import check_fixed_point, check_initial, check_loss, check_number, check_start
from hypergrad.methods._sampled import SampledRule, check_count, step_size_of, tapes
from hypergrad.methods.base import Pulled
from hypergrad.trajectory import Trajectory


@dataclass(frozen=True)
class AmIGO(SampledRule):
    r"""The implicit response with N warm-started stochastic gradient steps on its linear system per upper step.

    .. math:: x^n = x^{n-1} + \beta\, (v - (\partial_w F_n)^T x^{n-1}), \quad n = 1 \dots N, \qquad
        \Big(\frac{dw^*}{du}\Big)^T v \approx -(\partial_u F_{N+1})^T x^N

    F_n is the stationarity condition of loss and optimizer at the end of the run, on the n-th batch, v the cotangent,
    beta the step size. x^0 is the x^N of the last call, the `h.state` (minus the paper's z), or zero at the first.

    *The published algorithm.* This object does the steps on x and the upper direction. The T warm-started lower steps
    are the problem's (plain SGD, `steps=T`, going on where they ended), the upper step the upper optimizer's; an engine
    runs them in the published order. Batches of its own for each product: `batches=N + 1, fresh=True`.

    Cost: N products and one mixed product; one gradient of the lower loss, or N + 1 of them if `batches` > 1.

    Bias: that of N steps from the last solution: small where the upper level moves slowly.

    Args:
        steps: N, >= 1.
        step_size: beta > 0, below 2 / (largest eigenvalue of the lower Hessian); None for the learning rate of the
            run's last step.
        batches: how many of the run's last batches the products take in turn; the mixed product takes the next.
        fresh: draw these batches anew once per lower run instead of taking the run's last; engine only.

    Raises:
        ValueError: for options out of range; for `solved` without a step size; for a state of another shape.

    Reference: M. Arbel, J. Mairal, "Amortized implicit differentiation for stochastic bilevel optimization", ICLR 2022,
        arXiv 2111.14580.
    """

    steps: int = 10
    step_size: float | None = None
    batches: int = 1
    fresh: bool = False

    def __post_init__(self) -> None:
        """Validate the options."""
        check_count("AmIGO", "steps", self.steps)
        check_number("AmIGO", "step_size", self.step_size, none=True)
        check_count("AmIGO", "batches", self.batches)

    def vjp(self, trajectory: Trajectory, upper: Params, cotangent: Tensor, state: Tensor | None = None) -> Pulled:
        """Return -(dF/du)^T x^N, and x^N as the state."""
        check_loss(self, trajectory)
        check_fixed_point(self, trajectory, upper, decoupled="refuse")
        check_initial(self, state, cotangent.shape, warm_start=True)
        step_size = step_size_of(self, self.step_size, trajectory, upper)
        x = torch.zeros_like(cotangent) if state is None else state
        taped = tapes(trajectory, upper, batches=self.batches, count=self.steps + 1)
        for _ in range(self.steps):
            x = x + step_size * (cotangent - next(taped).pull_lower(x))
        last = next(taped)
        grad = {name: -g for name, g in last.pull_upper(x).items()}
        check_start(self, trajectory, upper, grad)
        count = torch.full((), self.steps, dtype=torch.int64, device=cotangent.device)
        return Pulled(grad, None, Stats(num_products=count, num_steps=count, stationarity=last.value.norm()), x)
