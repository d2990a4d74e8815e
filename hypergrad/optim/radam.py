"""RAdam: Adam whose adaptive step waits until its variance is tractable."""

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
class RAdam(Optimizer):
    """RAdam that equals `torch.optim.RAdam`, and can be differentiated.

    With gradient g (negated under `maximize`), weight decay w, averages m and v, step count t and
    R = 2 / (1 - beta2) - 1:

        g <- g + w p;   m <- beta1 m + (1 - beta1) g;   v <- beta2 v + (1 - beta2) g^2
        rho = R - 2 t beta2^t / (1 - beta2^t)
        r = sqrt((rho - 4)(rho - 2) R / ((R - 4)(R - 2) rho)) sqrt(1 - beta2^t) / (sqrt(v) + eps)
        p <- p - lr m r / (1 - beta1^t)   with r = 1 unless rho > 5

    `decoupled_weight_decay` scales p by 1 - lr w instead of adding w p to g. Cost: two vectors of state,
    about ten kernels a step; with a tensor for beta2 both branches are computed. The derivative of an
    adaptive step (rho > 5) is set to 0 in coordinates whose v is exactly zero, where every gradient so far
    was zero; and the derivative in beta2 is that of the branch taken.

    Args:
        lr: a number, a tensor, or a schedule of the step count.
        betas: decay rates of the two averages; `hyper` names them "beta1" and "beta2".
        eps: added to the root.
        weight_decay: w.
        decoupled_weight_decay: decay the parameters themselves.
        maximize: ascend.

    Raises:
        ValueError: a negative option, or betas outside [0, 1).

    Example:
        >>> import torch
        >>> radam = RAdam(lr=0.1)
        >>> params = torch.tensor([1.0, 2.0])
        >>> params, state = radam.update(params, torch.tensor([3.0, 0.0]), radam.init(params))
        >>> params
        tensor([0.7000, 2.0000])

    Reference: Liyuan Liu, Haoming Jiang, Pengcheng He, Weizhu Chen, Xiaodong Liu, Jianfeng Gao, Jiawei Han,
    "On the Variance of the Adaptive Learning Rate and Beyond", 2019, arXiv:1908.03265.
    """

    HYPER: ClassVar[frozenset[str]] = frozenset({"lr", "beta1", "beta2", "eps", "weight_decay"})

    lr: LearningRate = field(default=1e-3, kw_only=False)
    betas: tuple[Scalar, Scalar] = (0.9, 0.999)
    eps: Scalar = 1e-8
    weight_decay: Scalar = 0.0
    decoupled_weight_decay: bool = False

    def __post_init__(self) -> None:
        """Check the options."""
        check_learning_rate(self)
        check_betas(self, self.betas)
        check_range(self, "eps", self.eps)
        check_range(self, "weight_decay", self.weight_decay)

    def init(self, params: Tensor) -> State:
        """Return the state before the first step: averages of zero."""
        return {"step": 0, "exp_avg": torch.zeros_like(params), "exp_avg_sq": torch.zeros_like(params)}

    def update(self, params: Tensor, grad: Tensor, state: State, hyper: Hyper | None = None) -> tuple[Tensor, State]:
        """Return the parameters and the state after one step."""
        lr = learning_rate(self, state, hyper)
        beta1, beta2 = option(hyper, "beta1", self.betas[0]), option(hyper, "beta2", self.betas[1])
        eps = option(hyper, "eps", self.eps)
        step = state["step"] + 1
        decay = self.decay(hyper)
        grad = ascent_gradient(params, grad, self.maximize, decay.coupled)
        params = shrink(params, lr, decay.decoupled)
        first = average(slot(state, "exp_avg"), grad, beta1)
        second = average_square(slot(state, "exp_avg_sq"), grad, beta2)
        scale = -(lr / (1.0 - power(beta1, step)))
        factor, adaptive = _rectification(beta2, step)
        new: State = {"step": step, "exp_avg": first, "exp_avg_sq": second}
        if adaptive is False:
            return add_scaled(params, first, scale), new
        denominator = root_plus(second, eps)
        stepped = add_ratio(params, frozen_where_unseen(first, second), denominator, scale * factor)
        if isinstance(adaptive, Tensor):
            stepped = torch.where(adaptive, stepped, add_scaled(params, first, scale))
        return stepped, new

    def decay(self, hyper: Hyper | None = None) -> Decay:
        """Return the weight decay: coupled, unless `decoupled_weight_decay`."""
        weight_decay = option(hyper, "weight_decay", self.weight_decay)
        return Decay(decoupled=weight_decay) if self.decoupled_weight_decay else Decay(coupled=weight_decay)


def _rectification(beta2: Scalar, step: int | Tensor) -> tuple[Scalar, bool | Tensor]:
    """Return the factor of the adaptive step, bias correction included, and whether the step is adaptive.

    Where it is not, the factor is some finite number with finite derivatives.
    """
    correction = 1.0 - power(beta2, step)
    longest = 2.0 / (1.0 - beta2) - 1.0
    length = longest - 2.0 * step * power(beta2, step) / correction
    adaptive = length > 5.0
    if isinstance(adaptive, Tensor):
        length = torch.where(adaptive, length, 6.0)
        longest = torch.where(adaptive, longest, 6.0)
    elif not adaptive:
        return 1.0, False
    ratio = (length - 4.0) * (length - 2.0) * longest / ((longest - 4.0) * (longest - 2.0) * length)
    return power(ratio, 0.5) * power(correction, 0.5), adaptive
