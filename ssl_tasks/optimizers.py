"""Optimizers and schedules of the published settings: LARS, linear warm-up with a cosine to zero."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

OptimizerName = Literal["adam", "sgd", "lars"]


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling: SGD with momentum, each weight tensor's step scaled to its own norm.

    For a tensor w of two or more dimensions with gradient g, d = g + weight_decay w and

        m <- momentum m + trust |w| / |d| d,    w <- w - lr m,

    the factor 1 where either norm is zero. Tensors of fewer dimensions (biases, norm layers) take plain momentum
    steps without decay, as in the published contrastive recipes.

    Args:
        params: parameters or groups of them.
        lr: learning rate, positive.
        momentum: in [0, 1).
        weight_decay: non-negative.
        trust: the trust coefficient.

    Raises:
        ValueError: for an option out of range.

    Reference: You, Gitman and Ginsburg, *Large Batch Training of Convolutional Networks*, 2017, arXiv 1708.03888.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        *,
        momentum: float = 0.9,
        weight_decay: float = 1e-6,
        trust: float = 1e-3,
    ) -> None:
        if lr < 0 or not 0 <= momentum < 1 or weight_decay < 0 or trust <= 0:
            raise ValueError(
                f"LARS wants lr >= 0, momentum in [0, 1), weight_decay >= 0 and trust > 0; got lr={lr}, "
                f"momentum={momentum}, weight_decay={weight_decay}, trust={trust}."
            )
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take one step along the gradients; return the closure's value if there is one."""
        value = None
        if closure is not None:
            with torch.enable_grad():
                value = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                direction = p.grad
                if p.dim() > 1:
                    direction = direction + group["weight_decay"] * p
                    own, length = p.norm(), direction.norm()
                    factor = torch.where((own > 0) & (length > 0), group["trust"] * own / length, 1.0)
                    direction = factor * direction
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].mul_(group["momentum"]).add_(direction)
                p.sub_(group["lr"] * state["momentum"])
        return value


def optimizer_of(
    name: OptimizerName, module: nn.Module, *, lr: float, weight_decay: float = 0.0, momentum: float = 0.9
) -> torch.optim.Optimizer:
    """Return the named optimizer over the module's parameters; Adam has no use for `momentum`."""
    params = list(module.parameters())
    if name == "adam":
        return torch.optim.Adam(params, lr=lr, weight_decay=weight_decay)
    if name == "sgd":
        return torch.optim.SGD(params, lr=lr, momentum=momentum, weight_decay=weight_decay)
    return LARS(params, lr=lr, momentum=momentum, weight_decay=weight_decay)


def cosine(optimizer: torch.optim.Optimizer, steps: int, *, warm_up: int = 0) -> LambdaLR:
    """Return the schedule that rises linearly for `warm_up` steps and falls along a cosine to zero at `steps`.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
        >>> schedule = cosine(optimizer, 4)
        >>> rates = []
        >>> for _ in range(4):
        ...     rates.append(round(schedule.get_last_lr()[0], 4))
        ...     optimizer.step()
        ...     schedule.step()
        >>> rates
        [2.0, 1.7071, 1.0, 0.2929]
    """

    def factor(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        return 0.5 * (1 + math.cos(math.pi * min(step - warm_up, steps - warm_up) / max(steps - warm_up, 1)))

    return LambdaLR(optimizer, factor)
