"""Preconditioners: what they approximate, and the steps they save."""

from __future__ import annotations

import math

import pytest
import torch
from linear_systems import DOUBLE, Counting, matrix, relative_error, system

import hypergrad as hg
from hypergrad._result import Result
from hypergrad.operators import Damped, Function, Matrix, dense
from hypergrad.solvers import CG, HutchinsonDiagonal, NystromPreconditioner, PenaltyPreconditioner, SecondMoment
from hypergrad.stationarity import linearize


def ill_scaled(n=80):
    """A matrix that its diagonal dominates, with entries over six orders of magnitude."""
    scale = torch.logspace(-1.5, 1.5, n, dtype=DOUBLE)
    A = torch.eye(n, dtype=DOUBLE) + 0.1 * matrix(n, 10.0, "indefinite")
    return scale[:, None] * A * scale


@pytest.mark.parametrize("preconditioner", [HutchinsonDiagonal(8), HutchinsonDiagonal(1, seed=5)])
def test_hutchinson_saves_steps(preconditioner):
    A = ill_scaled()
    x = torch.ones(80, dtype=DOUBLE)
    b = A @ x
    plain = CG(2000, rtol=1e-10).solve(Matrix(A, symmetric=True), b)
    counting = Counting(Matrix(A, symmetric=True))
    better = CG(2000, rtol=1e-10, preconditioner=preconditioner).solve(counting, b)
    assert plain.result == better.result == Result.SUCCESS
    assert better.num_steps < plain.num_steps / 5
    assert better.num_products == counting.products == better.num_steps + preconditioner.num_probes
    # the test of convergence is on the residual itself
    assert (b - A @ better.x).norm() <= 1.01e-10 * b.norm()


def test_hutchinson_is_the_diagonal():
    values = torch.tensor([1.0, -4.0, 1e3, 1e-9], dtype=DOUBLE)
    apply, products = HutchinsonDiagonal(3, floor=1e-5).build(Matrix(torch.diag(values)))
    expected = torch.tensor([1.0, 4.0, 1e3, 1e-2], dtype=DOUBLE)  # the last is at the floor
    torch.testing.assert_close(apply(torch.ones(4, dtype=DOUBLE)), 1 / expected)
    assert products == 3
    A = matrix(30, 10.0)
    apply, _ = HutchinsonDiagonal(4000).build(Matrix(A))
    estimate = 1 / apply(torch.ones(30, dtype=DOUBLE))
    # five standard deviations of the mean of 4000 probes
    assert ((estimate - A.diagonal()).abs() < 5 * A.norm(dim=1) / 4000**0.5).all()


def test_hutchinson_of_the_zero_operator():
    apply, _ = HutchinsonDiagonal(2).build(Matrix(torch.zeros(3, 3)))
    assert apply(torch.ones(3)).isfinite().all()


def test_second_moment():
    A = torch.diag(torch.logspace(-3, 3, 20, dtype=DOUBLE)) + 1e-5 * matrix(20, 10.0)
    x = torch.ones(20, dtype=DOUBLE)
    op = Function(lambda v: A @ v, size=20, dtype=DOUBLE, device="cpu", symmetric=True, second_moment=A.diagonal() ** 2)
    b = A @ x
    plain = CG(500, rtol=1e-10).solve(op, b)
    better = CG(500, rtol=1e-10, preconditioner=SecondMoment(eps=1e-12)).solve(op, b)
    assert better.num_steps < plain.num_steps / 2
    assert relative_error(better.x, x) < 1e-6
    assert better.num_products == better.num_steps
    apply, _ = SecondMoment(power=1.0, eps=0.5).build(op)
    torch.testing.assert_close(apply(x), 1 / (A.diagonal() ** 2 + 0.5))


