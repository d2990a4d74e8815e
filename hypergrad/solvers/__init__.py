"""Linear solvers: each solves A x = b from products with A, and reports how it went."""

from hypergrad.solvers.base import Solution, Solver
from hypergrad.solvers.cg import CG
from hypergrad.solvers.exact import Exact
from hypergrad.solvers.neumann import Neumann
from hypergrad.solvers.preconditioners import Preconditioner

__all__ = ["CG", "Exact", "Neumann", "Preconditioner", "Solution", "Solver"]
