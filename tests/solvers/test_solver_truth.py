"""Solutions against the closed form, for every solver and every kind of matrix it accepts."""

from __future__ import annotations

import pytest
import torch
from linear_systems import DOUBLE, Counting, matrix, relative_error, system

from hypergrad._result import Result
from hypergrad.operators import Damped, Matrix
from hypergrad.solvers import CG, GMRES, MINRES, Exact, Neumann, Nystrom, SciPy

SIZES = [1, 2, 3, 10, 57, 300]


def check(solver, n, condition, kind, rtol):
    op, b, x = system(n, condition, kind)
    counting = Counting(op)
    solution = solver.solve(counting, b)
    assert relative_error(solution.x, x) < rtol
    assert solution.result == Result.SUCCESS
    assert solution.num_products == counting.products
    true_residual = (b - op.mv(solution.x)).norm()
    # The recurrence and the truth agree to rounding in the terms of the residual.
    assert abs(true_residual - solution.residual_norm) < 1e-11 * b.norm()


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("condition", [1e2, 1e4])
def test_cg(n, condition):
    check(CG(max_steps=10 * n + 10, rtol=1e-13), n, condition, "definite", 1e-8)


@pytest.mark.parametrize("n", [2, 10, 57])
def test_cg_ill_conditioned(n):
    check(CG(max_steps=100 * n, rtol=1e-14, check_every=1), n, 1e6, "definite", 1e-8)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("condition", [1e2, 1e6])
@pytest.mark.parametrize("kind", ["definite", "indefinite", "nonsymmetric"])
def test_exact(n, condition, kind):
    check(Exact(), n, condition, kind, 1e-8)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("condition", [1e2, 1e6])
@pytest.mark.parametrize("kind", ["definite", "indefinite", "nonsymmetric"])
def test_gmres(n, condition, kind):
    check(GMRES(max_steps=2 * n, rtol=1e-15), n, condition, kind, 1e-8)


@pytest.mark.parametrize("n", [2, 10, 57])
@pytest.mark.parametrize("kind", ["definite", "nonsymmetric"])
def test_gmres_with_restarts(n, kind):
    # A well-conditioned matrix close to the identity: restarted GMRES may stagnate on others.
    A = torch.eye(n, dtype=DOUBLE) + 0.5 * matrix(n, 10.0, kind)
    x = torch.linspace(1, 2, n, dtype=DOUBLE)
    counting = Counting(Matrix(A))
    solution = GMRES(max_steps=200, restart=min(4, n), rtol=1e-12).solve(counting, A @ x)
    assert relative_error(solution.x, x) < 1e-10
    assert solution.result == Result.SUCCESS
    assert solution.num_products == counting.products


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("kind", ["definite", "indefinite"])
def test_minres(n, kind):
    # Its error grows with the square of the condition number times eps, hence the looser bound.
    check(MINRES(max_steps=5 * n + 10, rtol=1e-10), n, 1e2, kind, 1e-6)


@pytest.mark.parametrize("step_size", [None, 1.5])
@pytest.mark.parametrize("n", [1, 2, 10, 57])
def test_neumann(n, step_size):
    # (1 - s / condition)^K = exp(-20) at s = 0.9.
    check(Neumann(num_terms=2300, step_size=step_size), n, 1e2, "definite", 1e-8)


@pytest.mark.parametrize("step_size", [0.3, None])
def test_neumann_is_the_series(step_size):
    op, b, _ = system(6, 10.0)
    solution = Neumann(num_terms=4, step_size=step_size).solve(op, b)
    if step_size is None:
        step_size = _step_size_of(op, b)
    series, term = torch.zeros_like(b), b
    for _ in range(4):
        series, term = series + step_size * term, term - step_size * op.mv(term)
    assert relative_error(solution.x, series) < 1e-6
    assert solution.num_steps == 4
    torch.testing.assert_close(solution.residual_norm, term.norm(), rtol=1e-6, atol=0.0)


def _step_size_of(op, b):
    """Recover the step size from one term: x_1 = s b."""
    one = Neumann(num_terms=1).solve(op, b).x
    return float(one @ b / (b @ b))


def test_neumann_estimates_a_step_that_contracts():
    for seed in range(5):
        A = matrix(40, 1e3, seed=seed) * 1e4
        b = torch.ones(40, dtype=DOUBLE)
        step = _step_size_of(Matrix(A, symmetric=True), b)
        assert 1 / 1.2 / 1e4 < step < 1.5 / 1e4  # lambda_max is 1e4


def test_neumann_takes_a_nonsymmetric_contraction():
    J = 0.5 * matrix(8, 5.0, "nonsymmetric")
    A = torch.eye(8, dtype=DOUBLE) - J
    b = torch.ones(8, dtype=DOUBLE)
    solution = Neumann(num_terms=60, step_size=1.0).solve(Matrix(A), b)
    assert relative_error(solution.x, torch.linalg.solve(A, b)) < 1e-12


