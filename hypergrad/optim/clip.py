"""Gradient clipping on a flat vector, differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

from hypergrad.optim._algebra import Scalar, root


def clip_norm(grad: Tensor, max_norm: Scalar) -> Tensor:
    """Return `grad` scaled down to a norm of at most `max_norm`.

        grad * min(1, max_norm / (|grad| + 1e-6))

    with |.| the Euclidean norm: what `torch.nn.utils.clip_grad_norm_` leaves in the gradients. Cost: one
    reduction and one pass. At a zero gradient the derivative of the norm is taken as 0.

    Args:
        grad: flat gradient, shape (n,).
        max_norm: the largest norm, a number or a 0-dimensional tensor.

    Raises:
        ValueError: a negative `max_norm`.

    Example:
        >>> import torch
        >>> clip_norm(torch.tensor([3.0, 4.0]), 1.0)
        tensor([0.6000, 0.8000])

    Reference: Razvan Pascanu, Tomas Mikolov, Yoshua Bengio, "On the difficulty of training recurrent neural
    networks", 2012, arXiv:1211.5063.
    """
    _check("clip_norm", "max_norm", max_norm)
    return grad * torch.clamp(max_norm / (root(grad.square().sum()) + 1e-6), max=1.0)


def clip_value(grad: Tensor, value: Scalar) -> Tensor:
    """Return `grad` with every entry brought into [-value, value].

    What `torch.nn.utils.clip_grad_value_` leaves in the gradients. Cost: one pass. The derivative is 0 in
    entries that are cut.

    Args:
        grad: flat gradient, shape (n,).
        value: the largest magnitude, a number or a tensor that broadcasts to (n,).

    Raises:
        ValueError: a negative `value`.

    Example:
        >>> import torch
        >>> clip_value(torch.tensor([3.0, -0.5]), 1.0)
        tensor([ 1.0000, -0.5000])
    """
    _check("clip_value", "value", value)
    if isinstance(value, Tensor):
        return torch.minimum(torch.maximum(grad, -value), value)
    return grad.clamp(-value, value)


def _check(function: str, name: str, value: Scalar) -> None:
    if not isinstance(value, Tensor) and not value >= 0.0:
        raise ValueError(f"{function}: {name} must be at least 0, got {value!r}.")
