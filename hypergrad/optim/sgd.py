"""Stochastic gradient descent, with momentum."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from hypergrad.optim._algebra import Scalar, add_scaled, is_zero
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
class SGD(Optimizer):
    """Gradient descent that equals `torch.optim.SGD`, and can be differentiated.

    With parameters p, gradient g (negated under `maximize`), weight decay w, momentum m, dampening d and
    buffer b:

        g <- g + w p;   b <- m b + (1 - d) g   (b <- g at the first step);   p <- p - lr b

    where b stands for g if m = 0, and for g + m b if `nesterov`. Cost: 2n numbers read and n written a step,
    plus as much for the buffer.

    Args:
        lr: a number, a tensor, or a schedule of the step count.
        momentum: factor m of the buffer; it must be non-zero here for `hyper` to replace it.
        dampening: d, from the second step on.
        weight_decay: w; coupled, so it moves the fixed point.
        nesterov: look ahead; needs a momentum and no dampening.
        maximize: ascend.

    Raises:
        ValueError: a negative option, or `nesterov` without momentum or with dampening.

    Example:
        >>> import torch
        >>> sgd = SGD(lr=0.1, momentum=0.9)
        >>> params = torch.tensor([1.0, 2.0])
        >>> params, state = sgd.update(params, torch.tensor([1.0, -1.0]), sgd.init(params))
        >>> params
        tensor([0.9000, 2.1000])

    Reference: Ilya Sutskever, James Martens, George Dahl, Geoffrey Hinton, "On the importance of
    initialization and momentum in deep learning", ICML 2013.
    """

    HYPER: ClassVar[frozenset[str]] = frozenset({"lr", "momentum", "dampening", "weight_decay"})
    is_linear: ClassVar[bool] = True

    lr: LearningRate = field(default=1e-3, kw_only=False)
    momentum: Scalar = 0.0
    dampening: Scalar = 0.0
    weight_decay: Scalar = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        """Check the options."""
        check_learning_rate(self)
        check_range(self, "momentum", self.momentum)
        check_range(self, "weight_decay", self.weight_decay)
        if self.nesterov and (is_zero(self.momentum) or not is_zero(self.dampening)):
            raise ValueError(
                "SGD: nesterov needs a momentum above 0 and a dampening of 0, got "
                f"momentum={self.momentum!r}, dampening={self.dampening!r}."
            )

    def init(self, params: Tensor) -> State:
        """Return the state before the first step: an empty momentum buffer, where there is momentum."""
        if is_zero(self.momentum):
            return {"step": 0}
        return {"step": 0, "momentum_buffer": torch.zeros_like(params)}

    def update(self, params: Tensor, grad: Tensor, state: State, hyper: Hyper | None = None) -> tuple[Tensor, State]:
        """Return the parameters and the state after one step."""
        lr = learning_rate(self, state, hyper)
        step = state["step"]
        grad = ascent_gradient(params, grad, self.maximize, option(hyper, "weight_decay", self.weight_decay))
        if is_zero(self.momentum):
            return add_scaled(params, grad, -lr), {"step": step + 1}
        momentum = option(hyper, "momentum", self.momentum)
        damped = _damp(grad, option(hyper, "dampening", self.dampening), step)
        buffer = add_scaled(damped, slot(state, "momentum_buffer"), momentum)
        direction = add_scaled(grad, buffer, momentum) if self.nesterov else buffer
        return add_scaled(params, direction, -lr), {"step": step + 1, "momentum_buffer": buffer}

    def decay(self, hyper: Hyper | None = None) -> Decay:
        """Return the coupled weight decay."""
        return Decay(coupled=option(hyper, "weight_decay", self.weight_decay))

    def accepts(self) -> frozenset[str]:
        """Return the names that `hyper` may replace: those of the momentum only where there is a buffer."""
        return self.HYPER - {"momentum", "dampening"} if is_zero(self.momentum) else self.HYPER


def _damp(grad: Tensor, dampening: Scalar, step: int | Tensor) -> Tensor:
    """Return (1 - dampening) * grad, and `grad` itself at the first step."""
    if is_zero(dampening) or (not isinstance(step, Tensor) and step == 0):
        return grad
    damped = grad * (1.0 - dampening)
    return torch.where(step == 0, grad, damped) if isinstance(step, Tensor) else damped
