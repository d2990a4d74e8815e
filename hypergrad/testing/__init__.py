"""Closed-form problems and contract tests, for methods and solvers inside and outside the package."""

from hypergrad.testing.contract import check_method, check_solver
from hypergrad.testing.problems import (
    KnownProblem,
    logistic,
    newton_problem,
    quadratic,
    relative_error,
    ridge,
    spd,
    tanh_network,
)

__all__ = [
    "KnownProblem",
    "check_method",
    "check_solver",
    "logistic",
    "newton_problem",
    "quadratic",
    "relative_error",
    "ridge",
    "spd",
    "tanh_network",
]
