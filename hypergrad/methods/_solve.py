"""A linear solve that can be differentiated any number of times."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from hypergrad._flat import Params
from hypergrad._functional import in_transform
from hypergrad._result import Result, SolveError
from hypergrad._tape import vjp
from hypergrad.operators import Operator, Transposed
from hypergrad.solvers import Solution, Solver

OperatorAt = Callable[[Tensor, Params], Operator]


def solve(solver: Solver, operator: Operator, b: Tensor, x0: Tensor | None = None) -> Solution:
    """Return what `solver.solve` does.

    Raises:
        ValueError: if that is no `Solution` of the shape of `b`; the message names the solver.
    """
    solution: Any = solver.solve(operator, b, x0=x0)
    owner = type(solver).__name__
    if not isinstance(solution, Solution):
        raise ValueError(
            f"{owner}.solve must return an hg.Solution(x, result, num_steps, num_products, residual_norm), got "
            f"{type(solution).__name__}."
        )
    if solution.x.shape != b.shape:
        raise ValueError(f"{owner}.solve returned x of shape {tuple(solution.x.shape)}; b has {tuple(b.shape)}.")
    return solution


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


_RAISES: ContextVar[bool] = ContextVar("raises", default=False)


@contextlib.contextmanager
def breakdowns_raise(raises: bool) -> Iterator[None]:
    """Let the differentiable solves that begin in the body raise their breakdowns, wherever these can be read."""
    if torch.compiler.is_compiling():
        yield
        return
    token = _RAISES.set(raises)
    try:
        yield
    finally:
        _RAISES.reset(token)


class _Problem:
    """What `_Solve` carries besides its tensors."""

    def __init__(self, solver: Solver, operator_at: OperatorAt, names: tuple[str, ...], *, transposed: bool) -> None:
        self.solver, self.operator_at, self.names, self.transposed = solver, operator_at, names, transposed
        self.raises = not torch.compiler.is_compiling() and _RAISES.get()

    def operator(self, lower: Tensor, upper: tuple[Tensor, ...]) -> Operator:
        operator = self.operator_at(lower, dict(zip(self.names, upper, strict=True)))
        return Transposed(operator) if self.transposed else operator

    def transpose(self) -> _Problem:
        other = _Problem(self.solver, self.operator_at, self.names, transposed=not self.transposed)
        other.raises = self.raises
        return other


class _Solve(torch.autograd.Function):
    """x = A^-1 b, whose derivative is another `_Solve`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(problem: _Problem, b: Tensor, lower: Tensor, *upper: Tensor) -> Tensor:
        operator = problem.operator(lower.detach(), tuple(u.detach() for u in upper))
        solution = solve(problem.solver, operator, b.detach())
        if problem.raises and not in_transform():
            result = Result(int(solution.result))
            if result.is_breakdown:
                raise SolveError(result, "best_response: ")
        return solution.x.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.problem = inputs[0]
        ctx.save_for_backward(output, *inputs[2:])
        ctx.save_for_forward(output, *inputs[2:])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *_pull(ctx, cotangents[0]))


class _SolveWithPush(_Solve):
    """The same with a forward derivative, dx = A^{-1} (db - dA x); `torch.compile` does not take one."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        x, lower, *upper = ctx.saved_tensors
        problem: _Problem = ctx.problem
        b_dot, *rest = tangents[1:]
        lower_dot, *upper_dot = (
            torch.zeros_like(at) if t is None else t for at, t in zip((lower, *upper), rest, strict=True)
        )

        def product(point: Tensor, at_upper: tuple[Tensor, ...]) -> Tensor:
            return problem.operator(point, at_upper).mv(x)

        _, pullback = vjp(product, lower, tuple(upper))
        _, push = vjp(pullback, torch.zeros_like(x))  # it is linear, and its transpose pushes forward
        (moved,) = push((lower_dot, tuple(upper_dot)))
        return _apply(problem, -moved if b_dot is None else b_dot - moved, lower, tuple(upper))


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
    solve = _Solve if torch.compiler.is_compiling() else _SolveWithPush
    solution: Tensor = applied(solve, problem, b, lower, *upper)
    return solution


def applied(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """Return function.apply(*arguments), where nothing can need its derivative in a compiled region its forward alone.

    `torch.compile` does the same there, but hands a context to every forward whose number of parameters, `*upper` for
    one, is not that of the arguments.
    """
    if torch.compiler.is_compiling() and not (
        torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments)
    ):
        return function.forward(*arguments)
    return function.apply(*arguments)  # type: ignore[no-untyped-call]
