"""A quadratic with condition number 1e6: methods that stop early, or sum a series, are far off."""

from __future__ import annotations

import torch

from ._quadratic import quadratic
from .base import Task


def build(*, size: str = "full", seed: int = 0, dtype: torch.dtype = torch.float64) -> Task:
    """Return a quadratic whose eigenvalues are log-spaced from 1e-6 to 1.

    Args:
        size: "full" 1,000 lower variables, "quick" 200.
        seed: of everything random.
        dtype: of everything but the solution's making.
    """
    values = torch.logspace(-6, 0, 1000 if size == "full" else 200, dtype=torch.float64)
    notes = "Condition number 1e6. In float32 even an exact solve keeps an error of about 1e-2: 1e6 times rounding."
    return quadratic("ill_conditioned", values, num_upper=50, seed=seed, dtype=dtype, notes=notes)
