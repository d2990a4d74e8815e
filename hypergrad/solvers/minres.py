"""MINRES: the smallest residual over the Krylov space of a symmetric operator, definite or not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from hypergrad._result import Result
from hypergrad.operators import Operator
from hypergrad.solvers.base import (
    CheckEvery,
    Solution,
    Solver,
    check_check_every,
    check_count,
    check_interval,
    check_number,
    check_system,
    choose,
    finish,
    pick,
    start,
)


@final
@dataclass(frozen=True)
class MINRES(Solver):
    """Minimal residuals for a symmetric operator, which may be indefinite.

    Lanczos vectors v_k and the tridiagonal T of A in their basis,

        A v_k = beta_{k+1} v_{k+1} + alpha_k v_k + beta_k v_{k-1},

    are reduced by one plane rotation a step, T = Q R, with directions W = V R^{-1}, so that x_k minimises
    norm(b - A x) over the Krylov space; stopped when norm(r_k) <= max(rtol * norm(b), atol). The residual
    norm is the recurrence's, |s_1 ... s_k| norm(r_0) with s_i the rotations' sines; it can fall below the
    true one once the v_k lose orthogonality.

    Cost: one product a step, about 30 small kernels, six vectors of memory; one more product for a start x0.

    Wrong for operators that are not symmetric (GMRES). For a singular system without a solution it ends at a
    least squares solution with `Result.SINGULAR` or MAX_STEPS. The attainable error grows with the square of
    the condition number, where that of CG and GMRES grows with the condition number itself.

    Args:
        max_steps: the most iterations.
        rtol: tolerance relative to norm(b).
        atol: absolute tolerance.
        check_every: how often to ask whether to stop early; see `CG`.

    Raises:
        ValueError: for an option out of range.

    Example:
        >>> import torch
        >>> from hypergrad.operators import Matrix
        >>> A = Matrix(torch.tensor([[1.0, 0.0], [0.0, -2.0]], dtype=torch.float64), symmetric=True)
        >>> MINRES(max_steps=2).solve(A, torch.tensor([1.0, 2.0], dtype=torch.float64)).x.round(decimals=9)
        tensor([ 1., -1.], dtype=torch.float64)

    Reference: C. C. Paige, M. A. Saunders, "Solution of Sparse Indefinite Systems of Linear Equations", 1975.
    """

    max_steps: int = 10
    rtol: float = 1e-5
    atol: float = 0.0
    check_every: CheckEvery = "auto"

    requires_symmetric: ClassVar[bool] = True
    uses_initial: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Validate the options."""
        check_count("MINRES", "max_steps", self.max_steps)
        check_number("MINRES", "rtol", self.rtol)
        check_number("MINRES", "atol", self.atol)
        check_check_every("MINRES", self.check_every)

    def solve(self, op: Operator, b: Tensor, *, x0: Tensor | None = None) -> Solution:
        """Return the solution of A x = b; see the class."""
        check_system(self, op, b, x0)
        interval = check_interval(self.check_every, b, "MINRES")
        begun = start(op, b, x0, rtol=self.rtol, atol=self.atol, reads=interval == 1)
        eps = torch.finfo(b.dtype).eps
        zero = torch.zeros((), dtype=b.dtype, device=b.device)
        residual = torch.linalg.vector_norm(begun.r)  # signed as in the recurrence; its size is norm(r_k)
        active = residual > begun.tol
        broken = torch.zeros_like(active)
        d = torch.zeros_like(begun.r)
        v_old, v = d, begun.r / torch.where(residual > 0, residual, 1.0)
        w_old, w = d, d
        beta, size, delta_bar, epsilon, cosine, sine = zero, zero, zero, zero, zero - 1, zero
        moves: list[Tensor] = []
        num_products = 0
        for step in range(self.max_steps):
            if interval and step % interval == 0 and not active.item():
                break
            u = torch.addcmul(op.mv(v), v_old, beta, value=-1)
            num_products += 1
            alpha = torch.dot(v, u)
            u = torch.addcmul(u, v, alpha, value=-1)
            beta_new = torch.linalg.vector_norm(u)
            size = torch.maximum(size, torch.hypot(torch.hypot(alpha, beta), beta_new))  # a bound on norm(A) from below
            # The last rotation meets the new column of T, the next one clears beta_new.
            epsilon_old = epsilon
            delta = cosine * delta_bar + sine * alpha
            gamma_bar = sine * delta_bar - cosine * alpha
            epsilon, delta_bar = sine * beta_new, -cosine * beta_new
            gamma = torch.hypot(gamma_bar, beta_new)
            moved = active & (gamma > 10 * eps * size) & (gamma < float("inf"))
            broken = broken | (active & torch.logical_not(gamma < float("inf")))
            moves.append(moved)
            safe = torch.where(moved, gamma, 1.0)
            cosine, sine = gamma_bar / safe, beta_new / safe
            direction = (v - epsilon_old * w_old - delta * w) / safe
            w_old, w = w, pick(moved, direction, 0.0, reads=begun.reads)
            d = torch.addcmul(d, w, torch.where(moved, cosine * residual, zero))
            residual = torch.where(moved, sine * residual, residual)
            active = moved & (residual > begun.tol)
            v_old, v = v, pick(active, u / torch.where(active, beta_new, 1.0), 0.0, reads=begun.reads)
            beta = beta_new

        stopped = choose(active, Result.MAX_STEPS, choose(broken, Result.NON_FINITE, Result.SINGULAR))
        result = choose(residual <= begun.tol, Result.SUCCESS, stopped)
        num_steps = torch.stack(moves).sum() if moves else 0
        return finish(begun, d, residual, result, num_steps, num_products)
