"""CG that reads its scalars, under no_grad on a CPU, says and returns what CG that masks does."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from linear_systems import system
from torch import Tensor

from hypergrad._result import Result
from hypergrad.operators import Function, Matrix, Operator
from hypergrad.solvers import CG, HutchinsonDiagonal, NystromPreconditioner

F64 = torch.float64


def diagonal(*entries: float) -> Matrix:
    return Matrix(torch.diag(torch.tensor(entries, dtype=F64)), symmetric=True)


def cases() -> dict[str, tuple[CG, Operator, Tensor, Tensor | None]]:
    op, b, _ = system(12, 1e2)
    ones = torch.ones(3, dtype=F64)
    huge = torch.full((3,), 1e300, dtype=F64)
    start = torch.linspace(-1, 1, 12, dtype=F64)
    return {
        "converges": (CG(50, rtol=1e-10), op, b, None),
        "stops early": (CG(3, rtol=1e-10), op, b, None),
        "absolute": (CG(50, rtol=0.0, atol=1e-3), op, b, None),
        "starts elsewhere": (CG(50, rtol=1e-10), op, b, start),
        "starts beyond use": (CG(50, rtol=1e-10), op, b, start / 0),
        "starts at the solution": (CG(5), diagonal(1, 2, 4), ones, torch.tensor([1.0, 0.5, 0.25], dtype=F64)),
        "diagonal": (CG(50, rtol=1e-10, preconditioner=HutchinsonDiagonal(4)), op, b, None),
        "sketched": (CG(50, rtol=1e-10, preconditioner=NystromPreconditioner(4)), op, b, start),
        "zero": (CG(5), op, torch.zeros_like(b), None),
        "zero from elsewhere": (CG(5), op, torch.zeros_like(b), start),
        "huge": (CG(50, rtol=1e-10), diagonal(1, 2, 4), huge, None),
        "overflows": (CG(50, rtol=1e-10), diagonal(1e-300, 1, 2), huge, None),
        "indefinite at once": (CG(5), diagonal(-1, -2, -4), ones, None),
        "indefinite later": (CG(5, rtol=1e-12), diagonal(4, 2, -1), ones, None),
        "singular": (CG(5), diagonal(0, 0, 0), ones, None),
        "not finite": (CG(5), diagonal(1, float("nan"), 1), ones, None),
        "infinite": (CG(5), diagonal(1, float("inf"), 1), ones, None),
        "right-hand side not finite": (CG(5), diagonal(1, 2, 4), ones / 0, None),
    }


@pytest.mark.parametrize("name", list(cases()))
def test_reading_and_masking_agree(name: str) -> None:
    solver, op, b, x0 = cases()[name]
    with torch.no_grad():
        read = solver.solve(op, b, x0=x0)
        masked = replace(solver, check_every=None).solve(op, b, x0=x0)
    assert Result(int(read.result)) is Result(int(masked.result))
    assert int(read.num_steps) == int(masked.num_steps)
    assert int(read.num_products) <= int(masked.num_products)
    torch.testing.assert_close(read.x, masked.x, rtol=1e-9, atol=1e-12 * float(b.nan_to_num(0, 0, 0).abs().max()))
    torch.testing.assert_close(read.residual_norm, masked.residual_norm, rtol=1e-6, atol=1e-9, equal_nan=True)
    for ours, theirs in zip(vars(read).values(), vars(masked).values(), strict=True):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)


def test_a_preconditioner_that_returns_its_argument_is_not_written_through() -> None:
    class Identity(HutchinsonDiagonal):
        def build(self, op: Operator):  # type: ignore[no-untyped-def] # noqa: ARG002
            return (lambda r: r), 0

    op, b, x = system(12, 1e2)
    with torch.no_grad():
        solution = CG(60, rtol=1e-12, preconditioner=Identity()).solve(op, b)
    torch.testing.assert_close(solution.x, x, rtol=1e-7, atol=1e-9)


def test_with_a_graph_the_solution_stays_connected() -> None:
    scale = torch.tensor(2.0, dtype=F64, requires_grad=True)
    op = Function(lambda v: scale * v, size=3, dtype=F64, device=torch.device("cpu"), symmetric=True)
    (slope,) = torch.autograd.grad(CG(2).solve(op, torch.ones(3, dtype=F64)).x.sum(), scale)
    torch.testing.assert_close(slope, torch.tensor(-3 / 4, dtype=F64))
