"""What a solve reports and returns when it starts, stops or breaks down in every way it can."""

from __future__ import annotations

import pytest
import torch
from linear_systems import DOUBLE, Counting, matrix, relative_error, system

from hypergrad._result import Result
from hypergrad.operators import Function, Matrix
from hypergrad.solvers import (
    CG,
    GMRES,
    MINRES,
    Exact,
    HutchinsonDiagonal,
    Neumann,
    Nystrom,
    NystromPreconditioner,
    SciPy,
)

CHECKS = ["auto", None, 1, 3]
KRYLOV = [CG, MINRES, GMRES]
ALL = [
    CG(5),
    CG(5, check_every=None),
    MINRES(5),
    MINRES(5, check_every=None),
    GMRES(5),
    GMRES(5, check_every=None),
]
ALL += [GMRES(6, restart=2, check_every=None), Exact(), Neumann(5), Neumann(5, step_size=0.5), Nystrom(3)]
ALL += [
    CG(5, preconditioner=HutchinsonDiagonal()),
    CG(5, preconditioner=NystromPreconditioner(2)),
    SciPy("cg"),
]


@pytest.mark.parametrize("solver", ALL, ids=str)
def test_zero_right_hand_side(solver):
    op, b, _ = system(6, 10.0)
    starts = [None, torch.ones_like(b)] if solver.uses_initial else [None]
    for x0 in starts:
        solution = solver.solve(op, torch.zeros_like(b), x0=x0)
        assert torch.equal(solution.x, torch.zeros_like(b))
        assert solution.result == Result.SUCCESS
        assert solution.num_steps == 0
        assert solution.residual_norm == 0


@pytest.mark.parametrize("solver", ALL, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_right_hand_side_not_finite(solver, value):
    op, b, _ = system(6, 10.0)
    b[2] = value
    solution = solver.solve(op, b)
    assert solution.result == Result.NON_FINITE
    assert solution.x.isfinite().all()


@pytest.mark.parametrize("solver", ALL, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_product_not_finite(solver, value):
    op, b, _ = system(6, 10.0)
    broken = op.dense.clone()
    broken[1, 1] = value
    solution = solver.solve(Matrix(broken, symmetric=True), b)
    assert solution.result == Result.NON_FINITE or isinstance(solver, SciPy)
    assert solution.result != Result.SUCCESS
    assert solution.x.isfinite().all()


@pytest.mark.parametrize("check_every", CHECKS)
@pytest.mark.parametrize("kind", KRYLOV)
def test_product_that_breaks_later_keeps_the_last_good_iterate(kind, check_every):
    op, b, _ = system(6, 10.0)
    calls = 0

    def mv(v):
        nonlocal calls
        calls += 1
        return op.mv(v) if calls <= 2 else op.mv(v) * float("nan")

    broken = Function(mv, size=6, dtype=DOUBLE, device="cpu", symmetric=True)
    solution = kind(5, check_every=check_every).solve(broken, b)
    good = kind(2, check_every=check_every).solve(op, b)
    assert solution.result == Result.NON_FINITE
    assert solution.num_steps == 2
    assert torch.equal(solution.x, good.x)
    assert solution.residual_norm == good.residual_norm


@pytest.mark.parametrize("check_every", CHECKS)
@pytest.mark.parametrize("kind", KRYLOV)
def test_max_steps_is_reported(kind, check_every):
    op, b, _ = system(30, 1e4)
    solution = kind(max_steps=4, check_every=check_every).solve(op, b)
    assert solution.result == Result.MAX_STEPS
    assert solution.num_steps == solution.num_products == 4


@pytest.mark.parametrize("kind", KRYLOV)
def test_iterations_after_convergence_change_nothing(kind):
    op, b, _ = system(12, 10.0)
    solutions = [kind(60, rtol=1e-8, check_every=check).solve(op, b) for check in CHECKS]
    for solution in solutions:
        assert solution.result == Result.SUCCESS
        assert solution.num_steps == solutions[0].num_steps < 30
        assert solution.residual_norm == solutions[0].residual_norm <= 1e-8 * b.norm()
        # GMRES solves a triangle of another size when it goes on masked: equal to rounding.
        torch.testing.assert_close(solution.x, solutions[0].x, rtol=1e-13, atol=1e-14)
    assert solutions[0].num_products == solutions[0].num_steps
    assert solutions[3].num_products - solutions[3].num_steps <= 2
    fewer = kind(int(solutions[0].num_steps) - 1, rtol=1e-8).solve(op, b)
    assert fewer.result == Result.MAX_STEPS
    assert fewer.residual_norm > 1e-8 * b.norm()


@pytest.mark.parametrize("check_every", CHECKS)
@pytest.mark.parametrize("kind", KRYLOV)
def test_residual_that_reaches_zero_exactly(kind, check_every):
    b = torch.tensor([2.0, -4.0, 8.0], dtype=DOUBLE)
    op = Matrix(2 * torch.eye(3, dtype=DOUBLE), symmetric=True)
    solution = kind(10, rtol=0.0, check_every=check_every).solve(op, b)
    assert solution.result == Result.SUCCESS
    torch.testing.assert_close(solution.x, b / 2, rtol=1e-15, atol=0.0)
    # MINRES normalises, and may be left with a rounding error to remove.
    assert 1 <= solution.num_steps <= (2 if kind is MINRES else 1)


@pytest.mark.parametrize("rtol", [0.0, 1e-300])
@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32])
@pytest.mark.parametrize("kind", KRYLOV)
def test_no_tolerance_runs_into_rounding_without_breaking(kind, dtype, rtol):
    op, b, x = system(8, 10.0, dtype=dtype)
    solution = kind(400, rtol=rtol, check_every=None).solve(op, b)
    assert solution.result in (Result.SUCCESS, Result.MAX_STEPS)
    assert relative_error(solution.x, x) < 1e3 * torch.finfo(dtype).eps


