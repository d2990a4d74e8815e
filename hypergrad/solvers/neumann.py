"""The truncated Neumann series of the inverse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from hypergrad._result import Result
from hypergrad.operators import Operator
from hypergrad.solvers._probes import gaussian
from hypergrad.solvers.base import (
    Solution,
    Solver,
    check_count,
    check_number,
    check_system,
    choose,
    count,
    finish,
    start,
)

_MARGIN = 1.1


@final
@dataclass(frozen=True)
class Neumann(Solver):
    """The first terms of the Neumann series of the inverse.

    With K = num_terms and step size s,

        x_K = s * sum_{k<K} (I - s A)^k b,  with residual  b - A x_K = (I - s A)^K b  exactly,

    which is K steps of gradient descent of length s on the quadratic x.A x / 2 - b.x, from zero (or from x0,
    with b - A x0 for b).

    Cost: K products (the last gives the residual), three vectors; `num_power_steps` more if step_size is
    None, and one for x0.

    Biased: a truncated series shrinks x along eigenvalues below 1 / (s K). It diverges where an eigenvalue a
    has |1 - s a| > 1, so s must be below 2 / lambda_max and A must have no negative eigenvalue; a residual
    larger than the first one is reported as `Result.DIVERGED`. There is no tolerance: a series that does not
    grow is a SUCCESS, how good it is stands in residual_norm.

    Args:
        num_terms: terms of the series, K.
        step_size: s; None takes 1 / (1.1 * the power iteration's estimate of lambda_max).
        num_power_steps: products for that estimate; unused and refused otherwise than at its default if
            step_size is set.
        seed: seed of the power iteration's first vector, likewise.

    Raises:
        ValueError: for an option out of range, or one that a given step_size would leave unused.

    Example:
        >>> import torch
        >>> from hypergrad.operators import Matrix
        >>> Neumann(num_terms=2, step_size=0.5).solve(Matrix(torch.eye(2)), torch.ones(2)).x
        tensor([0.7500, 0.7500])

    Reference: J. Lorraine, P. Vicol, D. Duvenaud, "Optimizing Millions of Hyperparameters by Implicit
    Differentiation", 2020, arXiv 1911.02590.
    """

    num_terms: int = 10
    step_size: float | None = None
    num_power_steps: int = 10
    seed: int = 0

    requires_symmetric: ClassVar[bool] = False
    uses_initial: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Validate the options."""
        check_count("Neumann", "num_terms", self.num_terms)
        check_count("Neumann", "num_power_steps", self.num_power_steps)
        check_count("Neumann", "seed", self.seed, minimum=0)
        if self.step_size is None:
            return
        check_number("Neumann", "step_size", self.step_size, positive=True)
        for option, default in (("num_power_steps", 10), ("seed", 0)):
            value = self.num_power_steps if option == "num_power_steps" else self.seed
            if value != default:
                raise ValueError(
                    f"Neumann uses {option}={value} only to estimate a step size, "
                    f"and step_size={self.step_size} is given. Leave one of them out."
                )

    def solve(self, op: Operator, b: Tensor, *, x0: Tensor | None = None) -> Solution:
        """Return the truncated series for A x = b; see the class."""
        check_system(self, op, b, x0)
        begun = start(op, b, x0, rtol=0.0, atol=0.0)
        num_products = self.num_terms
        if self.step_size is None:
            step_size = 1.0 / (_MARGIN * _largest(op, self.num_power_steps, self.seed))
            num_products += self.num_power_steps
        else:
            step_size = torch.full((), self.step_size, dtype=b.dtype, device=b.device)
        d, r = torch.zeros_like(begun.r), begun.r
        first_norm = torch.linalg.vector_norm(r)
        second = first_norm
        for term in range(self.num_terms):
            d = torch.addcmul(d, r, step_size)
            r = torch.addcmul(r, op.mv(r), step_size, value=-1)
            if term == 0:
                second = torch.linalg.vector_norm(r)
        norm = torch.linalg.vector_norm(r)
        # A series that overflows diverged; one whose very first product is not finite met a NaN.
        grown = choose(second.isfinite(), Result.DIVERGED, Result.NON_FINITE)
        result = choose(norm <= first_norm * (1 + 1e-6), Result.SUCCESS, grown)
        keep = norm.isfinite()
        d, norm = torch.where(keep, d, 0.0), torch.where(keep, norm, first_norm)
        num_steps = torch.where(first_norm > 0, count(self.num_terms, b.device), 0)
        return finish(begun, d, norm, result, num_steps, num_products)


def _largest(op: Operator, num_steps: int, seed: int) -> Tensor:
    """Return an estimate of the largest absolute eigenvalue, by power iteration; 1 for the zero operator."""
    v = gaussian(op.size, seed=seed, stream=0, dtype=op.dtype, device=op.device)
    norm = torch.linalg.vector_norm(v)
    for _ in range(num_steps):
        v = op.mv(v / torch.where(norm > 0, norm, 1.0))
        norm = torch.linalg.vector_norm(v)
    return torch.where(norm > 0, norm, 1.0)
