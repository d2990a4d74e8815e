"""Every method and solver that claims to be exact equals the closed form or the dense solve."""

from __future__ import annotations

import dataclasses
from functools import cache

import pytest
import torch

import hypergrad as hg
from hypergrad.testing import KnownProblem, logistic, quadratic, relative_error, ridge, tanh_network

MAKERS = {
    "quadratic": lambda: quadratic(6),
    "odd-quadratic": lambda: quadratic(7, 3, 30.0, seed=1),
    "ridge": ridge,
    "logistic": logistic,
    "tanh": tanh_network,
}
WELL_CONDITIONED = ("quadratic", "ridge", "logistic")

SOLVERS = {
    "CG": lambda p: hg.CG(300, rtol=1e-14),
    "CG-Hutchinson": lambda p: hg.CG(300, rtol=1e-14, preconditioner=hg.HutchinsonDiagonal()),
    "CG-Nystrom": lambda p: hg.CG(300, rtol=1e-14, preconditioner=hg.NystromPreconditioner(3, damping=0.1)),
    "Neumann": lambda p: hg.Neumann(int(25 * p.largest / p.smallest), step_size=1 / p.largest),
    "Neumann-estimated": lambda p: hg.Neumann(int(30 * p.largest / p.smallest)),
    "Nystrom": lambda p: hg.Nystrom(rank=size_of(p), damping=1e-12),
    "MINRES": lambda p: hg.MINRES(300, rtol=1e-13),
    "GMRES": lambda p: hg.GMRES(100, rtol=1e-13),
    "GMRES-restarted": lambda p: hg.GMRES(2000, restart=5, rtol=1e-12),
    "Exact": lambda p: hg.Exact(),
    "SciPy-cg": lambda p: hg.SciPy("cg", 300, rtol=1e-13),
    "SciPy-minres": lambda p: hg.SciPy("minres", 300, rtol=1e-13),
    "SciPy-gmres": lambda p: hg.SciPy("gmres", 300, rtol=1e-13),
    "SciPy-lgmres": lambda p: hg.SciPy("lgmres", 300, rtol=1e-13),
    "SciPy-bicgstab": lambda p: hg.SciPy("bicgstab", 300, rtol=1e-13),
}


@cache
def problem(name: str) -> KnownProblem:
    return MAKERS[name]()


def size_of(p: KnownProblem) -> int:
    return sum(w.numel() for w in p.lower.values())


def error(p: KnownProblem, trajectory: hg.Trajectory, method: hg.Method) -> float:
    h = hg.hypergradient(p.upper_loss, trajectory, p.upper, method=method)
    assert not hg.Result(h.result).is_breakdown
    assert torch.equal(h.value, p.upper_loss(trajectory.end, p.upper, None))
    return relative_error(h.grad, p.truth())


def solved(p: KnownProblem) -> hg.Trajectory:
    return hg.solved(p.lower_loss, p.solved_at())


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_implicit_equals_the_truth(name: str, solver: str) -> None:
    p = problem(name)
    assert error(p, solved(p), hg.Implicit(SOLVERS[solver](p))) < 1e-8


@pytest.mark.parametrize("name", MAKERS)
def test_the_solution_is_as_stationary_as_claimed(name: str) -> None:
    p = problem(name)
    h = hg.hypergradient(p.upper_loss, solved(p), p.upper, method=hg.Implicit(hg.Exact()))
    assert h.stats.stationarity < 1e-12


@pytest.mark.parametrize("name", WELL_CONDITIONED)
@pytest.mark.parametrize("method", [hg.Unrolled(), hg.Unrolled(checkpoint="sqrt", retain=0.1)], ids=str)
def test_unrolled_converges_to_the_truth(name: str, method: hg.Unrolled) -> None:
    p = problem(name)
    steps = int(24 * p.largest / p.smallest)
    sgd = hg.optim.SGD(lr=1 / p.largest)
    run = hg.descend(
        p.lower_loss,
        p.lower,
        p.upper,
        optimizer=sgd,
        batches=[None] * steps,
        recording=method.recording(steps),
    )
    assert error(p, run, method) < 1e-8
    assert error(p, run, hg.Implicit(hg.Exact())) < 1e-8


