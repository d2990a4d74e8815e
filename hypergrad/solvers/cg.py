"""Conjugate gradients, masked: a fixed number of iterations that stop changing anything once converged."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from hypergrad._result import Result
from hypergrad.operators import Operator
from hypergrad.solvers.base import (
    Apply,
    CheckEvery,
    Preconditioner,
    Solution,
    Solver,
    Start,
    check_check_every,
    check_count,
    check_interval,
    check_number,
    check_system,
    choose,
    finish,
    room,
    start,
)


@final
@dataclass(frozen=True)
class CG(Solver):
    """Conjugate gradients for a symmetric positive definite operator.

    With residual r_k = b - A x_k, direction p_k and preconditioner M (M = I without one):

        a_k = r_k.M r_k / p_k.A p_k,  x_{k+1} = x_k + a_k p_k,  r_{k+1} = r_k - a_k A p_k,
        p_{k+1} = M r_{k+1} + (r_{k+1}.M r_{k+1} / r_k.M r_k) p_k,

    until norm(r_k) <= max(rtol * norm(b), atol), always the residual itself, preconditioned or not. The
    residual is the recurrence's, which in rounding arithmetic can fall below the true one.

    Cost: one product a step, 15 small kernels (6 of them over full vectors, and no others where values may be read),
    four vectors of memory; one more product for a start x0. The error in the norm of A falls at least like
    ((sqrt(c) - 1) / (sqrt(c) + 1))^k, c the condition number of A (of M A).

    Wrong when A is not positive definite: at p.A p <= 0 the last iterate before is returned with
    `Result.NEGATIVE_CURVATURE`. Stopped at `max_steps`, x is biased towards zero along small eigenvalues.

    Args:
        max_steps: the most iterations.
        rtol: tolerance relative to norm(b).
        atol: absolute tolerance.
        preconditioner: a positive definite approximation of the inverse of A, see
            `hypergrad.solvers.preconditioners`.
        check_every: how often to ask whether to stop early. "auto": every step on CPU in eager mode, where
            asking is free, and never on an accelerator or inside transforms and compiled code; None: never;
            n: every n steps.

    Raises:
        ValueError: for an option out of range.

    Example:
        >>> import torch
        >>> from hypergrad.operators import Matrix
        >>> A = Matrix(torch.tensor([[4.0, 1.0], [1.0, 3.0]], dtype=torch.float64), symmetric=True)
        >>> solution = CG(max_steps=2).solve(A, torch.tensor([1.0, 2.0], dtype=torch.float64))
        >>> solution.x
        tensor([0.0909, 0.6364], dtype=torch.float64)

    Reference: M. R. Hestenes, E. Stiefel, "Methods of Conjugate Gradients for Solving Linear Systems", 1952.
    """

    max_steps: int = 10
    rtol: float = 1e-5
    atol: float = 0.0
    preconditioner: Preconditioner | None = None
    check_every: CheckEvery = "auto"

    requires_symmetric: ClassVar[bool] = True
    uses_initial: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Validate the options."""
        check_count("CG", "max_steps", self.max_steps)
        check_number("CG", "rtol", self.rtol)
        check_number("CG", "atol", self.atol)
        check_check_every("CG", self.check_every)
        if self.preconditioner is not None and not isinstance(self.preconditioner, Preconditioner):
            raise ValueError(
                "CG expects preconditioner to be a Preconditioner or None, "
                f"got preconditioner={self.preconditioner!r}. "
                "See hypergrad.solvers.preconditioners, for example HutchinsonDiagonal()."
            )

    def solve(self, op: Operator, b: Tensor, *, x0: Tensor | None = None) -> Solution:
        """Return the solution of A x = b; see the class."""
        check_system(self, op, b, x0)
        interval = check_interval(self.check_every, b, "CG")
        begun = start(op, b, x0, rtol=self.rtol, atol=self.atol, reads=interval == 1)
        apply, num_products = None, 0
        if self.preconditioner is not None:
            apply, num_products = self.preconditioner.build(op)

        if begun.reads and not torch.is_grad_enabled():
            return self._solve_reading(op, begun, apply, num_products)
        d, r, tol_squared = torch.zeros_like(begun.r), begun.r, begun.tol * begun.tol
        zero = torch.zeros((), dtype=b.dtype, device=b.device)
        rr = torch.dot(r, r)
        p = (r if apply is None else apply(r)).clone()  # r goes on in its own memory
        rho = rr if apply is None else torch.dot(r, p)
        live = torch.where(rr > tol_squared, rho, zero)  # r.M r while the solve goes on, else 0
        curvature, moves = rr, []
        for step in range(self.max_steps):
            if interval and step % interval == 0 and not live.item():
                break
            Ap = op.mv(p)
            num_products += 1
            curvature = torch.dot(p, Ap)
            # One factor masks everything: it is 0 after convergence, at curvature <= 0 and when a value is
            # not finite.
            alpha = torch.nan_to_num(live / curvature, nan=0.0, posinf=0.0, neginf=0.0).clamp(min=0.0)
            moved = alpha > 0
            moves.append(moved)
            d = torch.addcmul(d, p, alpha, out=room(d))
            r = torch.addcmul(r, Ap, alpha, value=-1, out=room(r))  # NaN after such a product; no one reads it
            rr_new = torch.dot(r, r)
            z = r if apply is None else apply(r)
            rho = rr_new if apply is None else torch.dot(r, z)
            p = torch.where(moved, torch.addcmul(z, p, rho / live), p)
            rr = torch.where(moved, rr_new, rr)
            live = torch.where(moved & (rr > tol_squared), rho, zero)

        # After a breakdown p stays as it was, so the last curvature is the one that broke the recurrence.
        broken = choose(curvature.abs() + rr < float("inf"), Result.NEGATIVE_CURVATURE, Result.NON_FINITE)
        stopped = choose(live != 0, Result.MAX_STEPS, broken)
        result = choose(rr <= tol_squared, Result.SUCCESS, stopped)
        num_steps = torch.stack(moves).sum() if moves else 0
        return finish(begun, d, rr.sqrt(), result, num_steps, num_products)

    def _solve_reading(self, op: Operator, begun: Start, apply: Apply | None, num_products: int) -> Solution:
        """Return the same where every scalar may be read: in place, and with nothing to mask."""
        d, r, tol = torch.zeros_like(begun.r), begun.r, float(begun.tol)
        p = (r if apply is None else apply(r)).clone()
        rr = torch.dot(r, r).item()
        rho = rr if apply is None else torch.dot(r, p).item()
        result, num_steps = Result.MAX_STEPS, 0
        while rr > tol * tol and num_steps < self.max_steps:
            Ap = op.mv(p)
            num_products += 1
            curvature = torch.dot(p, Ap).item()
            alpha = rho / curvature if curvature > 0 else 0.0
            if not 0 < alpha < math.inf:
                result = Result.NEGATIVE_CURVATURE if math.isfinite(curvature + rr) else Result.NON_FINITE
                break
            d.add_(p, alpha=alpha)
            r.add_(Ap, alpha=-alpha)
            rr = torch.dot(r, r).item()
            z = r if apply is None else apply(r)
            before, rho = rho, rr if apply is None else torch.dot(r, z).item()
            torch.add(z, p, alpha=rho / before, out=p)
            num_steps += 1
        if rr <= tol * tol:
            result = Result.SUCCESS
        elif math.isnan(rr):
            result = Result.NON_FINITE
        return finish(begun, d, math.sqrt(rr), result, num_steps, num_products)
