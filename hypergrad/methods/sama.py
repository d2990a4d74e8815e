"""SAMA: first-order, with the lower optimizer's own preconditioner in place of the inverse Hessian."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from hypergrad._flat import Params
from hypergrad._functional import in_transform
from hypergrad._result import Stats
from hypergrad._tape import vjp
from hypergrad.methods._refusals import (
    check_fixed_point,
    check_loss,
    check_number,
    check_run,
    check_start,
    refuse_state,
)
from hypergrad.methods._run import difference_quotient
from hypergrad.methods.base import Pulled, ResponseMethod
from hypergrad.step import Recording
from hypergrad.trajectory import Trajectory


@dataclass(frozen=True)
class SAMA(ResponseMethod):
    r"""First-order hypergradient with the lower optimizer's own preconditioner.

    .. math:: \Big(\frac{dw^*}{du}\Big)^T v \approx (\partial_u \nabla_w L(w_K, u))^T\, p, \qquad
        p = \Big(\frac{\partial w_K}{\partial g}\Big)^T v

    g is the gradient that the last lower step fed to its optimizer. p is the vjp of that step's update in g, from the
    optimizer state before the step, with g at w_{K-1}; for SGD it is -eta v, for Adam it carries the second moment. The
    mixed product is a central difference at the end of the run, w_K, with the batch and random draws of the last step.
    It holds for every optimizer of `hypergrad.optim`. The bias is that of replacing the inverse Hessian by the
    optimizer's preconditioner.

    Cost: one lower gradient, two gradients of the lower loss in `upper`; no second derivative.

    Bias: the inverse Hessian is taken to be the optimizer's preconditioner; and O(epsilon^2).

    Args:
        epsilon: length of the perturbation of the lower parameters, > 0.

    Raises:
        ValueError: for `epsilon` out of range; for `solved`, where there is no optimizer.

    Reference: S. K. Choe, S. V. Mehta, H. Ahn, W. Neiswanger, P. Xie, E. Strubell, E. Xing, "Making scalable meta
        learning practical", NeurIPS 2023, arXiv 2310.05674.
    """

    perturbs: ClassVar[bool] = True

    epsilon: float = 1e-2

    def __post_init__(self) -> None:
        """Validate the options."""
        check_number("SAMA", "epsilon", self.epsilon)

    @property
    def serves_shards(self) -> bool:
        """Return that gradients are all it takes."""
        return True

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
        """Return the difference quotient along the preconditioned cotangent."""
        refuse_state(self, state)
        check_loss(self, trajectory)
        check_run(self, trajectory, "reads the preconditioner off the last lower step")
        check_fixed_point(self, trajectory, upper)
        preconditioned = _pull_update(trajectory, upper, cotangent)
        grad = difference_quotient(trajectory, upper, preconditioned, self.epsilon)
        check_start(self, trajectory, upper, grad)
        return Pulled(grad, None, Stats(num_gradients=torch.full((), 3, dtype=torch.int64, device=cotangent.device)))


def _pull_update(trajectory: Trajectory, upper: Params, cotangent: Tensor) -> Tensor:
    """Return the vjp of the last update in the gradient it was fed, as a cotangent of F."""
    last, flat, states = next(trajectory.backwards(trajectory.num_steps - 1, upper))
    grad = last.gradient(flat, upper)

    def update(g: Tensor) -> Tensor:
        return last.recipe.update(flat, g, states, upper, last.index)[0]

    if in_transform():
        _, pullback = vjp(update, grad)
        (pulled,) = pullback(cotangent)
    else:
        leaf = grad.detach().requires_grad_()
        with torch.enable_grad():
            (pulled,) = torch.autograd.grad(update(leaf), leaf, cotangent)
    sign = last.recipe.optimizer.sign()
    result: Tensor = sign * pulled
    return result