@pytest.mark.parametrize("damping", [None, 1e-3])
def test_nystrom_preconditioner_saves_steps(damping):
    # 15 large eigenvalues over a flat floor of 1e-3: the case it is made for.
    basis = matrix(100, 1.0)
    values = torch.cat([torch.logspace(3, 0, 15, dtype=DOUBLE), torch.zeros(85, dtype=DOUBLE)])
    Q = torch.linalg.qr(torch.randn(100, 100, dtype=DOUBLE, generator=torch.Generator().manual_seed(0)))[0]
    A = Q @ torch.diag(values) @ Q.T + 1e-3 * basis
    x = torch.linspace(1, 2, 100, dtype=DOUBLE)
    op = Matrix((A + A.T) / 2, symmetric=True)
    b = op.mv(x)
    plain = CG(500, rtol=1e-10).solve(op, b)
    better = CG(500, rtol=1e-10, preconditioner=NystromPreconditioner(20, damping=damping)).solve(op, b)
    assert better.result == Result.SUCCESS
    assert better.num_steps < plain.num_steps / 2
    assert better.num_products == better.num_steps + 20
    assert relative_error(better.x, x) < 1e-3  # the residual's tolerance times the condition number, at worst


def test_nystrom_preconditioner_of_full_rank_is_the_inverse():
    op, b, x = system(12, 1e3)
    apply, products = NystromPreconditioner(12).build(op)
    assert relative_error(apply(b), x) < 1e-10
    assert products == 12
    assert CG(5, rtol=1e-8, preconditioner=NystromPreconditioner(12)).solve(op, b).num_steps == 1


def test_nystrom_preconditioner_of_an_indefinite_operator_is_the_identity():
    op, b, _ = system(6, 10.0, "indefinite")
    apply, _ = NystromPreconditioner(6).build(op)
    assert torch.equal(apply(b), b)


@pytest.mark.parametrize("kind", [HutchinsonDiagonal(), NystromPreconditioner(3)])
def test_preconditioned_cg_reports_negative_curvature(kind):
    op, b, _ = system(6, 10.0, "indefinite")
    assert CG(20, rtol=1e-12, preconditioner=kind).solve(op, b).result == Result.NEGATIVE_CURVATURE


