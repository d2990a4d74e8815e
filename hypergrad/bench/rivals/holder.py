"""Parameters by name as the `nn.Module` that several libraries want, and a loss as what they make of one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..problems.base import Params, Task


def by_name(names: Iterable[str], tensors: Iterable[Tensor]) -> Params:
    """Return the tensors under these names."""
    return dict(zip(names, tensors, strict=True))


class Holder(nn.Module):
    """A module whose parameters are copies of `params`, and whose call hands them by name to a function."""

    def __init__(self, params: Params) -> None:
        super().__init__()
        self._attributes = {name: f"p{i}" for i, name in enumerate(params)}
        for name, attribute in self._attributes.items():
            self.register_parameter(attribute, nn.Parameter(params[name].detach().clone()))

    def named(self) -> Params:
        """Return the parameters under their names in `params`."""
        return {name: getattr(self, attribute) for name, attribute in self._attributes.items()}

    def forward(self, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
        """Return function(parameters by name, *arguments)."""
        return function(self.named(), *arguments)


def solved_loss(task: Task) -> Callable[[Params, Params, Any], Tensor]:
    """Return the loss that `task.lower` minimizes: the lower loss, and what the optimizer's weight decay adds to it."""
    if not task.weight_decay:
        return task.lower_loss

    def loss(lower: Params, upper: Params, batch: Any) -> Tensor:
        norm = torch.stack([w.square().sum() for w in lower.values()]).sum()
        return task.lower_loss(lower, upper, batch) + 0.5 * task.weight_decay * norm

    return loss
