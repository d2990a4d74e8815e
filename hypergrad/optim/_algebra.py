"""The arithmetic of optimizers: scalars that are floats or tensors, roots with finite derivatives.

A float stays a float, so that a step with plain hyperparameters is the few kernels that `torch.optim`
launches; a tensor stays a tensor, so that its gradient is kept and nothing is read back to the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hypergrad._functional import in_transform

Scalar = float | Tensor
"""A hyperparameter: a float, a tensor without dimensions, or one value per coordinate of the flat vector."""


def is_zero(value: Scalar) -> bool:
    """Return whether `value` is the float zero; a tensor is never read, so it counts as non-zero."""
    return not isinstance(value, Tensor) and value == 0


def add_scaled(x: Tensor, y: Tensor, scale: Scalar) -> Tensor:
    """Return x + scale * y."""
    if isinstance(scale, Tensor):
        return x + scale * y
    return torch.add(x, y, alpha=scale)


def add_ratio(x: Tensor, numerator: Tensor, denominator: Tensor, scale: Scalar) -> Tensor:
    """Return x + scale * numerator / denominator."""
    if isinstance(scale, Tensor):
        return x + scale * (numerator / denominator)
    return torch.addcdiv(x, numerator, denominator, value=scale)


def average(old: Tensor, new: Tensor, beta: Scalar) -> Tensor:
    """Return the running average beta * old + (1 - beta) * new."""
    if isinstance(beta, Tensor):
        return old + (1.0 - beta) * (new - old)
    return torch.lerp(old, new, 1.0 - beta)


def average_square(old: Tensor, new: Tensor, beta: Scalar) -> Tensor:
    """Return the running average beta * old + (1 - beta) * new**2."""
    if isinstance(beta, Tensor):
        return beta * old + (1.0 - beta) * new.square()
    if _is_plain():
        return (old * beta).addcmul_(new, new, value=1.0 - beta)
    return torch.addcmul(old * beta, new, new, value=1.0 - beta)


def power(base: Scalar, exponent: Scalar) -> Scalar:
    """Return base ** exponent; a float when both are."""
    if isinstance(base, Tensor):
        return base**exponent
    if isinstance(exponent, Tensor):
        return torch.pow(base, exponent)
    return float(base**exponent)


def root(x: Tensor) -> Tensor:
    """Return the root of `x`, which is nowhere negative, with the derivative 0, not infinity, where it is 0.

    The guard is applied twice: `where` alone would still multiply the infinite derivative of the branch that
    was not taken by zero.
    """
    if _is_plain():
        return x.sqrt()
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1.0).sqrt(), 0.0)


def root_plus(x: Tensor, eps: Scalar, divisor: Scalar = 1.0) -> Tensor:
    """Return root(x) / divisor + eps, the denominator of adaptive steps."""
    if _is_plain() and not isinstance(divisor, Tensor) and not isinstance(eps, Tensor):
        return x.sqrt().div_(divisor).add_(eps)
    divided = root(x) if isinstance(divisor, float) and divisor == 1.0 else root(x) / divisor
    return divided + eps


def frozen_where_unseen(x: Tensor, second_moment: Tensor, floor: Scalar = 0.0) -> Tensor:
    """Return `x`, constant to differentiation in coordinates whose second moment is at its `floor`.

    Such a coordinate has met only gradients that are exactly zero: an unused weight or a constant input. The
    slope 1 / eps that x / (0 + eps) has there would multiply whatever arrives by 1e8.
    """
    return x if _is_plain() else torch.where(second_moment > floor, x, x.detach())


def _is_plain() -> bool:
    """Return whether nothing is differentiated here: guards are idle, and new tensors may be overwritten."""
    return not torch.is_grad_enabled() and not in_transform()
