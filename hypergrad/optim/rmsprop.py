"""RMSprop: steps scaled by a running average of the squared gradient."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from hypergrad.optim._algebra import (
    Scalar,
    add_ratio,
    add_scaled,
    average,
    average_square,
    frozen_where_unseen,
    is_zero,
    root_plus,
)
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
class RMSprop(Optimizer):
    """RMSprop that equals `torch.optim.RMSprop`, and can be differentiated.

    With gradient g (negated under `maximize`), weight decay w, average v, momentum m, buffer b:

        g <- g + w p;   v <- alpha v + (1 - alpha) g^2;   b <- m b + g / (sqrt(v) + eps);   p <- p - lr b

    `centered` subtracts the square of the gradient's own running average from v. Cost: one to three vectors
    of state, about eight kernels a step.

    The derivative is set to 0 in coordinates whose v is exactly zero, where every gradient so far was zero.
    Where rounding makes the centred v negative its root is taken as 0; torch returns NaN.

    Args:
        lr: a number, a tensor, or a schedule of the step count.
        alpha: decay rate of the average.
        eps: added to the root.
        weight_decay: w; coupled, so it moves the fixed point.
        momentum: factor m of the buffer; it must be non-zero here for `hyper` to replace it.
        centered: normalise by the variance rather than the second moment.
        maximize: ascend.

    Raises:
        ValueError: a negative option.

    Example:
        >>> import torch
        >>> rmsprop = RMSprop(lr=0.1, alpha=0.75)
        >>> params = torch.tensor([1.0, 2.0])
        >>> params, state = rmsprop.update(params, torch.tensor([3.0, 0.0]), rmsprop.init(params))
        >>> params
        tensor([0.8000, 2.0000])

    Reference: Tijmen Tieleman, Geoffrey Hinton, "Lecture 6.5: RMSProp", Neural Networks for Machine Learning,
    2012. Alex Graves, "Generating Sequences With Recurrent Neural Networks", 2013, arXiv:1308.0850 (centred).
    """

    HYPER: ClassVar[frozenset[str]] = frozenset({"lr", "alpha", "eps", "weight_decay", "momentum"})

    lr: LearningRate = field(default=1e-2, kw_only=False)
    alpha: Scalar = 0.99
    eps: Scalar = 1e-8
    weight_decay: Scalar = 0.0
    momentum: Scalar = 0.0
    centered: bool = False

    def __post_init__(self) -> None:
        """Check the options."""
        check_learning_rate(self)
        check_range(self, "alpha", self.alpha)
        check_range(self, "eps", self.eps)
        check_range(self, "weight_decay", self.weight_decay)
        check_range(self, "momentum", self.momentum)

    def init(self, params: Tensor) -> State:
        """Return the state before the first step: averages and buffer of zero."""
        state: State = {"step": 0, "square_avg": torch.zeros_like(params)}
        if self.centered:
            state["grad_avg"] = torch.zeros_like(params)
        if not is_zero(self.momentum):
            state["momentum_buffer"] = torch.zeros_like(params)
        return state

    def update(self, params: Tensor, grad: Tensor, state: State, hyper: Hyper | None = None) -> tuple[Tensor, State]:
        """Return the parameters and the state after one step."""
        lr = learning_rate(self, state, hyper)
        alpha = option(hyper, "alpha", self.alpha)
        grad = ascent_gradient(params, grad, self.maximize, option(hyper, "weight_decay", self.weight_decay))
        square = variance = average_square(slot(state, "square_avg"), grad, alpha)
        new: State = {"step": state["step"] + 1, "square_avg": square}
        if self.centered:
            mean = average(slot(state, "grad_avg"), grad, alpha)
            variance = torch.addcmul(square, mean, mean, value=-1).clamp(min=0.0)
            new["grad_avg"] = mean
        denominator = root_plus(variance, option(hyper, "eps", self.eps))
        numerator = frozen_where_unseen(grad, square)
        if is_zero(self.momentum):
            return add_ratio(params, numerator, denominator, -lr), new
        momentum = option(hyper, "momentum", self.momentum)
        buffer = add_ratio(slot(state, "momentum_buffer") * momentum, numerator, denominator, 1.0)
        new["momentum_buffer"] = buffer
        return add_scaled(params, buffer, -lr), new

    def decay(self, hyper: Hyper | None = None) -> Decay:
        """Return the coupled weight decay."""
        return Decay(coupled=option(hyper, "weight_decay", self.weight_decay))

    def accepts(self) -> frozenset[str]:
        """Return the names that `hyper` may replace: the momentum only where there is a buffer."""
        return self.HYPER - {"momentum"} if is_zero(self.momentum) else self.HYPER
