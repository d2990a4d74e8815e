"""GMRES: the smallest residual over the Krylov space of any operator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, final

import torch
from torch import Tensor
from torch.nn.functional import pad

from hypergrad._result import Result
from hypergrad.operators import Operator
from hypergrad.solvers.base import (
    CheckEvery,
    Scalar,
    Solution,
    Solver,
    check_check_every,
    check_count,
    check_interval,
    check_number,
    check_system,
    choose,
    finish,
    start,
)


class _Cycle(NamedTuple):
    """What the steps between two restarts yield."""

    d: Tensor  # the correction
    residual_norm: Tensor  # of the system after it
    active: Tensor  # whether there is more to do
    broken: Tensor  # whether a value was not finite
    moves: list[Tensor]  # for each step, whether it counted
    num_products: int


@final
@dataclass(frozen=True)
class GMRES(Solver):
    """Generalized minimal residuals, for any invertible operator, symmetric or not.

    Arnoldi vectors V = (v_1 ... v_{k+1}), orthonormal, with A V_k = V_{k+1} H; x_k = x_0 + V_k y minimises

        norm(b - A x_k) = norm(norm(r_0) e_1 - H y)

    over the Krylov space, by plane rotations H = Q^T R; stopped when norm(r_k) <= max(rtol * norm(b), atol).
    Every vector is orthogonalised twice against all before it, which keeps V orthonormal to rounding. The
    residual norm is the recurrence's within a cycle; every restart computes the residual anew.

    Cost: one product a step, one per restart, one for a start x0; memory for `restart + 1` vectors, and step
    k of a cycle reads k of them four times. Without restarts it ends after n steps.

    Wrong or slow: with restarts it may stagnate; a singular system ends with `Result.SINGULAR`.

    Args:
        max_steps: the most iterations, over all cycles.
        restart: the most iterations of a cycle; None: as many as max_steps, and never more than n.
        rtol: tolerance relative to norm(b).
        atol: absolute tolerance.
        check_every: how often to ask whether to stop early; see `CG`.

    Raises:
        ValueError: for an option out of range, or `restart` larger than max_steps, which it could not reach.

    Example:
        >>> import torch
        >>> from hypergrad.operators import Matrix
        >>> A = Matrix(torch.tensor([[0.0, 1.0], [-2.0, 0.0]], dtype=torch.float64))
        >>> GMRES(max_steps=2).solve(A, torch.tensor([3.0, 4.0], dtype=torch.float64)).x.round(decimals=9)
        tensor([-2.,  3.], dtype=torch.float64)

    Reference: Y. Saad, M. H. Schultz, "GMRES: A Generalized Minimal Residual Algorithm for Solving
        Nonsymmetric Linear
    Systems", 1986; on orthogonalising twice: L. Giraud, J. Langou, M. Rozloznik, "The loss of orthogonality
    in the Gram-Schmidt orthogonalization process", 2005.
    """

    max_steps: int = 10
    restart: int | None = None
    rtol: float = 1e-5
    atol: float = 0.0
    check_every: CheckEvery = "auto"

    requires_symmetric: ClassVar[bool] = False
    uses_initial: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Validate the options."""
        check_count("GMRES", "max_steps", self.max_steps)
        check_number("GMRES", "rtol", self.rtol)
        check_number("GMRES", "atol", self.atol)
        check_check_every("GMRES", self.check_every)
        if self.restart is not None:
            check_count("GMRES", "restart", self.restart)
            if self.restart > self.max_steps:
                raise ValueError(
                    f"GMRES expects restart <= max_steps, got restart={self.restart}, "
                    f"max_steps={self.max_steps}. "
                    "Use restart=None for no restart."
                )

    def solve(self, op: Operator, b: Tensor, *, x0: Tensor | None = None) -> Solution:
        """Return the solution of A x = b; see the class."""
        check_system(self, op, b, x0)
        interval = check_interval(self.check_every, b, "GMRES")
        begun = start(op, b, x0, rtol=self.rtol, atol=self.atol, reads=interval == 1)
        length = max(1, min(self.restart or self.max_steps, op.size))
        r = begun.r
        d = torch.zeros_like(r)
        norm = torch.linalg.vector_norm(r)
        active = norm > begun.tol
        broken = torch.zeros_like(active)
        moves: list[Tensor] = []
        num_products, step = 0, 0
        while step < self.max_steps:
            if step > 0:
                if interval and not active.item():
                    break
                r = torch.where(active, begun.r - op.mv(d), r)
                num_products += 1
                broken = broken | (active & torch.logical_not(r.isfinite().all()))
                norm = torch.where(active, torch.linalg.vector_norm(r), norm)
                active = active & (norm > begun.tol)
                r = torch.where(active, r, 0.0)
            steps = min(length, self.max_steps - step)
            cycle = _cycle(op, r, norm, active, begun.tol, steps, interval)
            d = d + cycle.d
            norm, active, broken = cycle.residual_norm, cycle.active, broken | cycle.broken
            moves += cycle.moves
            num_products += cycle.num_products
            step += steps
        stopped = choose(active, Result.MAX_STEPS, choose(broken, Result.NON_FINITE, Result.SINGULAR))
        result = choose(norm <= begun.tol, Result.SUCCESS, stopped)
        num_steps = torch.stack(moves).sum() if moves else 0
        return finish(begun, d, norm, result, num_steps, num_products)


