"""Adamax: Adam with the largest, not the mean, gradient in the denominator."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from hypergrad.optim._algebra import Scalar, add_ratio, average, frozen_where_unseen, power
from hypergrad.optim.base import (
    Decay,
    Hyper,
    LearningRate,
    Optimizer,
    State,
    ascent_gradient,
    check_betas,
    check_learning_rate,
    check_range,
    learning_rate,
    option,
    slot,
)


@dataclass(frozen=True, kw_only=True)
class Adamax(Optimizer):
    """Adamax that equals `torch.optim.Adamax`, and can be differentiated.

    With gradient g (negated under `maximize`), weight decay w, average m, largest gradient u, step count t:

        g <- g + w p;   m <- beta1 m + (1 - beta1) g;   u <- max(beta2 u, |g| + eps)
        p <- p - lr / (1 - beta1^t) * m / u

    Cost: two vectors of state, about nine kernels a step. The derivative is set to 0 in coordinates whose u
    is eps, where every gradient so far was zero; at a tie of the maximum it is the mean of both sides'.

    Args:
        lr: a number, a tensor, or a schedule of the step count.
        betas: decay rates of m and u; `hyper` names them "beta1" and "beta2".
        eps: added to the gradient's magnitude.
        weight_decay: w; coupled, so it moves the fixed point.
        maximize: ascend.

    Raises:
        ValueError: a negative option, or betas outside [0, 1).

    Example:
        >>> import torch
        >>> adamax = Adamax(lr=0.1)
        >>> params = torch.tensor([1.0, 2.0])
        >>> params, state = adamax.update(params, torch.tensor([3.0, 0.0]), adamax.init(params))
        >>> params
        tensor([0.9000, 2.0000])

    Reference: Diederik Kingma, Jimmy Ba, "Adam: A Method for Stochastic Optimization", 2014, arXiv:1412.6980.
    """

    HYPER: ClassVar[frozenset[str]] = frozenset({"lr", "beta1", "beta2", "eps", "weight_decay"})

    lr: LearningRate = field(default=2e-3, kw_only=False)
    betas: tuple[Scalar, Scalar] = (0.9, 0.999)
    eps: Scalar = 1e-8
    weight_decay: Scalar = 0.0

    def __post_init__(self) -> None:
        """Check the options."""
        check_learning_rate(self)
        check_betas(self, self.betas)
        check_range(self, "eps", self.eps)
        check_range(self, "weight_decay", self.weight_decay)

    def init(self, params: Tensor) -> State:
        """Return the state before the first step: zeros."""
        return {"step": 0, "exp_avg": torch.zeros_like(params), "exp_inf": torch.zeros_like(params)}

    def update(self, params: Tensor, grad: Tensor, state: State, hyper: Hyper | None = None) -> tuple[Tensor, State]:
        """Return the parameters and the state after one step."""
        lr = learning_rate(self, state, hyper)
        beta1, beta2 = option(hyper, "beta1", self.betas[0]), option(hyper, "beta2", self.betas[1])
        eps = option(hyper, "eps", self.eps)
        step = state["step"] + 1
        grad = ascent_gradient(params, grad, self.maximize, option(hyper, "weight_decay", self.weight_decay))
        first = average(slot(state, "exp_avg"), grad, beta1)
        largest = torch.maximum(slot(state, "exp_inf") * beta2, grad.abs() + eps)
        scale = -(lr / (1.0 - power(beta1, step)))
        stepped = add_ratio(params, frozen_where_unseen(first, largest, eps), largest, scale)
        return stepped, {"step": step, "exp_avg": first, "exp_inf": largest}

    def decay(self, hyper: Hyper | None = None) -> Decay:
        """Return the coupled weight decay."""
        return Decay(coupled=option(hyper, "weight_decay", self.weight_decay))