@pytest.mark.parametrize("check_every", CHECKS)
@pytest.mark.parametrize("kind", KRYLOV)
def test_start_at_the_solution_takes_no_steps(kind, check_every):
    op, b, x = system(12, 10.0)
    counting = Counting(op)
    solution = kind(5, check_every=check_every).solve(counting, b, x0=x)
    assert solution.result == Result.SUCCESS
    assert solution.num_steps == 0
    assert torch.equal(solution.x, x)
    assert solution.num_products == counting.products
    if check_every is not None:
        assert counting.products == 1


@pytest.mark.parametrize("solver", [CG(40), MINRES(40), GMRES(40), GMRES(40, restart=8), Neumann(300), SciPy("gmres")])
def test_a_good_start_saves_steps_and_a_bad_one_does_no_harm(solver):
    op, b, x = system(12, 10.0)
    cold = solver.solve(op, b)
    warm = solver.solve(op, b, x0=x * (1 + 1e-3))
    far = solver.solve(op, b, x0=1e3 * torch.ones_like(x))
    assert relative_error(far.x, x) < 1e-3
    if isinstance(solver, Neumann):
        assert warm.residual_norm < cold.residual_norm
    else:
        assert warm.num_steps < cold.num_steps
        assert far.residual_norm <= 1e-5 * b.norm() * 1.001
    torch.testing.assert_close(warm.residual_norm, (b - op.mv(warm.x)).norm(), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("solver", [CG(5), MINRES(5), GMRES(5), Neumann(5), SciPy("cg")])
def test_start_that_is_not_finite(solver, value):
    op, b, x = system(6, 10.0)
    solution = solver.solve(op, b, x0=torch.full_like(x, value))
    assert solution.result == Result.NON_FINITE
    assert torch.equal(solution.x, torch.zeros_like(x))


def test_atol():
    op, b, _ = system(30, 1e3)
    for kind in KRYLOV:
        solution = kind(60, rtol=0.0, atol=1e-2).solve(op, b)
        assert solution.result == Result.SUCCESS
        assert 1e-4 < solution.residual_norm <= 1e-2
        assert kind(60, rtol=0.0, atol=2 * float(b.norm())).solve(op, b).num_steps == 0


@pytest.mark.parametrize("check_every", CHECKS)
def test_cg_stops_at_negative_curvature_with_its_last_good_iterate(check_every):
    A = torch.diag(torch.tensor([3.0, 2.0, 1.0, -1e-3], dtype=DOUBLE))
    b = torch.tensor([1.0, 1.0, 1.0, 1e-3], dtype=DOUBLE)
    op = Matrix(A, symmetric=True)
    solution = CG(20, check_every=check_every, rtol=1e-12).solve(op, b)
    assert solution.result == Result.NEGATIVE_CURVATURE
    steps = int(solution.num_steps)
    assert 1 <= steps < 4
    before = CG(steps, check_every=check_every, rtol=1e-12).solve(op, b)
    assert before.result == Result.MAX_STEPS
    assert torch.equal(solution.x, before.x)
    torch.testing.assert_close(solution.residual_norm, (b - A @ solution.x).norm(), rtol=1e-9, atol=0.0)


@pytest.mark.parametrize("check_every", CHECKS)
@pytest.mark.parametrize("curvature", [-1.0, 0.0])
def test_cg_at_once_negative_or_zero_curvature(check_every, curvature):
    op = Matrix(curvature * torch.eye(3, dtype=DOUBLE), symmetric=True)
    x0 = torch.full((3,), 0.25, dtype=DOUBLE)
    for start in (None, x0):
        solution = CG(4, check_every=check_every).solve(op, torch.ones(3, dtype=DOUBLE), x0=start)
        assert solution.result == Result.NEGATIVE_CURVATURE
        assert solution.num_steps == 0
        assert torch.equal(solution.x, torch.zeros(3, dtype=DOUBLE) if start is None else x0)


def test_cg_solves_a_singular_system_that_has_a_solution():
    A = torch.diag(torch.tensor([1.0, 2.0, 0.0], dtype=DOUBLE))
    solution = CG(10).solve(Matrix(A, symmetric=True), torch.tensor([1.0, 1.0, 0.0], dtype=DOUBLE))
    assert solution.result == Result.SUCCESS
    torch.testing.assert_close(solution.x, torch.tensor([1.0, 0.5, 0.0], dtype=DOUBLE))


def test_neumann_reports_divergence():
    op, b, _ = system(6, 10.0)
    for terms in (10, 5000):  # the second overflows
        solution = Neumann(terms, step_size=3.0).solve(op, b)
        assert solution.result == Result.DIVERGED
        assert solution.x.isfinite().all()
    indefinite = system(6, 10.0, "indefinite")[0]
    assert Neumann(50).solve(indefinite, b).result == Result.DIVERGED


def test_nystrom_reports_negative_eigenvalues():
    op, b, _ = system(6, 10.0, "indefinite")
    solution = Nystrom(6).solve(op, b)
    assert solution.result == Result.NEGATIVE_CURVATURE
    assert solution.x.isfinite().all()


SINGULAR = [
    torch.zeros(2, 2),
    torch.tensor([[1.0, 2.0], [2.0, 4.0]]),
    torch.tensor([[0.1, 0.3], [0.3, 0.9]], dtype=DOUBLE),
    matrix(5, 10.0)[:, :3] @ matrix(5, 10.0)[:, :3].T,
]


@pytest.mark.parametrize(
    "solver", [Exact(), GMRES(20, rtol=1e-9), MINRES(20, rtol=1e-9), SciPy("minres", 20, rtol=1e-9)], ids=str
)
@pytest.mark.parametrize("A", SINGULAR)
def test_singular_systems(solver, A):
    A = A.to(DOUBLE)
    b = torch.linspace(1.0, 0.0, len(A), dtype=DOUBLE)
    solution = solver.solve(Matrix(A, symmetric=True), b)
    assert solution.result in (Result.SINGULAR, Result.MAX_STEPS)
    if len(A) == 2:
        assert solution.result == Result.SINGULAR
    assert solution.x.isfinite().all()


def test_gmres_on_a_shift_waits_for_the_last_step():
    n = 6
    shift = torch.roll(torch.eye(n, dtype=DOUBLE), 1, 0)
    b = torch.zeros(n, dtype=DOUBLE)
    b[0] = 1.0
    solution = GMRES(n).solve(Matrix(shift), b)
    assert solution.result == Result.SUCCESS and solution.num_steps == n
    assert relative_error(solution.x, shift.T @ b) < 1e-14
    short = GMRES(n - 1).solve(Matrix(shift), b)
    assert short.result == Result.MAX_STEPS and short.residual_norm == 1.0


def test_gmres_ends_early_in_an_invariant_space():
    A = torch.diag(torch.tensor([1.0, 1.0, 3.0, 3.0, 3.0], dtype=DOUBLE))
    b = torch.ones(5, dtype=DOUBLE)
    for check in CHECKS:
        solution = GMRES(12, rtol=0.0, check_every=check).solve(Matrix(A), b)
        assert solution.result == Result.SUCCESS and solution.num_steps == 2
        assert relative_error(solution.x, b / A.diagonal()) < 1e-14


def test_exact_scales_with_the_matrix():
    op, b, x = system(8, 1e8, "nonsymmetric")
    for scale in (1e-100, 1e100):
        solution = Exact().solve(Matrix(op.dense * scale), b * scale)
        assert solution.result == Result.SUCCESS
        assert relative_error(solution.x, x) < 1e-6  # the condition number times eps, with room


def test_scipy_reports_max_steps():
    op, b, _ = system(60, 1e5)
    for name in ("cg", "gmres", "bicgstab"):
        solution = SciPy(name, max_steps=3, rtol=1e-10).solve(op, b)
        assert solution.result == Result.MAX_STEPS
        assert solution.num_steps == 3


@pytest.mark.parametrize("eigenvalues", [[1.0, 2.0, 0.0], [1.0, 1e-6, 1e-12], [0.0, 0.0, 0.0]])
def test_scipy_minres_does_not_call_a_residual_solved(eigenvalues):
    b = torch.ones(3, dtype=DOUBLE)
    solution = SciPy("minres", rtol=1e-10).solve(Matrix(torch.tensor(eigenvalues).to(DOUBLE).diag(), symmetric=True), b)
    assert solution.residual_norm > 0.1 and solution.result == Result.SINGULAR


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("rtol", [1e-2, 1e-5, 1e-12])
def test_scipy_minres_solves_whatever_the_scale(rtol, dtype, scale):
    """Its own rule compares with norm(b) besides norm(A), and promises norm(A) norm(x) / norm(b) times rtol."""
    for n in (3, 60):
        op, b, _ = system(n, 10.0, "indefinite")
        op, b = Matrix(op.dense.to(dtype) * scale, symmetric=True), b.to(dtype)
        solution = SciPy("minres", 200, rtol=rtol).solve(op, b)
        assert solution.result == Result.SUCCESS
        assert solution.residual_norm <= 100 * max(rtol, torch.finfo(dtype).eps) * b.norm()


@pytest.mark.parametrize("solver", [Exact(), Nystrom(3), CG(5, preconditioner=NystromPreconditioner(2))], ids=str)
def test_no_unknowns(solver):
    op = Function(lambda v: v, lambda v: v, size=0, dtype=DOUBLE, device="cpu", symmetric=True, mm=torch.stack)
    solution = solver.solve(op, torch.zeros(0, dtype=DOUBLE))
    assert solution.x.shape == (0,) and solution.result == Result.SUCCESS
