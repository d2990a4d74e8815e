"""From an optimizer and named parameters to a `Bound`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hypergrad._flat import Layout
from hypergrad.optim.base import Optimizer
from hypergrad.optim.bound import Bound
from hypergrad.optim.torch_bridge import FromTorch, from_torch


def bind(optimizer: Optimizer | FromTorch | Bound | torch.optim.Optimizer, params: Mapping[str, Tensor]) -> Bound:
    """Return `optimizer` bound to the layout of `params`: the form that runs use.

    Args:
        optimizer: one of `hypergrad.optim`, or a `torch.optim` optimizer, as it is or from `from_torch`; one
            that is bound already is returned.
        params: the parameters by name; only names, shapes, dtypes and identities matter.

    Raises:
        ValueError: the optimizer is something else, cannot be differentiated, or holds other parameters.

    Example:
        >>> import torch
        >>> from hypergrad.optim import SGD
        >>> bound = bind(SGD(lr=0.1), {"w": torch.zeros(2), "b": torch.zeros(())})
        >>> bound.update(torch.zeros(3), torch.ones(3), bound.init(torch.zeros(3)))
        (tensor([-0.1000, -0.1000, -0.1000]), ({'step': 1},))
    """
    if isinstance(optimizer, Bound):
        return optimizer
    if isinstance(optimizer, Optimizer):
        layout = Layout.of(params)
        return Bound(((optimizer, layout.names),), layout)
    if isinstance(optimizer, torch.optim.Optimizer):
        optimizer = from_torch(optimizer)
    if not isinstance(optimizer, FromTorch):
        raise ValueError(
            f"optimizer must be one of hypergrad.optim or torch.optim, got {type(optimizer).__name__}. "
            "Example: hypergrad.optim.SGD(lr=0.1)."
        )
    return optimizer.bind(params)
