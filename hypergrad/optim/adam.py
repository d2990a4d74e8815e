"""Adam and AdamW: steps scaled by running averages of the gradient and of its square."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from hypergrad.optim._algebra import (
    Scalar,
    add_ratio,
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

_HYPER = frozenset({"lr", "beta1", "beta2", "eps", "weight_decay"})


@dataclass(frozen=True, kw_only=True)
class Adam(Optimizer):
    """Adam that equals `torch.optim.Adam`, and can be differentiated.

    With gradient g (negated under `maximize`), weight decay w, averages m and v, step count t:

        g <- g + w p;   m <- beta1 m + (1 - beta1) g;   v <- beta2 v + (1 - beta2) g^2
        p <- p - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)

    `amsgrad` divides by the largest v so far; `decoupled_weight_decay` scales p by 1 - lr w instead of adding
    w p to g. Cost: two vectors of state (three with `amsgrad`), about ten kernels a step.

    The derivative is set to 0 in coordinates whose v is exactly zero, where every gradient so far was zero:
    the formula's own slope there is 1 / eps.

    Args:
        lr: a number, a tensor, or a schedule of the step count.
        betas: decay rates of the two averages; `hyper` names them "beta1" and "beta2".
        eps: added to the root.
        weight_decay: w.
        amsgrad: divide by the largest second moment so far.
        decoupled_weight_decay: as `AdamW`.
        maximize: ascend.

    Raises:
        ValueError: a negative option, or betas outside [0, 1).

    Example:
        >>> import torch
        >>> adam = Adam(lr=0.1)
        >>> params = torch.tensor([1.0, 2.0])
        >>> params, state = adam.update(params, torch.tensor([3.0, 0.0]), adam.init(params))
        >>> params
        tensor([0.9000, 2.0000])

    Reference: Diederik Kingma, Jimmy Ba, "Adam: A Method for Stochastic Optimization", 2014, arXiv:1412.6980.
    Sashank Reddi, Satyen Kale, Sanjiv Kumar, "On the Convergence of Adam and Beyond", 2019, arXiv:1904.09237.
    """

    HYPER: ClassVar[frozenset[str]] = _HYPER

    lr: LearningRate = field(default=1e-3, kw_only=False)
    betas: tuple[Scalar, Scalar] = (0.9, 0.999)
    eps: Scalar = 1e-8
    weight_decay: Scalar = 0.0
    amsgrad: bool = False
    decoupled_weight_decay: bool = False

    def __post_init__(self) -> None:
        """Check the options."""
        _check(self, self.betas, self.eps, self.weight_decay)

    def init(self, params: Tensor) -> State:
        """Return the state before the first step: averages of zero."""
        return _init(params, self.amsgrad)

    def update(self, params: Tensor, grad: Tensor, state: State, hyper: Hyper | None = None) -> tuple[Tensor, State]:
        """Return the parameters and the state after one step."""
        lr = learning_rate(self, state, hyper)
        decay = self.decay(hyper)
        grad = ascent_gradient(params, grad, self.maximize, decay.coupled)
        return _step(shrink(params, lr, decay.decoupled), grad, state, hyper, lr, self.betas, self.eps, self.amsgrad)

    def decay(self, hyper: Hyper | None = None) -> Decay:
        """Return the weight decay: coupled, unless `decoupled_weight_decay`."""
        weight_decay = option(hyper, "weight_decay", self.weight_decay)
        return Decay(decoupled=weight_decay) if self.decoupled_weight_decay else Decay(coupled=weight_decay)


@dataclass(frozen=True, kw_only=True)
class AdamW(Optimizer):
    """AdamW that equals `torch.optim.AdamW`, and can be differentiated.

    As `Adam`, with the weight decay w applied to the parameters themselves, p <- (1 - lr w) p, before the
    step. The decay does not enter the averages, so the fixed point is not that of a penalized loss. Cost and
    derivative at zero gradients as for `Adam`.

    Args:
        lr: a number, a tensor, or a schedule of the step count.
        betas: decay rates of the two averages; `hyper` names them "beta1" and "beta2".
        eps: added to the root.
        weight_decay: w; decoupled.
        amsgrad: divide by the largest second moment so far.
        maximize: ascend.

    Raises:
        ValueError: a negative option, or betas outside [0, 1).

    Example:
        >>> import torch
        >>> adamw = AdamW(lr=0.1, weight_decay=0.5)
        >>> params = torch.tensor([1.0, 2.0])
        >>> params, state = adamw.update(params, torch.tensor([3.0, 0.0]), adamw.init(params))
        >>> params
        tensor([0.8500, 1.9000])

    Reference: Ilya Loshchilov, Frank Hutter, "Decoupled Weight Decay Regularization", 2017, arXiv:1711.05101.
    """

    HYPER: ClassVar[frozenset[str]] = _HYPER

    lr: LearningRate = field(default=1e-3, kw_only=False)
    betas: tuple[Scalar, Scalar] = (0.9, 0.999)
    eps: Scalar = 1e-8
    weight_decay: Scalar = 1e-2
    amsgrad: bool = False

    def __post_init__(self) -> None:
        """Check the options."""
        _check(self, self.betas, self.eps, self.weight_decay)

    def init(self, params: Tensor) -> State:
        """Return the state before the first step: averages of zero."""
        return _init(params, self.amsgrad)

    def update(self, params: Tensor, grad: Tensor, state: State, hyper: Hyper | None = None) -> tuple[Tensor, State]:
        """Return the parameters and the state after one step."""
        lr = learning_rate(self, state, hyper)
        grad = -grad if self.maximize else grad
        params = shrink(params, lr, self.decay(hyper).decoupled)
        return _step(params, grad, state, hyper, lr, self.betas, self.eps, self.amsgrad)

    def decay(self, hyper: Hyper | None = None) -> Decay:
        """Return the decoupled weight decay."""
        return Decay(decoupled=option(hyper, "weight_decay", self.weight_decay))


def _check(optimizer: Optimizer, betas: tuple[Scalar, Scalar], eps: Scalar, weight_decay: Scalar) -> None:
    check_learning_rate(optimizer)
    check_betas(optimizer, betas)
    check_range(optimizer, "eps", eps)
    check_range(optimizer, "weight_decay", weight_decay)


def _init(params: Tensor, amsgrad: bool) -> State:
    state: State = {"step": 0, "exp_avg": torch.zeros_like(params), "exp_avg_sq": torch.zeros_like(params)}
    if amsgrad:
        state["max_exp_avg_sq"] = torch.zeros_like(params)
    return state


def _step(
    params: Tensor,
    grad: Tensor,
    state: State,
    hyper: Hyper | None,
    lr: Scalar,
    betas: tuple[Scalar, Scalar],
    eps: Scalar,
    amsgrad: bool,
) -> tuple[Tensor, State]:
    """Return the step along the scaled average; weight decay has been applied."""
    beta1, beta2 = option(hyper, "beta1", betas[0]), option(hyper, "beta2", betas[1])
    step = state["step"] + 1
    first = average(slot(state, "exp_avg"), grad, beta1)
    second = average_square(slot(state, "exp_avg_sq"), grad, beta2)
    new: State = {"step": step, "exp_avg": first, "exp_avg_sq": second}
    if amsgrad:
        second = torch.maximum(slot(state, "max_exp_avg_sq"), second)
        new["max_exp_avg_sq"] = second
    correction1, correction2 = 1.0 - power(beta1, step), 1.0 - power(beta2, step)
    denominator = root_plus(second, option(hyper, "eps", eps), power(correction2, 0.5))
    return add_ratio(params, frozen_where_unseen(first, second), denominator, -(lr / correction1)), new