def test_forward_unrolled_converges_to_the_truth() -> None:
    p = quadratic(4, 2, 4.0)
    run = hg.descend(p.lower_loss, p.lower, p.upper, optimizer=hg.optim.SGD(lr=1.0), batches=[None] * 90)
    assert error(p, run, hg.ForwardUnrolled()) < 1e-8


@pytest.mark.parametrize("name", WELL_CONDITIONED)
def test_unrolled_from_a_converged_start(name: str) -> None:
    p = problem(name)
    run = hg.descend(
        p.lower_loss,
        p.solved_at(),
        p.upper,
        optimizer=hg.optim.SGD(lr=1 / p.largest),
        batches=[None] * int(24 * p.largest / p.smallest),
    )
    assert error(p, run, hg.Unrolled()) < 1e-8


@pytest.mark.parametrize(
    ("solver", "condition", "bound"),
    [
        (hg.Exact(), 1e6, 1e-8),
        (hg.CG(3000, rtol=1e-14), 1e6, 1e-8),
        (hg.GMRES(100, rtol=1e-14), 1e6, 1e-8),
        (hg.MINRES(3000, rtol=1e-14), 1e6, 1e-6),
        (hg.Nystrom(rank=60, damping=1e-16), 1e6, 1e-6),
        (hg.SciPy("gmres", 600, rtol=1e-14), 1e4, 1e-8),
        (hg.SciPy("cg", 3000, rtol=1e-14), 1e6, 1e-8),
        (hg.SciPy("minres", 3000, rtol=1e-16), 1e6, 1e-6),
        (hg.Neumann(2500, step_size=1.0), 1e2, 1e-6),
        (hg.Neumann(2500), 1e2, 1e-6),
    ],
    ids=lambda value: str(value)[:40],
)
def test_conditioning(solver: hg.Solver, condition: float, bound: float) -> None:
    p = quadratic(60, 5, condition, seed=3)
    assert error(p, solved(p), hg.Implicit(solver)) < bound


@pytest.mark.parametrize("condition", [1e1, 1e2, 1e4])
@pytest.mark.parametrize("solver", [hg.Exact(), hg.CG(3000, rtol=1e-14), hg.GMRES(100, rtol=1e-14)], ids=repr)
def test_finite_differences_of_the_solved_problem(solver: hg.Solver, condition: float) -> None:
    p = quadratic(20, 3, condition, seed=3)
    h = hg.hypergradient(p.upper_loss, solved(p), p.upper, method=hg.Implicit(solver))

    def value(name: str, index: int, shift: float) -> float:
        moved = {key: u.clone() for key, u in p.upper.items()}
        moved[name].view(-1)[index] += shift
        return float(p.upper_loss(p.solved_at(moved), moved, None))

    epsilon = 1e-5
    expected = {
        name: torch.tensor(
            [(value(name, i, epsilon) - value(name, i, -epsilon)) / (2 * epsilon) for i in range(u.numel())],
            dtype=u.dtype,
        ).view(u.shape)
        for name, u in p.upper.items()
    }
    assert relative_error(h.grad, expected) < 1e-6


def test_unrolled_at_condition_100() -> None:
    p = quadratic(10, 5, 100.0, seed=3)
    run = hg.descend(p.lower_loss, p.lower, p.upper, optimizer=hg.optim.SGD(lr=1.0), batches=[None] * 2400)
    assert error(p, run, hg.Unrolled()) < 1e-8


@pytest.mark.parametrize("size", [1, 2, 3, 16, 101, 300])
@pytest.mark.parametrize(
    "solver",
    [
        hg.Exact(),
        hg.CG(300, rtol=1e-13),
        hg.MINRES(300, rtol=1e-13),
        hg.GMRES(300, rtol=1e-13),
        hg.Nystrom(300, damping=1e-13),
        hg.SciPy("cg", 300, rtol=1e-13),
        hg.Neumann(250, step_size=1.0),
    ],
    ids=lambda solver: type(solver).__name__,
)
def test_dimensions(size: int, solver: hg.Solver) -> None:
    p = quadratic(size, 2, 10.0, seed=size)
    assert error(p, solved(p), hg.Implicit(solver)) < 1e-8


