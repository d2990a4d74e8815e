"""A quadratic lower problem with a spectrum of one's choice, and its hypergradient in closed form."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Params, Task

Batch = tuple[Tensor, Tensor]


def lower_loss(lower: Params, upper: Params, batch: Batch) -> Tensor:
    """Return w.A w / 2 - w.B tanh(u)."""
    matrix, mixing = batch
    w = lower["w"]
    return 0.5 * w @ (matrix @ w) - w @ (mixing @ upper["u"].tanh())


def upper_loss(lower: Params, _upper: Params, batch: Tensor) -> Tensor:
    """Return half the squared distance to a target."""
    return 0.5 * (lower["w"] - batch).square().sum()


def quadratic(name: str, values: Tensor, *, num_upper: int, seed: int, dtype: torch.dtype, notes: str) -> Task:
    """Return the problem at its stationary point w = A^-1 B tanh(u).

    Args:
        name: of the problem.
        values: the eigenvalues of A, float64; none of them 0.
        num_upper: length of u.
        seed: of the basis, B, u and the target.
        dtype: of everything but the solution's making.
        notes: for the reader.
    """
    generator = torch.Generator().manual_seed(seed)
    size = len(values)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    basis = torch.linalg.qr(draw(size, size))[0]
    matrix = (basis * values) @ basis.T
    matrix = (matrix + matrix.T) / 2
    mixing = basis * values.abs().sqrt() @ draw(size, num_upper) / num_upper**0.5
    u, target = draw(num_upper), draw(size)
    w = torch.linalg.solve(matrix, mixing @ u.tanh())
    reference = {"u": (1 - u.tanh() ** 2) * (mixing.T @ torch.linalg.solve(matrix, w - target))}
    return Task(
        name=name,
        kind="implicit",
        lower_loss=lower_loss,
        upper_loss=upper_loss,
        lower={"w": w.to(dtype)},
        upper={"u": u.to(dtype)},
        lower_batches=[(matrix.to(dtype), mixing.to(dtype))],
        upper_batch=target.to(dtype),
        lr=float(1 / values.abs().max()),
        reference=reference,
        notes=notes,
    )
