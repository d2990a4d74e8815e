"""The largest curvature of a solved lower level: what a user of a Neumann series tunes the step size by."""

from __future__ import annotations

import torch

from ..problems.base import Task
from .holder import solved_loss


def largest(task: Task, *, steps: int = 30) -> float:
    """Return an estimate of the Hessian's largest eigenvalue in modulus, by the power method; never an upper bound."""
    lower = {name: w.detach().clone().requires_grad_() for name, w in task.lower.items()}
    w = list(lower.values())
    loss = solved_loss(task)(lower, task.upper, task.lower_batches[0])
    slope = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, w, create_graph=True)])
    v = torch.randn(slope.shape, generator=torch.Generator().manual_seed(0), dtype=slope.dtype)
    size = 0.0
    for _ in range(steps):
        v = v / v.norm()
        v = torch.cat([g.reshape(-1) for g in torch.autograd.grad(slope, w, v, retain_graph=True)])
        size = float(v.norm())
    return size


def step_size(task: Task) -> float:
    """Return 0.95 over the largest curvature, to two digits: the longest step that is safe if the estimate is close."""
    return float(f"{0.95 / largest(task):.2g}")
