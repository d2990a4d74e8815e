"""Directions of earlier solves as a preconditioner, against dense algebra."""

import pytest
import torch
from torch import Tensor

from hypergrad._result import Result
from hypergrad.operators import Function, Matrix
from hypergrad.solvers import CG
from hypergrad.solvers.recycling import Recycled, paired, solve_recycling


def system(n: int = 40, *, seed: int = 0, spread: float = 3.0) -> tuple[Tensor, Tensor]:
    """Return a positive definite matrix with eigenvalues from 1 to 10^spread, and a right-hand side."""
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return (q * torch.logspace(0, spread, n, dtype=torch.float64)) @ q.T, torch.randn(n, generator=generator).double()


def pairs_of(a: Tensor, directions: Tensor) -> Tensor:
    return torch.stack([torch.stack(paired(v, a @ v, reads=True)) for v in directions], 1)


def bfgs(pairs: Tensor, gamma: Tensor) -> Tensor:
    """Return the inverse Hessian that BFGS updates of gamma I by one pair after the other give."""
    n = pairs.shape[-1]
    h = gamma * torch.eye(n, dtype=pairs.dtype)
    for s, y in zip(*pairs, strict=True):
        rho = 1 / torch.dot(s, y)
        left = torch.eye(n, dtype=pairs.dtype) - rho * torch.outer(s, y)
        h = left @ h @ left.T + rho * torch.outer(s, s)
    return h


def dense(pairs: Tensor) -> Tensor:
    apply, products = Recycled(pairs).build(Matrix(torch.eye(pairs.shape[-1], dtype=pairs.dtype), symmetric=True))
    assert products == 0
    return torch.stack([apply(e) for e in torch.eye(pairs.shape[-1], dtype=pairs.dtype)], 1)


def test_it_is_the_inverse_that_updates_one_by_one_give() -> None:
    a, _ = system()
    directions = torch.randn(6, 40, generator=torch.Generator().manual_seed(1)).double()
    pairs = pairs_of(a, directions)
    gamma = pairs[0].square().sum(1).mean()
    m = dense(pairs)
    torch.testing.assert_close(m, bfgs(pairs, gamma), rtol=1e-9, atol=1e-9 * float(m.abs().max()))


def test_it_is_symmetric_positive_definite_though_the_matrix_has_moved_on() -> None:
    a, _ = system()
    moved, _ = system(seed=5)
    directions = torch.randn(8, 40, generator=torch.Generator().manual_seed(2)).double()
    m = dense(torch.cat([pairs_of(a, directions[:4]), pairs_of(moved, directions[4:])], 1))
    assert (m - m.T).norm() <= 1e-12 * m.norm()
    assert torch.linalg.eigvalsh(m).min() > 0


def test_rows_of_zeros_count_for_nothing() -> None:
    a, _ = system()
    pairs = pairs_of(a, torch.randn(3, 40, generator=torch.Generator().manual_seed(3)).double())
    padded = torch.cat([torch.zeros(2, 2, 40).double(), pairs[:, :1], torch.zeros(2, 1, 40).double(), pairs[:, 1:]], 1)
    torch.testing.assert_close(dense(padded), dense(pairs), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(dense(torch.zeros(2, 4, 40).double()), torch.eye(40).double())


def test_along_the_directions_of_one_solve_it_is_the_inverse() -> None:
    a, b = system(12, spread=2.0)
    _, state = solve_recycling(CG(5, rtol=0.0), Matrix(a, symmetric=True), b, None, 5)
    s, y = state[:-1].view(2, 5, 12)
    torch.testing.assert_close(y, s @ a, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(dense(state[:-1].view(2, 5, 12)) @ y.T, s.T, rtol=1e-7, atol=1e-9)


def test_the_same_matrix_again_takes_fewer_products_for_other_right_hand_sides() -> None:
    a, _ = system()
    solver, state = CG(200, rtol=1e-8), None
    cold, recycled = [], []
    for k in range(6):
        b = torch.randn(40, generator=torch.Generator().manual_seed(10 + k)).double()
        cold.append(int(solver.solve(Matrix(a, symmetric=True), b).num_products))
        solution, state = solve_recycling(solver, Matrix(a, symmetric=True), b, state, 32)
        recycled.append(int(solution.num_products))
        torch.testing.assert_close(solution.x, torch.linalg.solve(a, b), rtol=1e-5, atol=1e-7)
    assert recycled[0] == cold[0]
    assert sum(recycled[1:]) < 0.6 * sum(cold[1:])


def test_a_matrix_that_moves_slowly_is_solved_in_fewer_products_than_by_a_warm_start() -> None:
    a, b = system()
    drift, _ = system(seed=7, spread=0.0)
    drift = 0.02 * (drift + drift.T)
    solver, state, x = CG(200, rtol=1e-6), None, None
    warm, recycled = 0, 0
    for k in range(8):
        now = Matrix(a + k * drift, symmetric=True)
        solution, state = solve_recycling(solver, now, b + 0.05 * k * a[0], state, 16, warm_start=True)
        plain = solver.solve(now, b + 0.05 * k * a[0], x0=x)
        x = plain.x
        assert Result(int(solution.result)) is Result.SUCCESS
        torch.testing.assert_close(solution.x, x, rtol=1e-3, atol=1e-5)
        recycled, warm = recycled + int(solution.num_products), warm + int(plain.num_products)
    assert recycled < warm


@pytest.mark.parametrize("reads", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_directions_without_positive_curvature_are_not_kept(value: float, *, reads: bool) -> None:
    v = torch.tensor([1.0, 2.0])
    for kept in (*paired(v, value * v, reads=reads), *paired(torch.zeros(2), torch.zeros(2), reads=reads)):
        assert torch.equal(kept, torch.zeros(2))


def test_a_solve_that_fails_leaves_directions_that_serve() -> None:
    a, b = system(10, spread=1.0)
    solver = CG(20, rtol=1e-10)
    _, state = solve_recycling(solver, Matrix(a, symmetric=True), b, None, 4)

    def broken(v: Tensor) -> Tensor:
        return v * float("nan")

    nowhere = Function(broken, size=10, dtype=torch.float64, device="cpu", symmetric=True)
    failed, state = solve_recycling(solver, nowhere, b, state, 4)
    assert Result(int(failed.result)) is Result.NON_FINITE
    assert state.isfinite().all()
    again, _ = solve_recycling(solver, Matrix(a, symmetric=True), b, state, 4)
    assert Result(int(again.result)) is Result.SUCCESS


def test_batches_of_systems_are_solved_by_one_vmap() -> None:
    systems = [system(8, seed=k, spread=1.0) for k in range(3)]
    a, b = torch.stack([s[0] for s in systems]), torch.stack([s[1] for s in systems])
    solver = CG(8, rtol=0.0, check_every=None)

    def twice(a: Tensor, b: Tensor) -> Tensor:
        op = Matrix(a, symmetric=True)
        _, state = solve_recycling(solver, op, b, None, 3)
        return solve_recycling(solver, op, 2 * b, state, 3)[0].x

    found = torch.vmap(twice)(a, b)
    for k in range(3):
        torch.testing.assert_close(found[k], twice(a[k], b[k]), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found[k], torch.linalg.solve(a[k], 2 * b[k]), rtol=1e-6, atol=1e-8)
