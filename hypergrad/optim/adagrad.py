"""Adagrad: steps scaled by the sum of all squared gradients."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from hypergrad.optim._algebra import Scalar, add_ratio, frozen_where_unseen, root_plus
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
class Adagrad(Optimizer):
    """Adagrad that equals `torch.optim.Adagrad`, and can be differentiated.

    With gradient g (negated under `maximize`), weight decay w, sum s, step count t:

        g <- g + w p;   s <- s + g^2;   p <- p - lr / (1 + (t - 1) lr_decay) * g / (sqrt(s) + eps)

    Cost: one vector of state, about seven kernels a step. The derivative is set to 0 in coordinates whose s
    is exactly zero, where every gradient so far was zero.

    Args:
        lr: a number, a tensor, or a schedule of the step count.
        lr_decay: decay of the learning rate with the step count.
        weight_decay: w; coupled, so it moves the fixed point.
        initial_accumulator_value: s before the first step.
        eps: added to the root.
        maximize: ascend.

    Raises:
        ValueError: a negative option.

    Example:
        >>> import torch
        >>> adagrad = Adagrad(lr=0.1)
        >>> params = torch.tensor([1.0, 2.0])
        >>> params, state = adagrad.update(params, torch.tensor([3.0, 0.0]), adagrad.init(params))
        >>> params
        tensor([0.9000, 2.0000])

    Reference: John Duchi, Elad Hazan, Yoram Singer, "Adaptive Subgradient Methods for Online Learning and
    Stochastic Optimization", JMLR 12, 2011.
    """

    HYPER: ClassVar[frozenset[str]] = frozenset({"lr", "lr_decay", "eps", "weight_decay"})

    lr: LearningRate = field(default=1e-2, kw_only=False)
    lr_decay: Scalar = 0.0
    weight_decay: Scalar = 0.0
    initial_accumulator_value: float = 0.0
    eps: Scalar = 1e-10

    def __post_init__(self) -> None:
        """Check the options."""
        check_learning_rate(self)
        check_range(self, "lr_decay", self.lr_decay)
        check_range(self, "weight_decay", self.weight_decay)
        check_range(self, "initial_accumulator_value", self.initial_accumulator_value)
        check_range(self, "eps", self.eps)

    def init(self, params: Tensor) -> State:
        """Return the state before the first step: sums of `initial_accumulator_value`."""
        return {"step": 0, "sum": torch.full_like(params, self.initial_accumulator_value)}

    def update(self, params: Tensor, grad: Tensor, state: State, hyper: Hyper | None = None) -> tuple[Tensor, State]:
        """Return the parameters and the state after one step."""
        step = state["step"]
        lr = learning_rate(self, state, hyper) / (1.0 + step * option(hyper, "lr_decay", self.lr_decay))
        grad = ascent_gradient(params, grad, self.maximize, option(hyper, "weight_decay", self.weight_decay))
        total = torch.addcmul(slot(state, "sum"), grad, grad)
        denominator = root_plus(total, option(hyper, "eps", self.eps))
        stepped = add_ratio(params, frozen_where_unseen(grad, total), denominator, -lr)
        return stepped, {"step": step + 1, "sum": total}

    def decay(self, hyper: Hyper | None = None) -> Decay:
        """Return the coupled weight decay."""
        return Decay(coupled=option(hyper, "weight_decay", self.weight_decay))
