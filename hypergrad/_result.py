"""What a solve reports: a code whose text names the remedy, statistics, and the error that carries them."""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


class Result(IntEnum):
    """How a solve ended. Codes from `NEGATIVE_CURVATURE` on are breakdowns: `throw=True` raises them."""

    SUCCESS = 0
    MAX_STEPS = 1
    NEGATIVE_CURVATURE = 2
    DIVERGED = 3
    NON_FINITE = 4
    SINGULAR = 5

    @property
    def message(self) -> str:
        """Return what happened and what to do about it."""
        return _MESSAGES[self]

    @property
    def is_breakdown(self) -> bool:
        """Return whether the result must not be trusted."""
        return self >= Result.NEGATIVE_CURVATURE

    def tensor(self, device: torch.device | str) -> Tensor:
        """Return the code as an integer tensor, the form it has inside a solve."""
        return torch.full((), int(self), dtype=torch.int64, device=device)


_MESSAGES = {
    Result.SUCCESS: "The solve reached its tolerance.",
    Result.MAX_STEPS: (
        "The solve stopped at max_steps before reaching its tolerance. Raise max_steps, precondition, or warm-start it."
    ),
    Result.NEGATIVE_CURVATURE: (
        "CG met negative curvature: the lower Hessian is not positive definite here. Train the lower level longer, "
        "add damping (Implicit(..., damping=...)), use curvature='gauss_newton', or a solver for indefinite systems "
        "(MINRES, GMRES)."
    ),
    Result.DIVERGED: (
        "The series diverged: its residual is larger than the right-hand side. Lower step_size below "
        "2 / lambda_max(H), leave it None to have it estimated, add damping, or use CG or MINRES."
    ),
    Result.NON_FINITE: (
        "A value that is not finite (NaN or infinity) appeared. Check the data and the losses for NaN, lower the "
        "learning rate of the lower run, or compute in a wider dtype."
    ),
    Result.SINGULAR: (
        "The linear system is singular to working precision. Add damping, or a strictly convex penalty to the "
        "lower loss."
    ),
}


class SolveError(RuntimeError):
    """A hypergradient could not be computed; `result` holds the `Result` code."""

    def __init__(self, result: Result, context: str = "") -> None:
        """Build the error text from the code's message, led by `context`."""
        super().__init__(f"{context}{result.message} [Result.{result.name}]")
        self.result = result


class Stats(dict[str, Tensor]):
    """Statistics of one call, by name, also as attributes (`stats.num_products`); values stay tensors until read."""

    def __getattr__(self, name: str) -> Tensor:
        """Return the statistic called `name`."""
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no statistic {name!r}; this method reports {sorted(self)}") from None


pytree.register_pytree_node(
    Stats,
    lambda stats: (list(stats.values()), tuple(stats)),
    lambda values, names: Stats(zip(names, values, strict=True)),
    serialized_type_name="hypergrad.Stats",
)
