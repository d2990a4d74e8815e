"""The direct solver: form the matrix, factor it. The reference that other solvers are tested against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from hypergrad._result import Result
from hypergrad.operators import Operator, dense
from hypergrad.solvers.base import Solution, Solver, check_system, choose, finish, start


@final
@dataclass(frozen=True)
class Exact(Solver):
    """The solution by LU factorization of the materialised matrix: x = A^{-1} b for any invertible A.

    Cost: n products, n^2 memory and n^3 work: for small problems and for checking other solvers. The residual
    is computed from the matrix, and num_steps is 0.

    `Result.SINGULAR` is reported where a pivot is zero (x is then the start, zero) or norm(A) norm(x) /
    norm(b) exceeds 0.1 / eps: b then meets directions of A that rounding alone decides.

    Example:
        >>> import torch
        >>> from hypergrad.operators import Matrix
        >>> Exact().solve(Matrix(torch.tensor([[0.0, 2.0], [1.0, 0.0]])), torch.tensor([2.0, 3.0])).x
        tensor([3., 1.])

    Reference: G. H. Golub, C. F. Van Loan, "Matrix Computations", 4th edition, 2013, section 3.4.
    """

    requires_symmetric: ClassVar[bool] = False
    uses_initial: ClassVar[bool] = False

    def solve(self, op: Operator, b: Tensor, *, x0: Tensor | None = None) -> Solution:
        """Return the solution of A x = b; see the class."""
        check_system(self, op, b, x0)
        begun = start(op, b, None, rtol=0.0, atol=0.0)
        matrix = dense(op)
        norm = torch.linalg.vector_norm(matrix)
        whole = norm < float("inf")
        d, info = torch.linalg.solve_ex(
            torch.where(whole, matrix, torch.eye(op.size, dtype=b.dtype, device=b.device)), begun.r
        )
        limit = 0.1 / torch.finfo(b.dtype).eps
        near = norm * torch.linalg.vector_norm(d) > limit * torch.linalg.vector_norm(begun.r)
        solved = choose(near | (info != 0), Result.SINGULAR, Result.SUCCESS)
        d = torch.where(whole & (info == 0), d, 0.0)
        residual_norm = torch.linalg.vector_norm(begun.r - torch.where(whole, matrix, 0.0) @ d)
        result = choose(whole, solved, Result.NON_FINITE)
        return finish(begun, d, residual_norm, result, 0, op.size)
