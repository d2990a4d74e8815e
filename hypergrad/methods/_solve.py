"""A linear solve that can be differentiated any number of times."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hypergrad._flat import Params
from hypergrad.operators import Operator, Transposed
from hypergrad.solvers import Solver

OperatorAt = Callable[[Tensor, Params], Operator]


def differentiable_solve(solver: Solver, operator_at: OperatorAt, lower: Tensor, upper: Params, b: Tensor) -> Tensor:
    r"""Return x with A(lower, upper) x = b, differentiable in all three.

    .. math:: dx = A^{-1} (db - dA\, x): \qquad \bar b = A^{-T} \bar x, \qquad
        \overline{(w, u)} = -\partial_{(w, u)} \langle \bar b, A(w, u) x \rangle

    Every derivative costs one solve with the transpose and one derivative of a product. Solves start from zero.

    Args:
        solver: solves with A, and with its transpose where A is not symmetric.
        operator_at: function (lower, upper) -> operator, whose products are differentiable in both.
        lower: flat lower parameters.
        upper: upper parameters.
        b: right-hand side, shape (operator.size,).
    """
    problem = _Problem(solver, operator_at, tuple(upper), transposed=False)
    return _apply(problem, b, lower, tuple(upper.values()))


class _Problem:
    """What `_Solve` carries besides its tensors."""

    def __init__(self, solver: Solver, operator_at: OperatorAt, names: tuple[str, ...], *, transposed: bool) -> None:
        self.solver, self.operator_at, self.names, self.transposed = solver, operator_at, names, transposed

    def operator(self, lower: Tensor, upper: tuple[Tensor, ...]) -> Operator:
        operator = self.operator_at(lower, dict(zip(self.names, upper, strict=True)))
        return Transposed(operator) if self.transposed else operator

    def transpose(self) -> _Problem:
        return _Problem(self.solver, self.operator_at, self.names, transposed=not self.transposed)


class _Solve(torch.autograd.Function):
    """x = A^-1 b, whose derivative is another `_Solve`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(problem: _Problem, b: Tensor, lower: Tensor, *upper: Tensor) -> Tensor:
        operator = problem.operator(lower.detach(), tuple(u.detach() for u in upper))
        return problem.solver.solve(operator, b.detach()).x.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.problem = inputs[0]
        ctx.save_for_backward(output, *inputs[2:])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *_pull(ctx, cotangents[0]))


def _pull(ctx: Any, cotangent: Tensor) -> tuple[Tensor, ...]:
    """Return the cotangents of b, lower and each upper tensor."""
    x, lower, *upper = ctx.saved_tensors
    problem: _Problem = ctx.problem
    b_bar = _apply(problem.transpose(), cotangent, lower, tuple(upper))

    def pairing(point: Tensor, at_upper: tuple[Tensor, ...]) -> Tensor:
        return -torch.dot(b_bar, problem.operator(point, at_upper).mv(x))

    lower_bar, upper_bar = torch.func.grad(pairing, argnums=(0, 1))(lower, tuple(upper))
    return (b_bar, lower_bar, *upper_bar)


def _apply(problem: _Problem, b: Tensor, lower: Tensor, upper: tuple[Tensor, ...]) -> Tensor:
    solution: Tensor = _Solve.apply(problem, b, lower, *upper)  # type: ignore[no-untyped-call]
    return solution