@pytest.mark.parametrize("n", [1, 2, 10, 57])
@pytest.mark.parametrize("condition", [1e2, 1e6])
def test_nystrom_of_full_rank_is_exact(n, condition):
    op, b, x = system(n, condition)
    counting = Counting(op)
    solution = Nystrom(rank=n + 3, damping=1e-16).solve(counting, b)
    assert relative_error(solution.x, x) < 1e-8
    assert solution.num_products == counting.products == n + 1
    torch.testing.assert_close(solution.residual_norm, (b - op.mv(solution.x)).norm(), rtol=1e-6, atol=1e-14)


@pytest.mark.parametrize("damping", [1.0, 1e-3, 1e-6])
def test_nystrom_is_exact_on_low_rank(damping):
    factor = matrix(40, 10.0)[:, :5]
    A = factor @ factor.T
    b = torch.ones(40, dtype=DOUBLE)
    solution = Nystrom(rank=6, damping=damping).solve(Matrix(A, symmetric=True), b)
    truth = torch.linalg.solve(A + damping * torch.eye(40, dtype=DOUBLE), b)
    # A shift of sqrt(n) eps norm(A) keeps the sketch definite; relative to the damping it is 1e-15 / damping.
    assert relative_error(solution.x, truth) < 1e-8
    assert solution.result == Result.SUCCESS


def test_nystrom_of_the_zero_operator():
    b = torch.ones(4, dtype=DOUBLE)
    solution = Nystrom(rank=2, damping=0.5).solve(Matrix(torch.zeros(4, 4, dtype=DOUBLE), symmetric=True), b)
    assert relative_error(solution.x, 2 * b) < 1e-12


def test_nystrom_improves_with_rank():
    op, b, x = system(60, 1e6)
    damped = Damped(op, 1e-3)
    truth = Exact().solve(damped, b).x
    errors = [relative_error(Nystrom(rank=r, damping=1e-3).solve(op, b).x, truth) for r in (5, 20, 40, 60)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-8


@pytest.mark.parametrize("name", ["gmres", "lgmres", "gcrotmk", "bicg", "bicgstab", "qmr"])
def test_scipy_nonsymmetric(name):
    op, b, x = system(20, 10.0, "nonsymmetric")
    op = Damped(op, 1.0)
    b = op.mv(x)
    counting = Counting(op)
    solution = SciPy(name, rtol=1e-12, max_steps=500).solve(counting, b)
    assert relative_error(solution.x, x) < 1e-8
    assert solution.result == Result.SUCCESS
    assert solution.num_products == counting.products
    assert solution.num_steps > 0
    assert solution.x.dtype == DOUBLE


@pytest.mark.parametrize("name", ["cg", "minres", "bicg", "bicgstab", "cgs", "tfqmr", "qmr", "gmres", "lgmres"])
def test_scipy_definite(name):
    op, b, x = system(20, 10.0)
    solution = SciPy(name, rtol=1e-13, max_steps=500).solve(op, b)
    assert relative_error(solution.x, x) < 1e-8
    assert solution.residual_norm < 1e-8 * b.norm()


@pytest.mark.parametrize(
    "solver", [CG(300), MINRES(300), GMRES(60), Exact(), Neumann(300), Nystrom(60, damping=1e-6), SciPy("cg")]
)
def test_float32(solver):
    op, b, x = system(40, 10.0, dtype=torch.float32)
    solution = solver.solve(op, b)
    # rtol 1e-5 times the condition number 10, with room
    assert relative_error(solution.x, x) < 2e-4
    assert solution.x.dtype == solution.residual_norm.dtype == torch.float32
    for code in (solution.result, solution.num_steps, solution.num_products):
        assert code.dtype == torch.int64 and code.shape == ()


@pytest.mark.parametrize("solver", [CG(100, rtol=1e-10), MINRES(100, rtol=1e-10), GMRES(100, rtol=1e-10), Exact()])
@pytest.mark.parametrize("dtype, scale", [(DOUBLE, 1e-200), (DOUBLE, 1e200), (torch.float32, 1e-30)])
def test_tiny_and_huge_right_hand_sides(solver, dtype, scale):
    op, b, x = system(10, 10.0, dtype=dtype)
    solution = solver.solve(op, b * scale)
    assert solution.result in (Result.SUCCESS, Result.MAX_STEPS)
    tight = 1e-8 if dtype is DOUBLE else 1e-4
    assert relative_error(solution.x / scale, x) < tight
    assert relative_error(solver.solve(op, b * scale, **_start(solver, x * scale)).x / scale, x) < tight


def _start(solver, x):
    return {"x0": 0.99 * x} if solver.uses_initial else {}
