"""NAdam: Adam with Nesterov momentum."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from hypergrad.optim._algebra import (
    Scalar,
    average,
    average_square,
    frozen_where_unseen,
    power,
    root_plus,
)
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
    shrink,
    slot,
)


@dataclass(frozen=True, kw_only=True)
class NAdam(Optimizer):
    """NAdam that equals `torch.optim.NAdam`, and can be differentiated.

    With gradient g (negated under `maximize`), weight decay w, averages m and v, step count t and
    momentum decay q:

        g <- g + w p;   m <- beta1 m + (1 - beta1) g;   v <- beta2 v + (1 - beta2) g^2
        mu_t = beta1 (1 - 0.96^(t q) / 2);   M <- M mu_t
        p <- p - lr [(1 - mu_t) / (1 - M) g + mu_{t+1} / (1 - M mu_{t+1}) m] / (sqrt(v / (1 - beta2^t)) + eps)

    `decoupled_weight_decay` scales p by 1 - lr w instead of adding w p to g. Cost: two vectors of state,
    about twelve kernels a step. The derivative is set to 0 in coordinates whose v is exactly zero, where
    every gradient so far was zero.

    Args:
        lr: a number, a tensor, or a schedule of the step count.
        betas: decay rates of the two averages; `hyper` names them "beta1" and "beta2".
        eps: added to the root.
        weight_decay: w.
        momentum_decay: q.
        decoupled_weight_decay: decay the parameters themselves.
        maximize: ascend.

    Raises:
        ValueError: a negative option, or betas outside [0, 1).

    Example:
        >>> import torch
        >>> nadam = NAdam(lr=0.1)
        >>> params = torch.tensor([1.0, 2.0])
        >>> params, state = nadam.update(params, torch.tensor([3.0, 0.0]), nadam.init(params))
        >>> params
        tensor([0.8944, 2.0000])

    Reference: Timothy Dozat, "Incorporating Nesterov Momentum into Adam", ICLR 2016 workshop.
    """

    HYPER: ClassVar[frozenset[str]] = frozenset({"lr", "beta1", "beta2", "eps", "weight_decay", "momentum_decay"})

    lr: LearningRate = field(default=2e-3, kw_only=False)
    betas: tuple[Scalar, Scalar] = (0.9, 0.999)
    eps: Scalar = 1e-8
    weight_decay: Scalar = 0.0
    momentum_decay: Scalar = 4e-3
    decoupled_weight_decay: bool = False

    def __post_init__(self) -> None:
        """Check the options."""
        check_learning_rate(self)
        check_betas(self, self.betas)
        check_range(self, "eps", self.eps)
        check_range(self, "weight_decay", self.weight_decay)
        check_range(self, "momentum_decay", self.momentum_decay)

    def init(self, params: Tensor) -> State:
        """Return the state before the first step; `mu_product`, the M above, is 0-dimensional."""
        return {
            "step": 0,
            "exp_avg": torch.zeros_like(params),
            "exp_avg_sq": torch.zeros_like(params),
            "mu_product": torch.ones((), dtype=params.dtype, device=params.device),
        }

    def update(self, params: Tensor, grad: Tensor, state: State, hyper: Hyper | None = None) -> tuple[Tensor, State]:
        """Return the parameters and the state after one step."""
        lr = learning_rate(self, state, hyper)
        beta1, beta2 = option(hyper, "beta1", self.betas[0]), option(hyper, "beta2", self.betas[1])
        momentum_decay = option(hyper, "momentum_decay", self.momentum_decay)
        step = state["step"] + 1
        decay = self.decay(hyper)
        grad = ascent_gradient(params, grad, self.maximize, decay.coupled)
        params = shrink(params, lr, decay.decoupled)
        mu = beta1 * (1.0 - 0.5 * power(0.96, step * momentum_decay))
        mu_next = beta1 * (1.0 - 0.5 * power(0.96, (step + 1) * momentum_decay))
        product = slot(state, "mu_product") * mu
        first = average(slot(state, "exp_avg"), grad, beta1)
        second = average_square(slot(state, "exp_avg_sq"), grad, beta2)
        ahead = grad * (lr * (1.0 - mu) / (1.0 - product)) + first * (lr * mu_next / (1.0 - product * mu_next))
        correction = power(1.0 - power(beta2, step), 0.5)
        denominator = root_plus(second, option(hyper, "eps", self.eps), correction)
        stepped = params - frozen_where_unseen(ahead, second) / denominator
        return stepped, {"step": step, "exp_avg": first, "exp_avg_sq": second, "mu_product": product}

    def decay(self, hyper: Hyper | None = None) -> Decay:
        """Return the weight decay: coupled, unless `decoupled_weight_decay`."""
        weight_decay = option(hyper, "weight_decay", self.weight_decay)
        return Decay(decoupled=weight_decay) if self.decoupled_weight_decay else Decay(coupled=weight_decay)
