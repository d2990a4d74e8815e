"""A solver that counts its products as it goes, where the statistics of the solve hold no values."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from hypergrad.operators import Function, Operator
from hypergrad.solvers import Solution, Solver


@dataclass(frozen=True)
class Counting(Solver):
    """Another solver, and the number of products it has asked for."""

    solver: Solver
    asked: list[int] = field(default_factory=list)
    requires_symmetric = False
    uses_initial = True

    @property
    def num_products(self) -> int:
        """Return the products so far."""
        return sum(self.asked)

    def solve(self, op: Operator, b: Tensor, *, x0: Tensor | None = None) -> Solution:
        """Return the other solver's solution."""

        def mv(v: Tensor) -> Tensor:
            self.asked.append(1)
            return op.mv(v)

        def rmv(v: Tensor) -> Tensor:
            self.asked.append(1)
            return op.rmv(v)

        counted = Function(
            mv,
            rmv,
            size=op.size,
            dtype=op.dtype,
            device=op.device,
            symmetric=op.symmetric,
            second_moment=op.second_moment,
        )
        return self.solver.solve(counted, b, x0=x0)
