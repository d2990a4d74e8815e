"""A stationary point that is no minimum: a tenth of the Hessian's eigenvalues are negative."""

from __future__ import annotations

import torch

from ._quadratic import quadratic
from .base import Task


def build(*, size: str = "full", seed: int = 0, dtype: torch.dtype = torch.float64) -> Task:
    """Return a quadratic with eigenvalues of size 0.05 to 1, one in ten of them negative.

    Args:
        size: "full" 1,000 lower variables, "quick" 200.
        seed: of everything random.
        dtype: of everything but the solution's making.
    """
    count = 1000 if size == "full" else 200
    values = torch.logspace(0, -1.3, count, dtype=torch.float64)
    values[::10] *= -1
    notes = (
        "One eigenvalue in ten is negative: the stationary point responds to the upper variables, but no descent "
        "reaches it. Conjugate gradients break down, series diverge; MINRES, GMRES and dense solves do not care."
    )
    return quadratic("indefinite", values, num_upper=50, seed=seed, dtype=dtype, notes=notes)
