"""Linear solvers: each solves A x = b from products with A, and reports how it went."""

from hypergrad.solvers.base import Preconditioner, Solution, Solver
from hypergrad.solvers.cg import CG
from hypergrad.solvers.exact import Exact
from hypergrad.solvers.gmres import GMRES
from hypergrad.solvers.minres import MINRES
from hypergrad.solvers.neumann import Neumann
from hypergrad.solvers.nystrom import Nystrom
from hypergrad.solvers.preconditioners import (
    HutchinsonDiagonal,
    NystromPreconditioner,
    PenaltyPreconditioner,
    SecondMoment,
)
from hypergrad.solvers.scipy import SciPy

__all__ = [
    "CG",
    "GMRES",
    "MINRES",
    "Exact",
    "HutchinsonDiagonal",
    "Neumann",
    "Nystrom",
    "NystromPreconditioner",
    "PenaltyPreconditioner",
    "Preconditioner",
    "SciPy",
    "SecondMoment",
    "Solution",
    "Solver",
]