METHODS = {
    **{f"Implicit({name})": lambda p, make=make: hg.Implicit(make(p)) for name, make in SOLVERS.items()},
    "Unrolled": lambda p: hg.Unrolled(),
    "ForwardUnrolled": lambda p: hg.ForwardUnrolled(),
    "OneStep": lambda p: hg.OneStep(),
    "FiniteDifference": lambda p: hg.FiniteDifference(),
    "SAMA": lambda p: hg.SAMA(),
    "Penalty": lambda p: hg.Penalty(5.0, steps=3),
}


@pytest.mark.parametrize("name", METHODS)
def test_an_upper_loss_that_does_not_read_the_lower_level(name: str) -> None:
    """A zero right-hand side: what remains is the direct term, and no solve breaks down."""
    p = problem("quadratic")
    run = hg.descend(p.lower_loss, p.solved_at(), p.upper, optimizer=hg.optim.SGD(lr=0.5), batches=[None] * 2)
    h = hg.hypergradient(lambda w, u, b: (u["v"] ** 3).sum(), run, p.upper, method=METHODS[name](p))
    direct = {"v": 3 * p.upper["v"] ** 2, "s": torch.zeros_like(p.upper["s"])}
    assert h.result == hg.Result.SUCCESS
    assert relative_error(h.grad, direct) < (1e-8 if name == "Penalty" else 1e-15)


@pytest.mark.parametrize("name", METHODS)
def test_a_lower_loss_whose_mixed_derivative_is_zero(name: str) -> None:
    """The solution does not move with `upper`, which the lower loss reads all the same."""
    p = problem("quadratic")

    def lower_loss(w, u, b):
        return 0.5 * (w["weight"] ** 2 * torch.arange(1.0, 3.0, dtype=torch.float64)).sum() + (u["v"] ** 2).sum()

    lower = {"weight": torch.zeros_like(p.lower["weight"])}
    known = dataclasses.replace(p, lower_loss=lower_loss, largest=2.0, smallest=1.0)
    run = hg.descend(lower_loss, lower, p.upper, optimizer=hg.optim.SGD(lr=0.5), batches=[None] * 2)
    h = hg.hypergradient(p.upper_loss, run, p.upper, method=METHODS[name](known))
    direct = torch.func.grad(lambda u: p.upper_loss(lower, u, None))(p.upper)
    if name == "Penalty":  # its direct term stands at the penalized solution, O(1 / strength) away
        assert relative_error(h.grad, direct) < 1.0
    else:
        assert relative_error(h.grad, direct) < 1e-14


@pytest.mark.parametrize("solver", [hg.CG(50, rtol=1e-9), hg.MINRES(50, rtol=1e-9), hg.GMRES(50, rtol=1e-9)])
def test_a_warm_start_at_the_solution_takes_no_step(solver: hg.Solver) -> None:
    p = problem("logistic")
    method = hg.Implicit(solver, warm_start=True)
    first = hg.hypergradient(p.upper_loss, solved(p), p.upper, method=method)
    again = hg.hypergradient(p.upper_loss, solved(p), p.upper, method=method, state=first.state)
    assert first.stats.num_steps > 0
    assert again.stats.num_steps == 0
    assert relative_error(again.grad, first.grad) < 1e-12


def test_damping_is_the_damped_system() -> None:
    p = problem("quadratic")
    w = torch.cat([x.reshape(-1) for x in p.solved_at().values()])
    hessian = torch.func.jacrev(torch.func.grad(lambda v: p.lower_loss({"weight": v.view(-1, 2)}, p.upper, None)))(w)
    cotangent = torch.func.grad(lambda v: p.upper_loss({"weight": v.view(-1, 2)}, p.upper, None))(w)
    x = torch.linalg.solve(hessian + 0.3 * torch.eye(6).double(), cotangent)

    def pairing(u):
        grad = torch.func.grad(lambda v: p.lower_loss({"weight": v.view(-1, 2)}, u, None))(w)
        return p.upper_loss({"weight": w.view(-1, 2)}, u, None) - grad @ x

    expected = torch.func.grad(pairing)(p.upper)
    for damping in (0.3, torch.tensor(0.3, dtype=torch.float64)):
        for solver in (hg.CG(50, rtol=1e-14), hg.Exact(), hg.GMRES(50, rtol=1e-14)):
            method = hg.Implicit(solver, damping=damping)
            h = hg.hypergradient(p.upper_loss, solved(p), p.upper, method=method)
            assert relative_error(h.grad, expected) < 1e-10
