"""Small problems with closed forms, and helpers, for the engine's tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import hypergrad as hg

EXACT = hg.Implicit(hg.CG(20, rtol=1e-13))


class Vec(nn.Module):
    """A module that holds one vector."""

    def __init__(self, n: int, seed: int = 0) -> None:
        super().__init__()
        self.v = nn.Parameter(0.3 * draw(n, seed=seed))


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spd(n: int, seed: int) -> Tensor:
    q = draw(n, n, seed=seed)
    return 0.2 * q @ q.T / n + torch.eye(n, dtype=torch.float64)


def problem(name: str, module: nn.Module, loss: Any, *, lr: float = 0.8, **options: Any) -> hg.Problem:
    """Return a full-batch problem under SGD."""
    options.setdefault("optimizer", torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=lr))
    options.setdefault("data", [None])
    return hg.Problem(name, module=module, loss=loss, **options)


def engine(*problems: Any, **options: Any) -> hg.Engine:
    options.setdefault("product_check", False)
    return hg.Engine(list(problems), **options)


def error(actual: Tensor | None, expected: Tensor) -> float:
    assert actual is not None
    return float((actual - expected).norm() / expected.norm())


def finite_difference(function: Callable[[Tensor], Tensor], at: Tensor, epsilon: float = 1e-6) -> Tensor:
    """Return the gradient of `function` by central differences."""
    grad = torch.zeros_like(at)
    for k in range(at.numel()):
        step = torch.zeros_like(at).view(-1)
        step[k] = epsilon
        step = step.view_as(at)
        grad.view(-1)[k] = (function(at + step) - function(at - step)) / (2 * epsilon)
    return grad
