"""Biased methods equal their own formula, and the truth in the limit that the theory names."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import hypergrad as hg
from hypergrad.testing import KnownProblem, logistic, quadratic, relative_error, ridge

Params = dict[str, Tensor]


class Flat:
    """A known problem's derivatives at one lower point, densely, with w as one vector."""

    def __init__(self, p: KnownProblem, at: Params) -> None:
        self.p, self.shape = p, next(iter(at.values())).shape
        (self.name,) = at
        self.w = at[self.name].reshape(-1)

    def named(self, w: Tensor) -> Params:
        return {self.name: w.view(self.shape)}

    def lower(self, w: Tensor, u: Params) -> Tensor:
        return self.p.lower_loss(self.named(w), u, None)

    def upper(self, w: Tensor, u: Params) -> Tensor:
        return self.p.upper_loss(self.named(w), u, None)

    @property
    def cotangent(self) -> Tensor:
        return torch.func.grad(self.upper)(self.w, self.p.upper)

    @property
    def hessian(self) -> Tensor:
        return torch.func.jacrev(torch.func.grad(self.lower))(self.w, self.p.upper)

    def total(self, x: Tensor) -> Params:
        """Return the direct derivative minus (d grad_w L / du)^T x."""

        def pairing(u: Params) -> Tensor:
            return self.upper(self.w, u) - torch.func.grad(self.lower)(self.w, u) @ x

        return torch.func.grad(pairing)(self.p.upper)


def run(p: KnownProblem, steps: int, optimizer: hg.optim.Optimizer, **options: object) -> hg.Trajectory:
    return hg.descend(p.lower_loss, p.lower, p.upper, optimizer=optimizer, batches=[None] * steps, **options)


def gradient(p: KnownProblem, trajectory: hg.Trajectory, method: hg.Method) -> Params:
    return hg.hypergradient(p.upper_loss, trajectory, p.upper, method=method).grad


PROBLEMS = [quadratic(6), ridge(), logistic()]


@pytest.mark.parametrize("p", PROBLEMS, ids=lambda p: p.name)
def test_one_step_is_its_formula(p: KnownProblem) -> None:
    trajectory = run(p, 7, hg.optim.SGD(lr=0.17))
    flat = Flat(p, trajectory.end)
    assert relative_error(gradient(p, trajectory, hg.OneStep()), flat.total(0.17 * flat.cotangent)) < 1e-8
    explicit = hg.OneStep(step_size=0.4)
    assert relative_error(gradient(p, trajectory, explicit), flat.total(0.4 * flat.cotangent)) < 1e-8
    solved = hg.solved(p.lower_loss, trajectory.end)
    assert relative_error(gradient(p, solved, explicit), flat.total(0.4 * flat.cotangent)) < 1e-8


def test_one_step_is_exact_where_the_hessian_is_a_multiple_of_the_identity() -> None:
    p = quadratic(6, condition=1.0)
    trajectory = hg.descend(p.lower_loss, p.solved_at(), p.upper, optimizer=hg.optim.SGD(lr=1.0), batches=[None])
    assert relative_error(gradient(p, trajectory, hg.OneStep()), p.truth()) < 1e-8


@pytest.mark.parametrize("p", PROBLEMS, ids=lambda p: p.name)
def test_finite_difference_is_its_formula(p: KnownProblem) -> None:
    trajectory = run(p, 7, hg.optim.SGD(lr=0.17))
    flat, epsilon = Flat(p, trajectory.end), 1e-2
    v = flat.cotangent

    def upper_slope(w: Tensor) -> Params:
        return torch.func.grad(lambda u: flat.lower(w, u))(p.upper)

    ahead, behind = (upper_slope(flat.w + sign * epsilon * v / v.norm()) for sign in (1, -1))
    direct = torch.func.grad(lambda u: flat.upper(flat.w, u))(p.upper)
    expected = {n: direct[n] - 0.17 * v.norm() * (ahead[n] - behind[n]) / (2 * epsilon) for n in direct}
    assert relative_error(gradient(p, trajectory, hg.FiniteDifference(epsilon)), expected) < 1e-8