def regression():
    """Return logistic regression with one penalty a weight over four orders of magnitude, at its solution."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(200, 60, dtype=DOUBLE, generator=generator) * torch.logspace(0, -2, 60, dtype=DOUBLE)
    y = (X.sum(1) > 0).to(DOUBLE)
    upper = {"penalty": torch.linspace(-9, 0, 60, dtype=DOUBLE)}
    loss = hg.Composite(
        outputs=lambda lower, upper, batch: X @ lower["w"],
        criterion=lambda z, batch: torch.nn.functional.binary_cross_entropy_with_logits(z, y),
        penalty=lambda lower, upper: 0.5 * (upper["penalty"].exp() * lower["w"] ** 2).sum(),
    )
    w = torch.zeros(60, dtype=DOUBLE)
    for _ in range(30):
        lin = linearize(hg.solved(loss, {"w": w}), upper)
        w = w - torch.linalg.solve(dense(lin.operator), lin.value)
    return loss, {"w": w}, upper


def test_penalty_preconditioner_saves_steps_and_keeps_the_hypergradient():
    loss, lower, upper = regression()
    traj = hg.solved(loss, lower)

    def upper_loss(lower, upper, batch):
        return (lower["w"] - 1).square().sum()

    def found(preconditioner):
        method = hg.Implicit(hg.CG(500, rtol=1e-12, preconditioner=preconditioner))
        return hg.hypergradient(upper_loss, traj, upper, method=method)

    truth = hg.hypergradient(upper_loss, traj, upper, method=hg.Implicit(hg.Exact())).grad["penalty"]
    plain, spread, sketched = found(None), found(PenaltyPreconditioner()), found(PenaltyPreconditioner(rank=15))
    for h in (plain, spread, sketched):
        assert relative_error(h.grad["penalty"], truth) < 1e-8
    assert spread.stats.num_products < plain.stats.num_products / 1.5
    assert sketched.stats.num_steps < spread.stats.num_steps / 1.5
    assert sketched.stats.num_products == sketched.stats.num_steps + 15


def test_penalty_preconditioner_knows_penalty_decay_and_damping():
    loss, lower, upper = regression()
    penalties = upper["penalty"].exp()
    run = hg.descend(loss, lower, upper, optimizer=hg.optim.SGD(lr=0.1, weight_decay=0.5), batches=[None])
    for curvature in ("hessian", "gauss_newton"):
        known = linearize(hg.solved(loss, lower), upper, curvature=curvature).operator.known_diagonal()
        torch.testing.assert_close(known, penalties)
        known = linearize(run, upper, curvature=curvature).operator.known_diagonal()
        torch.testing.assert_close(known, penalties + 0.5)
    plain = hg.descend(loss.__call__, lower, upper, optimizer=hg.optim.SGD(lr=0.1), batches=[None])
    operator = linearize(plain, upper).operator
    assert operator.known_diagonal() is None
    torch.testing.assert_close(Damped(operator, 0.25).known_diagonal(), torch.full((60,), 0.25, dtype=DOUBLE))
    assert Damped(operator, 0.0).known_diagonal() is None
    with pytest.raises(ValueError, match=r"PenaltyPreconditioner needs a known part of the operator's diagonal"):
        PenaltyPreconditioner().build(operator)


def test_penalty_preconditioner_of_full_rank_is_the_inverse():
    loss, lower, upper = regression()
    operator = linearize(hg.solved(loss, lower), upper).operator
    apply, products = PenaltyPreconditioner(60).build(operator)
    x = torch.linspace(1, 2, 60, dtype=DOUBLE)
    assert products == 60
    assert relative_error(apply(operator.mv(x)), x) < 1e-6  # a shift of eps * norm, over the least penalty


def test_penalty_preconditioner_of_an_indefinite_rest_is_the_penalty_alone():
    op = Damped(Matrix(matrix(6, 10.0, "indefinite"), symmetric=True), 2.0)
    apply, _ = PenaltyPreconditioner(6).build(op)
    b = torch.ones(6, dtype=DOUBLE)
    torch.testing.assert_close(apply(b), b / 2)


def test_products_at_once_are_those_one_by_one():
    loss, lower, upper = regression()
    operator = linearize(hg.solved(loss, lower), upper).operator
    rows = torch.randn(70, 60, dtype=DOUBLE, generator=torch.Generator().manual_seed(3))
    one_by_one = torch.stack([operator.mv(row) for row in rows])
    torch.testing.assert_close(operator.mm(rows), one_by_one)
    torch.testing.assert_close(Damped(operator, 0.3).mm(rows), one_by_one + 0.3 * rows)


class Squared(torch.autograd.Function):
    """x^2, written so that it cannot be batched."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        assert math.isfinite(grad.detach().sum().item())  # a value is read, which a batched call refuses
        return 2 * x * grad


@pytest.mark.parametrize("kind", ["convolution", "custom function"])
def test_products_one_by_one_where_they_cannot_or_should_not_be_batched(kind):
    images = torch.randn(3, 1, 5, 5, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    w = torch.linspace(-1, 1, 9, dtype=DOUBLE)

    def loss(lower, upper, batch):
        if kind == "convolution":
            return torch.tanh(torch.conv2d(images, lower["w"].view(1, 1, 3, 3))).square().sum()
        return Squared.apply(Squared.apply(lower["w"])).sum()

    operator = linearize(hg.solved(loss, {"w": w}), {"u": torch.zeros(1, dtype=DOUBLE)}).operator
    rows = torch.eye(9, dtype=DOUBLE)
    torch.testing.assert_close(operator.mm(rows), torch.stack([operator.mv(row) for row in rows]))