def _cycle(op: Operator, r: Tensor, norm: Tensor, active: Tensor, tol: Scalar, num_steps: int, interval: int) -> _Cycle:
    """Return the correction that minimises norm(r - A d) over the Krylov space of r, while `active`."""
    eps = torch.finfo(r.dtype).eps
    zero = torch.zeros((), dtype=r.dtype, device=r.device)
    v = r / torch.where(norm > 0, norm, 1.0)
    basis = v.unsqueeze(0)  # rows v_1 ... v_{k+1}
    rotations = torch.ones(1, 1, dtype=r.dtype, device=r.device)  # Q
    columns: list[Tensor] = []  # of R
    rhs: list[Tensor] = []  # of R y = rhs
    moves: list[Tensor] = []
    size, broken = zero, torch.zeros_like(active)
    last = norm  # signed entry of Q (norm e_1) below rhs; its size is the residual norm
    for k in range(num_steps):
        if interval and k % interval == 0 and not active.item():
            break
        w = op.mv(v)
        w_norm = torch.linalg.vector_norm(w)
        size = torch.maximum(size, w_norm)  # a bound on norm(A) from below
        h = basis @ w
        w = w - h @ basis
        again = basis @ w
        w = w - again @ basis
        h = rotations @ (h + again)
        below = torch.linalg.vector_norm(w)
        # Below rounding the space is invariant: the solution lies in it.
        below = torch.where(below > 10 * eps * w_norm, below, zero)
        diagonal = torch.hypot(h.select(0, k), below)
        moved = active & (diagonal > 10 * eps * size) & (diagonal < float("inf"))
        broken = broken | (active & torch.logical_not(diagonal < float("inf")))
        moves.append(moved)
        safe = torch.where(moved, diagonal, 1.0)
        cosine, sine = h.select(0, k) / safe, below / safe
        row = rotations.select(0, k)
        rotations = torch.cat(
            [
                pad(rotations.narrow(0, 0, k), (0, 1)),
                torch.cat([cosine * row, sine.unsqueeze(0)]).unsqueeze(0),
                torch.cat([-sine * row, cosine.unsqueeze(0)]).unsqueeze(0),
            ]
        )
        # A step that does not count has the column e_k and the right-hand side 0, hence y_k = 0.
        column = torch.cat([torch.where(moved, h.narrow(0, 0, k), zero), safe.unsqueeze(0)])
        columns.append(pad(column, (0, num_steps - k - 1)))
        rhs.append(torch.where(moved, cosine * last, zero))
        last = torch.where(moved, -sine * last, last)
        active = moved & (last.abs() > tol)
        v = torch.where(active, w / torch.where(active, below, 1.0), zero)
        basis = torch.cat([basis, v.unsqueeze(0)])
    if not columns:
        return _Cycle(torch.zeros_like(r), norm, active, broken, moves, 0)
    k = len(columns)
    triangle = torch.stack(columns, dim=1).narrow(0, 0, k)
    y = torch.linalg.solve_triangular(triangle, torch.stack(rhs).unsqueeze(1), upper=True).squeeze(1)
    return _Cycle(y @ basis.narrow(0, 0, k), last.abs(), active, broken, moves, k)
