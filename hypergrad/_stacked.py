"""Several independent copies of a function, laid side by side along a leading dimension of their tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hypergrad._flat import Params
from hypergrad._functional import Loss


def leading(part: Any) -> Any:
    """Return the `in_dims` of `torch.vmap` for an argument whose tensors all lead with the copies."""
    return pytree.tree_map(lambda x: 0 if isinstance(x, Tensor) else None, part)


def summed(loss: Loss) -> Loss:
    """Return the sum of `loss` over copies: lower parameters and batch lead with them, upper ones are shared.

    Its gradient in the stacked lower parameters holds the gradient of each copy in its own.
    """

    def total(lower: Params, upper: Params, batch: Any) -> Tensor:
        of_each = torch.vmap(loss, in_dims=(0, None, leading(batch)), randomness="different")
        value: Tensor = of_each(lower, upper, batch).sum()
        return value

    return total
