"""Hypergradients for bilevel and multilevel optimization in PyTorch."""

from hypergrad import callbacks, distributed, methods, optim, solvers
from hypergrad._result import Result, SolveError, Stats
from hypergrad.averaged import Averaged
from hypergrad.composite import Composite
from hypergrad.costs import Cost, Estimate, Estimates, estimate
from hypergrad.diagnosis import Agreement, Diagnoses, Diagnosis, diagnose
from hypergrad.distributed import all_gather
from hypergrad.engine import Engine
from hypergrad.faults import NonFiniteError
from hypergrad.history import History, Record
from hypergrad.loss_scale import DynamicScale, ScaledLoss
from hypergrad.methods import (
    BOME,
    F2SA,
    SAMA,
    SOBA,
    AmIGO,
    FiniteDifference,
    ForwardUnrolled,
    Hypergradient,
    Implicit,
    Method,
    OneStep,
    Penalty,
    Pulled,
    Reptile,
    ResponseMethod,
    StocBiO,
    Unrolled,
    best_response,
    hypergradient,
)
from hypergrad.network import detach
from hypergrad.problem import Problem
from hypergrad.product_check import check_product
from hypergrad.solvers import (
    CG,
    GMRES,
    MINRES,
    Exact,
    HutchinsonDiagonal,
    Neumann,
    Nystrom,
    NystromPreconditioner,
    PenaltyPreconditioner,
    SciPy,
    SecondMoment,
    Solution,
    Solver,
)
from hypergrad.source import DataError
from hypergrad.step import Recording
from hypergrad.store import DamagedCheckpoint
from hypergrad.trajectory import Trajectory, descend, solved, solved_root

__version__ = "0.1.0"

__all__ = [
    "Agreement",
    "AmIGO",
    "Averaged",
    "BOME",
    "CG",
    "Composite",
    "Cost",
    "DamagedCheckpoint",
    "DataError",
    "Diagnoses",
    "Diagnosis",
    "DynamicScale",
    "Engine",
    "Estimate",
    "Estimates",
    "Exact",
    "F2SA",
    "FiniteDifference",
    "ForwardUnrolled",
    "GMRES",
    "History",
    "HutchinsonDiagonal",
    "Hypergradient",
    "Implicit",
    "MINRES",
    "Method",
    "Neumann",
    "NonFiniteError",
    "Nystrom",
    "NystromPreconditioner",
    "PenaltyPreconditioner",
    "OneStep",
    "Penalty",
    "Problem",
    "Pulled",
    "Record",
    "Recording",
    "Reptile",
    "ResponseMethod",
    "Result",
    "SAMA",
    "SOBA",
    "ScaledLoss",
    "SciPy",
    "SecondMoment",
    "Solution",
    "SolveError",
    "Solver",
    "Stats",
    "StocBiO",
    "Trajectory",
    "Unrolled",
    "all_gather",
    "best_response",
    "callbacks",
    "check_product",
    "descend",
    "detach",
    "diagnose",
    "distributed",
    "estimate",
    "hypergradient",
    "methods",
    "optim",
    "solved",
    "solved_root",
    "solvers",
]
