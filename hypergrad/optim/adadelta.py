"""Adadelta: steps scaled by running averages of squared gradients and squared steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from hypergrad.optim._algebra import Scalar, add_scaled, average_square, frozen_where_unseen, root
from hypergrad.optim.base import (
    Decay,
    Hyper,
    LearningRate,
    Optimizer,
    State,
    ascent_gradient,
    check_learning_rate,
    check_range,
    learning_rate,
    option,
    slot,
)


@dataclass(frozen=True, kw_only=True)
class Adadelta(Optimizer):
    """Adadelta that equals `torch.optim.Adadelta`, and can be differentiated.

    With gradient g (negated under `maximize`), weight decay w, averages v and a:

        g <- g + w p;   v <- rho v + (1 - rho) g^2;   d = g sqrt(a + eps) / sqrt(v + eps)
        a <- rho a + (1 - rho) d^2;   p <- p - lr d

    Cost: two vectors of state, about twelve kernels a step. The derivative is set to 0 in coordinates whose v
    is exactly zero, where every gradient so far was zero.

    Args:
        lr: a number, a tensor, or a schedule of the step count.
        rho: decay rate of both averages.
        eps: added under both roots.
        weight_decay: w; coupled, so it moves the fixed point.
        maximize: ascend.

    Raises:
        ValueError: a negative option, or rho above 1.

    Example:
        >>> import torch
        >>> adadelta = Adadelta(rho=0.75, eps=0.25)
        >>> params = torch.tensor([1.0, 2.0])
        >>> params, state = adadelta.update(params, torch.tensor([1.0, 0.0]), adadelta.init(params))
        >>> params
        tensor([0.2929, 2.0000])

    Reference: Matthew Zeiler, "ADADELTA: An Adaptive Learning Rate Method", 2012, arXiv:1212.5701.
    """

    HYPER: ClassVar[frozenset[str]] = frozenset({"lr", "rho", "eps", "weight_decay"})

    lr: LearningRate = field(default=1.0, kw_only=False)
    rho: Scalar = 0.9
    eps: Scalar = 1e-6
    weight_decay: Scalar = 0.0

    def __post_init__(self) -> None:
        """Check the options."""
        check_learning_rate(self)
        check_range(self, "rho", self.rho, at_most=1.0)
        check_range(self, "eps", self.eps)
        check_range(self, "weight_decay", self.weight_decay)

    def init(self, params: Tensor) -> State:
        """Return the state before the first step: averages of zero."""
        return {"step": 0, "square_avg": torch.zeros_like(params), "acc_delta": torch.zeros_like(params)}

    def update(self, params: Tensor, grad: Tensor, state: State, hyper: Hyper | None = None) -> tuple[Tensor, State]:
        """Return the parameters and the state after one step."""
        lr = learning_rate(self, state, hyper)
        rho, eps = option(hyper, "rho", self.rho), option(hyper, "eps", self.eps)
        grad = ascent_gradient(params, grad, self.maximize, option(hyper, "weight_decay", self.weight_decay))
        square = average_square(slot(state, "square_avg"), grad, rho)
        steps = slot(state, "acc_delta")
        delta = root(steps + eps) / root(square + eps) * frozen_where_unseen(grad, square)
        new: State = {
            "step": state["step"] + 1,
            "square_avg": square,
            "acc_delta": average_square(steps, delta, rho),
        }
        return add_scaled(params, delta, -lr), new

    def decay(self, hyper: Hyper | None = None) -> Decay:
        """Return the coupled weight decay."""
        return Decay(coupled=option(hyper, "weight_decay", self.weight_decay))