CUBIC = KnownProblem(
    "cubic",
    lambda w, u, b: (w["w"] ** 4 * u["a"].exp()).sum() + (torch.sin(w["w"]) * u["b"] ** 2).sum() + (w["w"] ** 2).sum(),
    lambda w, u, b: ((w["w"] - 1.0) ** 2).sum() + (u["a"] * u["b"]).sum(),
    {"w": torch.tensor([0.4, -0.3, 0.2], dtype=torch.float64)},
    {"a": torch.tensor([-1.0, 0.2, 0.1], dtype=torch.float64), "b": torch.tensor(0.7, dtype=torch.float64)},
    lambda u: {},
    1.0,
    1.0,
)


def order(errors: list[float], sizes: list[float]) -> float:
    """Return the slope of log error against log size, between the ends."""
    return math.log(errors[0] / errors[-1]) / math.log(sizes[0] / sizes[-1])


def test_finite_difference_converges_to_one_step_as_epsilon_squared() -> None:
    trajectory = run(CUBIC, 3, hg.optim.SGD(lr=0.05))
    limit = gradient(CUBIC, trajectory, hg.OneStep())
    sizes = [0.2, 0.1, 0.05, 0.025]
    errors = [relative_error(gradient(CUBIC, trajectory, hg.FiniteDifference(e)), limit) for e in sizes]
    assert errors[-1] > 1e-9
    for k in range(3):
        assert 1.9 < order(errors[k : k + 2], sizes[k : k + 2]) < 2.1


@pytest.mark.parametrize(
    "optimizer",
    [
        hg.optim.SGD(lr=0.1),
        hg.optim.SGD(lr=0.1, momentum=0.9, dampening=0.3),
        hg.optim.Adam(lr=0.1),
        hg.optim.RMSprop(lr=0.1, centered=True),
        hg.optim.Adagrad(lr=0.1),
        hg.optim.AdamW(lr=0.1, weight_decay=0.1),
        hg.optim.Adadelta(lr=0.5),
        hg.optim.NAdam(lr=0.1),
    ],
    ids=lambda o: type(o).__name__,
)
def test_sama_is_its_formula(optimizer: hg.optim.Optimizer) -> None:
    """p is the vjp of the last update in its gradient, from the state before it; the mixed product is at the end."""
    p = logistic()
    before, epsilon = run(p, 4, optimizer), 1e-3
    trajectory = run(p, 5, optimizer)
    flat, start = Flat(p, trajectory.end), before.end_flat
    slope = torch.func.grad(flat.lower)(start, p.upper)
    jacobian = torch.func.jacrev(lambda g: optimizer.update(start, g, before.state[0])[0])(slope)
    direction = jacobian.T @ flat.cotangent

    def upper_slope(w: Tensor) -> Params:
        return torch.func.grad(lambda u: flat.lower(w, u))(p.upper)

    size = direction.norm()
    ahead, behind = (upper_slope(flat.w + sign * epsilon * direction / size) for sign in (1, -1))
    direct = torch.func.grad(lambda u: flat.upper(flat.w, u))(p.upper)
    expected = {n: direct[n] + size * (ahead[n] - behind[n]) / (2 * epsilon) for n in direct}
    assert relative_error(gradient(p, trajectory, hg.SAMA(epsilon)), expected) < 1e-8


def test_sama_under_plain_sgd_is_finite_difference() -> None:
    p = ridge()
    trajectory = run(p, 5, hg.optim.SGD(lr=0.2))
    first, second = (gradient(p, trajectory, m) for m in (hg.SAMA(1e-3), hg.FiniteDifference(1e-3)))
    assert relative_error(first, second) < 1e-10


@pytest.mark.parametrize("p", PROBLEMS, ids=lambda p: p.name)
@pytest.mark.parametrize("num_terms", [1, 2, 5, 20])
def test_neumann_is_its_formula(p: KnownProblem, num_terms: int) -> None:
    flat, step = Flat(p, p.solved_at()), 0.3
    eye = torch.eye(len(flat.w)).double()
    series = sum(torch.linalg.matrix_power(eye - step * flat.hessian, k) for k in range(num_terms))
    method = hg.Implicit(hg.Neumann(num_terms, step_size=step))
    solved = hg.solved(p.lower_loss, p.solved_at())
    assert relative_error(gradient(p, solved, method), flat.total(step * series @ flat.cotangent)) < 1e-8


