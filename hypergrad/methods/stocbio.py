"""stocBiO: a truncated Neumann series, each product on a batch of its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hypergrad._flat import Params
from hypergrad._result import Stats
from hypergrad.methods._refusals import check_fixed_point, check_loss, check_number, check_start, refuse_state
from hypergrad.methods._sampled import SampledRule, check_count, step_size_of, tapes
from hypergrad.methods.base import Pulled
from hypergrad.trajectory import Trajectory


@dataclass(frozen=True)
class StocBiO(SampledRule):
    r"""The implicit response with a stochastic Neumann series of Q products in place of the inverse Hessian.

    .. math:: r_q = (I - \eta\, \partial_w F_q)^T r_{q-1}, \quad r_0 = v, \qquad
        \Big(\frac{dw^*}{du}\Big)^T v \approx -(\partial_u F_{Q+1})^T\, \eta \sum_{q=0}^{Q} r_q

    F_q is the stationarity condition of loss and optimizer at the end of the run, on the q-th batch, v the cotangent,
    eta the step size. On one batch it is `Implicit(Neumann(Q + 1, step_size=eta))`; with independent batches its
    expectation is that series of the expected Hessian. No state.

    *The published algorithm.* This object does the series and the upper direction. The D warm-started lower steps are
    the problem's (plain SGD, `steps=D`), the upper step the upper optimizer's; an engine runs them in that order.
    Independent batches for products and mixed product: `batches=Q + 1, fresh=True`. The paper counts the products'
    batches from the last, which may be the largest: here the first product takes the first batch, of whatever size.

    Cost: Q products and one mixed product; one gradient of the lower loss, or Q + 1 of them if `batches` > 1.

    Bias: that of a Neumann series with Q + 1 terms: small eigenvalues are underestimated.

    Args:
        num_products: Q, >= 1.
        step_size: eta > 0, below 2 / (largest eigenvalue of the lower Hessian); None for the learning rate of the run's
            last step.
        batches: how many of the run's last batches the products take in turn; the mixed product takes the next.
        fresh: draw these batches anew once per lower run instead of taking the run's last; engine only.

    Raises:
        ValueError: for options out of range; for `solved` without a step size; for a state.

    Reference: K. Ji, J. Yang, Y. Liang, "Bilevel optimization: Convergence analysis and enhanced design", ICML 2021,
        arXiv 2010.07962.
    """

    num_products: int = 10
    step_size: float | None = None
    batches: int = 1
    fresh: bool = False

    def __post_init__(self) -> None:
        """Validate the options."""
        check_count("StocBiO", "num_products", self.num_products)
        check_number("StocBiO", "step_size", self.step_size, none=True)
        check_count("StocBiO", "batches", self.batches)

    def vjp(self, trajectory: Trajectory, upper: Params, cotangent: Tensor, state: Tensor | None = None) -> Pulled:
        """Return -(dF/du)^T of the series."""
        refuse_state(self, state)
        check_loss(self, trajectory)
        check_fixed_point(self, trajectory, upper, decoupled="refuse")
        step_size = step_size_of(self, self.step_size, trajectory, upper)
        taped = tapes(trajectory, upper, batches=self.batches, count=self.num_products + 1)
        term = total = cotangent
        for _ in range(self.num_products):
            term = term - next(taped).pull_lower(step_size * term)
            total = total + term
        last = next(taped)
        grad = {name: -g for name, g in last.pull_upper(step_size * total).items()}
        check_start(self, trajectory, upper, grad)
        count = torch.full((), self.num_products, dtype=torch.int64, device=cotangent.device)
        return Pulled(grad, None, Stats(num_products=count, num_steps=count, stationarity=last.value.norm()))
