"""Solving with a randomized low-rank approximation of a positive semidefinite operator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from hypergrad._result import Result
from hypergrad.operators import Operator
from hypergrad.solvers._sketch import approximate, inverse, shifted_inverse
from hypergrad.solvers.base import (
    Solution,
    Solver,
    check_count,
    check_number,
    check_system,
    choose,
    finish,
    start,
)


@final
@dataclass(frozen=True)
class Nystrom(Solver):
    """The solution with a Nystrom approximation of a positive semidefinite operator in its place.

        x = (A_nys + rho I)^{-1} b = Q (core + rho I)^{-1} Q^T b + (b - Q Q^T b) / rho,

    where A_nys = Q core Q^T (Q: n x r, orthonormal columns) is the randomized Nystrom approximation from
    `rank` random vectors and rho = damping. This is Woodbury's formula written without a difference of large
    numbers.

    Cost: min(rank, n) products and one for the residual; memory for a few n x rank matrices and n rank^2
    work. The products are independent of b and of each other.

    Biased by rho, and by the eigenvalues beyond the rank, which count as 0 (as rho, with it): exact for rank
    = n and rho -> 0, good where A is of low rank plus rho I. There is no tolerance: SUCCESS means computed;
    residual_norm, norm(b - A x) without rho, says how well. An operator with negative eigenvalues in sight of
    the sketch ends in `Result.NEGATIVE_CURVATURE`.

    Args:
        rank: number of random vectors.
        damping: rho. If A itself ends in a flat spectrum at a known level, as a damped Hessian does, that
            level is a good value.
        seed: seed of the random vectors; no generator's state is used.

    Raises:
        ValueError: for an option out of range.

    Example:
        >>> import torch
        >>> from hypergrad.operators import Matrix
        >>> A = Matrix(torch.diag(torch.tensor([2.0, 4.0], dtype=torch.float64)), symmetric=True)
        >>> Nystrom(rank=2, damping=1e-12).solve(A, torch.ones(2, dtype=torch.float64)).x
        tensor([0.5000, 0.2500], dtype=torch.float64)

    Reference: R. Hataya, M. Yamada, "Nystrom Method for Accurate and Scalable Implicit Differentiation",
        2023,
    arXiv 2302.09726; Z. Frangella, J. A. Tropp, M. Udell, "Randomized Nystrom Preconditioning", 2021,
    arXiv 2110.02820.
    """

    rank: int = 10
    damping: float = 0.01
    seed: int = 0

    requires_symmetric: ClassVar[bool] = True
    uses_initial: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Validate the options."""
        check_count("Nystrom", "rank", self.rank)
        check_number("Nystrom", "damping", self.damping, positive=True)
        check_count("Nystrom", "seed", self.seed, minimum=0)

    def solve(self, op: Operator, b: Tensor, *, x0: Tensor | None = None) -> Solution:
        """Return the solution of (A_nys + rho I) x = b; see the class."""
        check_system(self, op, b, x0)
        begun = start(op, b, None, rtol=0.0, atol=0.0)
        low_rank = approximate(op, self.rank, self.seed)
        shift = torch.full((), self.damping, dtype=b.dtype, device=b.device)
        factor, exists = shifted_inverse(low_rank, shift)
        apply, usable = inverse(low_rank, factor, exists, shift)
        d = torch.where(usable, apply(begun.r), 0.0)
        residual_norm = torch.linalg.vector_norm(begun.r - op.mv(d))
        failed = choose(residual_norm.isfinite(), Result.NEGATIVE_CURVATURE, Result.NON_FINITE)
        result = choose(usable, Result.SUCCESS, failed)
        return finish(begun, d, residual_norm, result, 0, low_rank.num_products + 1)