def test_neumann_converges_geometrically_in_its_terms() -> None:
    p = quadratic(6, condition=10.0)
    solved = hg.solved(p.lower_loss, p.solved_at())
    errors = [
        relative_error(gradient(p, solved, hg.Implicit(hg.Neumann(k, step_size=1.0))), p.truth())
        for k in (100, 120, 140)
    ]
    for early, late in zip(errors, errors[1:], strict=False):
        assert late / early == pytest.approx(0.9**20, rel=0.08)


def test_unrolled_converges_at_the_rate_of_the_run() -> None:
    p = quadratic(6, condition=10.0)
    errors = [
        relative_error(gradient(p, run(p, k, hg.optim.SGD(lr=1.0)), hg.Unrolled()), p.truth()) for k in (150, 170, 190)
    ]
    for early, late in zip(errors, errors[1:], strict=False):
        assert late / early == pytest.approx(0.9**20, rel=0.08)


@pytest.mark.parametrize("truncate", [0, 1, 3, 9, 20])
def test_truncated_unrolling_from_the_solution_is_a_neumann_series(truncate: int) -> None:
    p = quadratic(6)
    trajectory = hg.descend(p.lower_loss, p.solved_at(), p.upper, optimizer=hg.optim.SGD(lr=0.3), batches=[None] * 9)
    flat, terms = Flat(p, p.solved_at()), min(truncate, 9)
    eye = torch.eye(6).double()
    series = sum(
        (torch.linalg.matrix_power(eye - 0.3 * flat.hessian, k) for k in range(terms)), torch.zeros(6, 6).double()
    )
    expected = flat.total(0.3 * series @ flat.cotangent)
    if truncate > 0:
        assert relative_error(gradient(p, trajectory, hg.Unrolled(truncate=truncate)), expected) < 1e-8
    else:
        h = hg.hypergradient(p.upper_loss, trajectory, p.upper, method=hg.Unrolled(truncate=0))
        assert relative_error(h.grad, expected) < 1e-8


def test_penalty_is_its_formula() -> None:
    p, strength = logistic(), 3.0
    trajectory = run(p, 5, hg.optim.SGD(lr=0.5))
    flat = Flat(p, trajectory.end)
    w = flat.w
    for _ in range(4):
        w = w - 0.2 * torch.func.grad(lambda x: flat.upper(x, p.upper) / strength + flat.lower(x, p.upper))(w)
    expected = torch.func.grad(
        lambda u: flat.upper(w, u) + strength * (flat.lower(w, u) - flat.lower(flat.w, u)), argnums=0
    )(p.upper)
    method = hg.Penalty(strength, optimizer=hg.optim.SGD(lr=0.2), steps=4)
    h = hg.hypergradient(p.upper_loss, trajectory, p.upper, method=method)
    assert relative_error(h.grad, expected) < 1e-8
    assert torch.equal(h.value, p.upper_loss(trajectory.end, p.upper, None))


@pytest.mark.parametrize("p", [quadratic(5, 3, 3.0), ridge(num_columns=3)], ids=lambda p: p.name)
def test_penalty_converges_to_the_truth_as_one_over_its_strength(p: KnownProblem) -> None:
    sizes = [1e1, 1e2, 1e3, 1e4]
    errors = []
    for strength in sizes:
        method = hg.Penalty(strength, optimizer=hg.optim.SGD(lr=0.9 / p.largest), steps=300)
        errors.append(relative_error(gradient(p, hg.solved(p.lower_loss, p.solved_at()), method), p.truth()))
    for k in range(1, 3):
        assert -1.1 < order(errors[k : k + 2], sizes[k : k + 2]) < -0.9


def test_nystrom_converges_to_the_truth_with_its_damping() -> None:
    p = quadratic(6)
    sizes = [1e-3, 1e-4, 1e-5]
    solved = hg.solved(p.lower_loss, p.solved_at())
    errors = [relative_error(gradient(p, solved, hg.Implicit(hg.Nystrom(rank=6, damping=s))), p.truth()) for s in sizes]
    assert 0.95 < order(errors, sizes) < 1.05


def test_damping_converges_to_the_truth() -> None:
    p = quadratic(6)
    sizes = [1e-3, 1e-4, 1e-5]
    solved = hg.solved(p.lower_loss, p.solved_at())
    errors = [relative_error(gradient(p, solved, hg.Implicit(hg.Exact(), damping=s)), p.truth()) for s in sizes]
    assert 0.95 < order(errors, sizes) < 1.05
