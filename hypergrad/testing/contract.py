"""What every method and every solver must do, whoever wrote it: call these from your own tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hypergrad._flat import Params
from hypergrad._result import Result
from hypergrad.methods import Method, ResponseMethod, hypergradient
from hypergrad.operators import Matrix
from hypergrad.optim import SGD
from hypergrad.solvers import Solver
from hypergrad.testing.problems import KnownProblem, quadratic, relative_error, spd
from hypergrad.trajectory import Trajectory, descend


def check_method(method: Method, *, vmap: bool = True, tolerance: float = 1e-7) -> None:
    """Return nothing if `method` keeps the contract, on a quadratic problem in float64.

    Keys, shapes and dtypes like `upper`; the direct term included; value and code as documented; the same answer twice;
    nothing changed; thinned records suffice; linear in the cotangent; a population under `vmap` equals the loop.

    Args:
        method: the method, with options that suit a problem of condition 4 and six lower parameters.
        vmap: whether to run it under `torch.func.vmap`.
        tolerance: relative, for equalities that hold up to rounding.

    Raises:
        AssertionError: naming the property that does not hold.

    Example:
        >>> import hypergrad as hg
        >>> from hypergrad.testing import check_method
        >>> check_method(hg.Implicit(hg.CG(10, rtol=1e-12)))
    """
    problem = quadratic(6, 4, 4.0)
    upper = {**problem.upper, "unread": torch.ones(2, 2, dtype=torch.float64)}
    inputs = {**problem.lower, **upper}
    before = {name: (tensor.clone(), tensor._version) for name, tensor in inputs.items()}
    generator = torch.get_rng_state()
    run = _run(problem, upper, method)
    h = hypergradient(problem.upper_loss, run, upper, method=method, throw=False)
    _require(isinstance(h.result, Tensor) and h.result.dtype == torch.int64, "throw=False gives an integer code")
    _require(not Result(int(h.result)).is_breakdown, "no breakdown on a well-conditioned quadratic")
    _require(list(h.grad) == list(upper), "grad has the keys of upper, in their order")
    for name, u in upper.items():
        _require(h.grad[name].shape == u.shape and h.grad[name].dtype == u.dtype, f"grad[{name!r}] is like upper's")
        _require(not h.grad[name].requires_grad, f"grad[{name!r}] is detached")
    _require(not bool(torch.count_nonzero(h.grad["unread"])), "an upper parameter that nothing reads has gradient 0")
    _require(not h.value.requires_grad and h.value.dim() == 0, "value is a detached scalar")
    _require(torch.equal(h.value, problem.upper_loss(run.end, upper, None)), "value is the upper loss at the end")
    again = hypergradient(problem.upper_loss, run, upper, method=method)
    _require(isinstance(again.result, Result), "throw=True gives a Result")
    _require(relative_error(again.grad, h.grad) == 0.0, "the same call gives the same answer")
    whole = hypergradient(problem.upper_loss, _run(problem, upper, None), upper, method=method)
    _require(relative_error(h.grad, whole.grad) < tolerance, "method.recording keeps what the method reads")
    for name, tensor in inputs.items():
        value, version = before[name]
        unchanged = torch.equal(tensor, value) and tensor._version == version and tensor.grad is None
        _require(unchanged, f"{name!r} is left as it was found")
    _require(torch.equal(generator, torch.get_rng_state()), "the generator is left as it was found")
    if isinstance(method, ResponseMethod):
        _check_direct_term(method, problem, upper, tolerance)
        _check_rule(method, problem, upper, tolerance)
    if vmap:
        _check_population(method, problem, tolerance)


def check_solver(solver: Solver, *, exact: bool = True, tolerance: float = 1e-8) -> None:
    """Return nothing if `solver` keeps the contract, on a symmetric system of condition 4 in float64.

    Args:
        solver: the solver, with options that suit that system of size 6.
        exact: whether its answer is A^-1 b.
        tolerance: relative, for the answer and for equalities that hold up to rounding.

    Raises:
        AssertionError: naming the property that does not hold.

    Example:
        >>> import hypergrad as hg
        >>> from hypergrad.testing import check_solver
        >>> check_solver(hg.MINRES(10, rtol=1e-12))
    """
    generator = torch.Generator().manual_seed(0)
    dense = spd(6, 4.0, generator=generator)
    operator = Matrix(dense, symmetric=True)
    b, other = torch.randn(2, 6, generator=generator, dtype=torch.float64).unbind()
    state = torch.get_rng_state()
    solution = solver.solve(operator, b)
    _require(solution.x.shape == b.shape and solution.x.dtype == b.dtype, "x is like b")
    for name in ("result", "num_steps", "num_products"):
        field: Tensor = {"result": solution.result, "num_steps": solution.num_steps}.get(name, solution.num_products)
        _require(field.dtype == torch.int64 and field.dim() == 0, f"{name} is a 0-dim int64 tensor")
    _require(not Result(int(solution.result)).is_breakdown, "no breakdown on a well-conditioned system")
    residual = torch.linalg.vector_norm(b - dense @ solution.x)
    close = torch.allclose(solution.residual_norm, residual, rtol=1e-3, atol=1e-9 * float(b.norm()))
    _require(close, "residual_norm is norm(b - A x)")
    if exact:
        error = (solution.x - torch.linalg.solve(dense, b)).norm() / b.norm()
        _require(bool(error < tolerance), "x is A^-1 b")
    both = solver.solve(operator, 2 * b - other).x
    separate = 2 * solution.x - solver.solve(operator, other).x
    _require(bool((both - separate).norm() <= 10 * tolerance * separate.norm()), "the solution is linear in b")
    zero = solver.solve(operator, torch.zeros_like(b))
    _require(not bool(torch.count_nonzero(zero.x)), "a zero right-hand side has the solution zero")
    _require(not Result(int(zero.result)).is_breakdown, "a zero right-hand side is no breakdown")
    _require(torch.equal(solver.solve(operator, b).x, solution.x), "the same call gives the same answer")
    _require(torch.equal(state, torch.get_rng_state()), "no generator is used")
    if solver.uses_initial:
        warm = solver.solve(operator, b, x0=solution.x)
        _require(bool((warm.x - solution.x).norm() <= 10 * residual + tolerance), "a start at the solution stays there")
    try:
        solver.solve(operator, b[:-1])
    except ValueError:
        return
    raise AssertionError(f"{solver}: a right-hand side of the wrong shape is not refused")


def _check_direct_term(method: Method, problem: KnownProblem, upper: Params, tolerance: float) -> None:
    def direct_only(_lower: Params, u: Params, _batch: Any) -> Tensor:
        return (u["v"] ** 3).sum()

    h = hypergradient(direct_only, _run(problem, upper, method), upper, method=method)
    expected = {name: torch.zeros_like(u) for name, u in upper.items()} | {"v": 3 * upper["v"] ** 2}
    _require(relative_error(h.grad, expected) < tolerance, "an upper loss that ignores lower has its direct term alone")


def _check_rule(method: ResponseMethod, problem: KnownProblem, upper: Params, tolerance: float) -> None:
    run = _run(problem, upper, method)
    size = run.layout.size
    first = torch.linspace(-1, 2, size, dtype=torch.float64)
    second = torch.linspace(1, 3, size, dtype=torch.float64) ** 2

    def pull(cotangent: Tensor) -> Params:
        grad = method.vjp(run, upper, cotangent).grad
        return {name: grad[name] if name in grad else torch.zeros_like(u) for name, u in upper.items()}

    a, b, both = pull(first), pull(second), pull(2 * first - 3 * second)
    combined = {name: 2 * a[name] - 3 * b[name] for name in upper}
    _require(relative_error(both, combined) < tolerance, "the rule is linear in the cotangent")
    zero = pull(torch.zeros_like(first))
    _require(all(not bool(torch.count_nonzero(g)) for g in zero.values()), "a zero cotangent is pulled back to zero")


def _check_population(method: Method, problem: KnownProblem, tolerance: float) -> None:
    def gradient(v: Tensor) -> Tensor:
        upper = {"v": v, "s": problem.upper["s"]}
        h = hypergradient(problem.upper_loss, _run(problem, upper, method), upper, method=method, throw=False)
        return h.grad["v"]

    points = torch.stack([problem.upper["v"], 0 * problem.upper["v"], problem.upper["v"] - 1])
    loop = {"v": torch.stack([gradient(v) for v in points])}
    together = {"v": torch.func.vmap(gradient)(points)}
    _require(relative_error(together, loop) < tolerance, "a population under vmap equals the loop")


def _run(problem: KnownProblem, upper: Params, method: Method | None) -> Trajectory:
    recording = None if method is None else method.recording(5)
    return descend(
        problem.lower_loss, problem.lower, upper, optimizer=SGD(lr=0.5), batches=[None] * 5, recording=recording
    )


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise AssertionError(f"the contract does not hold: {what}")
