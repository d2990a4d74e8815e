"""A method and a solver written outside the package, in at most 30 lines each, keep the same contract."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import hypergrad as hg
from hypergrad.testing import check_method, check_solver, quadratic, relative_error


@dataclass(frozen=True)
class ScaledIdentity(hg.ResponseMethod):
    """The inverse Hessian taken to be `scale` times the identity; the mixed product by autograd."""

    scale: float = 1.0

    def recording(self, num_steps: int) -> hg.Recording:
        return hg.Recording(first=num_steps)

    def vjp(self, trajectory: hg.Trajectory, upper: Any, cotangent: Tensor, state: Any = None) -> hg.Pulled:
        (batch, _random), *_ = trajectory.samples(1)

        def pairing(u: Any) -> Tensor:
            slope = torch.func.grad(lambda w: trajectory.loss(trajectory.named(w), u, batch))(trajectory.end_flat)
            return -self.scale * torch.dot(slope, cotangent)

        return hg.Pulled(torch.func.grad(pairing)(upper))


@dataclass(frozen=True)
class Richardson(hg.Solver):
    """x <- x + step (b - A x), a fixed number of times."""

    num_steps: int = 200
    step: float = 1.0
    requires_symmetric: ClassVar[bool] = False
    uses_initial: ClassVar[bool] = True

    def solve(self, op: Any, b: Tensor, *, x0: Tensor | None = None) -> hg.Solution:
        if b.shape != (op.size,):
            raise ValueError(f"Richardson expects b of shape ({op.size},), got {tuple(b.shape)}.")
        x = torch.zeros_like(b) if x0 is None else x0
        for _ in range(self.num_steps):
            x = x + self.step * (b - op.mv(x))
        count = torch.full((), self.num_steps, dtype=torch.int64, device=b.device)
        residual = torch.linalg.vector_norm(b - op.mv(x))
        return hg.Solution(x, hg.Result.SUCCESS.tensor(b.device), count, count + 1, residual)


@pytest.mark.parametrize("kind", [ScaledIdentity, Richardson])
def test_they_are_short(kind: type) -> None:
    assert len(inspect.getsource(kind).splitlines()) <= 30


def test_the_method_keeps_the_contract_and_its_formula() -> None:
    check_method(ScaledIdentity(0.5))
    p = quadratic(6)
    run = hg.descend(p.lower_loss, p.lower, p.upper, optimizer=hg.optim.SGD(lr=0.5), batches=[None] * 3)
    ours = hg.hypergradient(p.upper_loss, run, p.upper, method=ScaledIdentity(0.5)).grad
    theirs = hg.hypergradient(p.upper_loss, run, p.upper, method=hg.OneStep(step_size=0.5)).grad
    assert relative_error(ours, theirs) < 1e-12


def test_its_best_response_is_differentiable_once() -> None:
    p = quadratic(6)
    run = hg.solved(p.lower_loss, p.solved_at())
    upper = {n: u.clone().requires_grad_() for n, u in p.upper.items()}
    p.upper_loss(hg.best_response(run, upper, method=ScaledIdentity()), upper, None).backward()
    expected = hg.hypergradient(p.upper_loss, run, p.upper, method=ScaledIdentity()).grad
    assert relative_error({n: u.grad for n, u in upper.items()}, expected) < 1e-12


def test_the_solver_keeps_the_contract_and_serves_every_method() -> None:
    check_solver(Richardson())
    check_method(hg.Implicit(Richardson(60)))
    p = quadratic(6)
    h = hg.hypergradient(
        p.upper_loss, hg.solved(p.lower_loss, p.solved_at()), p.upper, method=hg.Implicit(Richardson(300))
    )
    assert relative_error(h.grad, p.truth()) < 1e-8
