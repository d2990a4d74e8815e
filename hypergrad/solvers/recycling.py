"""Directions of earlier solves, kept as the preconditioner of the next."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from hypergrad.operators import Operator
from hypergrad.solvers.base import Apply, Preconditioner, Solution, check_interval, pick
from hypergrad.solvers.cg import CG


@final
@dataclass(frozen=True)
class Recycled(Preconditioner):
    r"""M = the inverse that BFGS makes of pairs (s, A s) of earlier solves.

    .. math:: M = \gamma I + \begin{bmatrix} S & \gamma Y \end{bmatrix}
        \begin{bmatrix} R^{-T} (D + \gamma Y^T Y) R^{-1} & -R^{-T} \\ -R^{-1} & 0 \end{bmatrix}
        \begin{bmatrix} S^T \\ \gamma Y^T \end{bmatrix}

    with R the upper triangle of S^T Y, oldest pair first, D its diagonal, and gamma the mean of norm(s)^2 over the
    pairs, which `paired` scales to s.y = 1. M is positive definite for any pairs with s.y > 0, so that it is right also
    where A has moved on since; M y = s for the newest pair, and for all of one solve.

    Cost: no products; m^2 n operations once, then 4 m n a step of the solver. Memory: the 2 m n of the pairs.

    Args:
        pairs: S and Y by rows, shape (2, m, n); rows of zeros count for nothing.

    Reference: J. L. Morales, J. Nocedal, "Automatic preconditioning by limited memory quasi-Newton updating", 2000;
        R. H. Byrd, J. Nocedal, R. B. Schnabel, "Representations of quasi-Newton matrices", 1994, theorem 2.2.
    """

    pairs: Tensor

    def build(self, op: Operator) -> tuple[Apply, int]:  # noqa: ARG002 - the pairs know A as it was
        """Return r -> M r, and 0."""
        s, y = self.pairs.unbind(0)
        used = (s != 0).any(1).to(s.dtype)
        gamma = torch.where(used.sum() > 0, s.square().sum() / used.sum().clamp(min=1), 1.0)
        upper = torch.triu(s @ y.T) + torch.diag(1 - used)
        middle = torch.diag(used) + gamma * (y @ y.T)

        def apply(r: Tensor) -> Tensor:
            along, across = (self.pairs @ r).unbind(0)
            t = torch.linalg.solve_triangular(upper, along[:, None], upper=True)
            u = torch.linalg.solve_triangular(upper.T, middle @ t - gamma * across[:, None], upper=False)
            product: Tensor = gamma * r + u[:, 0] @ s - gamma * (t[:, 0] @ y)
            return product

        return apply, 0


@final
class Noted(Operator):
    """An operator that notes its latest products, in order."""

    def __init__(self, op: Operator, count: int) -> None:
        """Wrap `op`, noting `count` products."""
        self.op = op
        self.size, self.dtype, self.device, self.symmetric = op.size, op.dtype, op.device, op.symmetric
        self.second_moment = op.second_moment
        self.products: deque[tuple[Tensor, Tensor]] = deque(maxlen=count)

    def mv(self, v: Tensor) -> Tensor:
        """Return A v."""
        product = self.op.mv(v)
        self.products.append((v.clone(), product))  # the solver goes on in the memory of v
        return product

    def rmv(self, v: Tensor) -> Tensor:
        """Return A^T v."""
        return self.op.rmv(v)


def solve_recycling(
    solver: CG, op: Operator, b: Tensor, state: Tensor | None, count: int, *, warm_start: bool = False
) -> tuple[Solution, Tensor]:
    """Return the solution of A x = b, preconditioned by what earlier solves left, and what this one leaves.

    Args:
        solver: without a preconditioner of its own.
        op: the operator A, symmetric.
        b: right-hand side, shape (n,).
        state: as returned by the last solve: `count` directions, their products and, last, where the next solve begins,
            shape (2 count + 1, n). None for the first.
        count: how many pairs are kept, the latest.
        warm_start: begin the next solve at this solution, for one product more, and not at zero.
    """
    noted = Noted(op, count)
    if state is None:
        kept = b.new_zeros(2, count, op.size)
        solution = solver.solve(noted, b)
    else:
        kept = state[:-1].view(2, count, op.size)
        preconditioned = replace(solver, preconditioner=Recycled(kept))
        solution = preconditioned.solve(noted, b, x0=state[-1] if warm_start else None)
    reads = check_interval(solver.check_every, b, "CG") == 1
    fresh = [paired(v, product, reads=reads) for v, product in noted.products]
    old, directions, products = kept[:, len(fresh) :], [s for s, _ in fresh], [y for _, y in fresh]
    rows = [*old[0].unbind(0), *directions, *old[1].unbind(0), *products, solution.x]
    return solution, torch.stack(rows)  # one copy, straight into place


def paired(v: Tensor, product: Tensor, *, reads: bool) -> tuple[Tensor, Tensor]:
    """Return v and A v, scaled so that their dot product is 1; zeros where A is not positive along v."""
    curvature = torch.dot(v, product)
    least = torch.finfo(v.dtype).eps * torch.linalg.vector_norm(v) * torch.linalg.vector_norm(product)
    positive = (curvature > least) & (curvature < float("inf"))
    scale = torch.where(positive, curvature, 1.0).rsqrt()
    return pick(positive, v * scale, 0.0, reads=reads), pick(positive, product * scale, 0.0, reads=reads)
