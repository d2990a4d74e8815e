"""A small problem of the user's own, and contenders that answer as the tests need them to."""

from __future__ import annotations

import torch

from hypergrad.bench.problems.base import Task


def lower_loss(lower, upper, batch):
    return 0.5 * lower["w"] @ (batch @ lower["w"]) - lower["w"] @ upper["u"]


def upper_loss(lower, upper, batch):
    return 0.5 * (lower["w"] - batch).square().sum() + 0.1 * upper["u"].square().sum()


def problem(*, size="quick", seed=0, dtype=torch.float32) -> Task:
    """Return a quadratic: w* = A^-1 u."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))[0]
    matrix = (basis * torch.linspace(0.5, 2, 6).double()) @ basis.T
    u, target = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    return Task(
        name="own",
        kind="implicit",
        lower_loss=lower_loss,
        upper_loss=upper_loss,
        lower={"w": torch.linalg.solve(matrix, u).to(dtype)},
        upper={"u": u.to(dtype)},
        lower_batches=[matrix.to(dtype)],
        upper_batch=target.to(dtype),
        lr=0.5,
    )


def broken(**_):
    raise RuntimeError("no data here")


def not_a_task(**_):
    return 3
