"""What every differentiable optimizer is: a value with a pure `init` and `update` on one flat vector."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, cast

from torch import Tensor

from hypergrad.optim._algebra import Scalar, add_scaled, is_zero

State = dict[str, Tensor | int]
"""What an optimizer remembers, named as in `torch.optim`. Its "step" counts the steps taken: an int, or a
tensor (0-dimensional or one entry a coordinate) where the count lives on a device or differs between
parameters."""

Hyper = Mapping[str, Scalar]
"""Hyperparameters that replace an optimizer's own, by name."""

LearningRate = float | Tensor | Callable[[int], float | Tensor]
"""A learning rate, or a schedule: a function of the number of steps taken so far, 0 at the first."""


@dataclass(frozen=True)
class Decay:
    """The weight decay of an update, by where it enters.

    With `coupled` c the update sees the gradient g + c * params: it moves the fixed point. `decoupled` decay
    d scales the parameters by 1 - lr * d outside the adaptive rule. Each is a float, or a tensor that
    broadcasts to the flat vector.
    """

    coupled: Scalar = 0.0
    decoupled: Scalar = 0.0


@dataclass(frozen=True, kw_only=True)
class Optimizer(ABC):
    """An optimizer as an immutable value: `init` makes the state, `update` maps (params, grad) to a step.

    Both are pure and work on flat vectors. Fields are named, defaulted and checked as in `torch.optim`;
    floats may be replaced by tensors that require grad, whose gradient is kept and whose value is never read.
    """

    HYPER: ClassVar[frozenset[str]]
    """Names that `hyper` may replace."""
    is_linear: ClassVar[bool] = False
    """Whether a step is linear in parameters, gradient and state together: its derivative needs none of them."""

    lr: LearningRate = field(kw_only=False)
    maximize: bool = False

    @abstractmethod
    def init(self, params: Tensor) -> State:
        """Return the state before the first step for `params`, shape (n,)."""

    @abstractmethod
    def update(self, params: Tensor, grad: Tensor, state: State, hyper: Hyper | None = None) -> tuple[Tensor, State]:
        """Return the parameters and the state after one step; nothing is changed in place.

        Args:
            params: flat parameters, shape (n,).
            grad: gradient of the loss there, shape (n,); `maximize` is applied here.
            state: from `init` or the previous `update`.
            hyper: values that replace fields, by the names in `HYPER`: floats, or tensors that broadcast
                to (n,).
        """

    @abstractmethod
    def decay(self, hyper: Hyper | None = None) -> Decay:
        """Return the weight decay, with `hyper` in place of the fields it names."""

    def accepts(self) -> frozenset[str]:
        """Return the names that `hyper` may replace in this very optimizer."""
        return self.HYPER


def learning_rate(optimizer: Optimizer, state: State, hyper: Hyper | None) -> Scalar:
    """Return the learning rate of the step that starts at `state`."""
    if hyper is not None and "lr" in hyper:
        return hyper["lr"]
    lr = optimizer.lr
    if isinstance(lr, int | float | Tensor):
        return lr
    return lr(cast(int, state["step"]))


def option(hyper: Hyper | None, name: str, default: Scalar) -> Scalar:
    """Return the value of the option `name`: from `hyper` if it is named there, else the default."""
    return default if hyper is None else hyper.get(name, default)


def slot(state: State, name: str) -> Tensor:
    """Return the state's tensor `name`."""
    return cast(Tensor, state[name])


def ascent_gradient(params: Tensor, grad: Tensor, maximize: bool, weight_decay: Scalar) -> Tensor:
    """Return what the rule steps against: +-grad + weight_decay * params."""
    grad = -grad if maximize else grad
    return grad if is_zero(weight_decay) else add_scaled(grad, params, weight_decay)


def shrink(params: Tensor, lr: Scalar, weight_decay: Scalar) -> Tensor:
    """Return the parameters after decoupled weight decay: (1 - lr * weight_decay) * params."""
    return params if is_zero(weight_decay) else params * (1.0 - lr * weight_decay)


def check_range(
    optimizer: Optimizer,
    name: str,
    value: object,
    *,
    below: float | None = None,
    at_most: float | None = None,
) -> None:
    """Raise a ValueError unless `value` is a tensor (never read) or a number from 0 up to the bound given."""
    if isinstance(value, Tensor):
        return
    upper = "" if below is None else f" and below {below:g}"
    upper += "" if at_most is None else f" and at most {at_most:g}"
    if (
        not isinstance(value, int | float)
        or not value >= 0.0
        or (below is not None and value >= below)
        or (at_most is not None and value > at_most)
    ):
        raise ValueError(
            f"{type(optimizer).__name__}: {name} must be a number of at least 0{upper}, or a tensor, got {value!r}."
        )


def check_learning_rate(optimizer: Optimizer) -> None:
    """Raise a ValueError unless `lr` is a number of at least 0, a tensor or a schedule."""
    if not callable(optimizer.lr):
        check_range(optimizer, "lr", optimizer.lr)


def check_betas(optimizer: Optimizer, betas: tuple[Scalar, Scalar]) -> None:
    """Raise a ValueError unless `betas` are two numbers in [0, 1), or tensors."""
    if len(betas) != 2:
        raise ValueError(f"{type(optimizer).__name__}: betas must be a pair (beta1, beta2), got {betas!r}.")
    check_range(optimizer, "betas[0]", betas[0], below=1.0)
    check_range(optimizer, "betas[1]", betas[1], below=1.0)
