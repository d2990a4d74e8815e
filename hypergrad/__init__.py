"""Hypergradients for bilevel and multilevel optimization in PyTorch."""

from hypergrad import optim, solvers
from hypergrad._result import Result, SolveError, Stats
from hypergrad.composite import Composite
from hypergrad.methods import *  # noqa: F403
from hypergrad.solvers import *  # noqa: F403
from hypergrad.trajectory import Recording, Trajectory, descend, solved, solved_root
