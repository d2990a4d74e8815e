"""Operators against the matrices they stand for."""

from __future__ import annotations

import pytest
import torch
from linear_systems import DOUBLE, matrix

from hypergrad.operators import Damped, Function, Matrix, Operator, Scaled, Sum, Transposed, dense

A = matrix(5, 10.0, "nonsymmetric")
B = matrix(5, 10.0)
EYE = torch.eye(5, dtype=DOUBLE)
VECTOR = torch.linspace(1, 2, 5, dtype=DOUBLE)


def function(symmetric=False, **options):
    return Function(lambda v: A @ v, lambda v: A.T @ v, size=5, dtype=DOUBLE, device="cpu", symmetric=symmetric)


CASES: list[tuple[Operator, torch.Tensor, bool]] = [
    (Matrix(A), A, False),
    (Matrix(B, symmetric=True), B, True),
    (function(), A, False),
    (Function(lambda v: B @ v, size=5, dtype=DOUBLE, device="cpu", symmetric=True), B, True),
    (Damped(Matrix(A), 0.5), A + 0.5 * EYE, False),
    (Damped(Matrix(B, True), torch.tensor(0.5)), B + 0.5 * EYE, True),
    (Damped(Matrix(B, True), VECTOR), B + torch.diag(VECTOR), True),
    (Scaled(Matrix(A), -2.0), -2.0 * A, False),
    (Scaled(Matrix(B, True), torch.tensor(3.0, dtype=DOUBLE)), 3 * B, True),
    (Sum([Matrix(A), Matrix(B, True)]), A + B, False),
    (Sum([Matrix(B, True), Matrix(B, True), Matrix(EYE, True)]), 2 * B + EYE, True),
    (Sum([Matrix(A)]), A, False),
    (Transposed(Matrix(A)), A.T, False),
    (Transposed(Transposed(function())), A, False),
]


@pytest.mark.parametrize("op, expected, symmetric", CASES)
def test_products(op, expected, symmetric):
    torch.testing.assert_close(op.mv(VECTOR), expected @ VECTOR, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(op.rmv(VECTOR), expected.T @ VECTOR, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(dense(op), expected, rtol=1e-14, atol=1e-14)
    assert op.symmetric is symmetric
    assert (op.size, op.dtype, op.device) == (5, DOUBLE, torch.device("cpu"))


def test_dense_in_transforms():
    batch = torch.stack([A, B])
    got = torch.func.vmap(lambda m: dense(Damped(Matrix(m), 1.0)))(batch)
    torch.testing.assert_close(got, batch + EYE)
    compiled = torch.compile(lambda m: dense(Matrix(m)), fullgraph=True, dynamic=False, backend="aot_eager")
    torch.testing.assert_close(compiled(A), A)
    assert dense(Matrix(torch.zeros(0, 0))).shape == (0, 0)


def test_second_moment_is_handed_on():
    moment = torch.ones(5, dtype=DOUBLE)
    op = Function(lambda v: v, size=5, dtype=DOUBLE, device="cpu", symmetric=True, second_moment=moment)
    for wrapped in (Damped(op, 1.0), Scaled(op, 2.0), Transposed(op), Sum([Matrix(B, True), op])):
        assert wrapped.second_moment is moment
    assert Sum([Matrix(A)]).second_moment is None


def test_damping_can_be_batched_and_differentiated():
    got = torch.func.vmap(lambda s: Damped(Matrix(A), s).mv(VECTOR))(torch.tensor([0.0, 1.0], dtype=DOUBLE))
    torch.testing.assert_close(got[1] - got[0], VECTOR)
    s = torch.tensor(0.5, dtype=DOUBLE, requires_grad=True)
    (gradient,) = torch.autograd.grad(Damped(Matrix(A), s).mv(VECTOR).sum(), s)
    torch.testing.assert_close(gradient, VECTOR.sum())


def test_errors():
    with pytest.raises(ValueError, match=r"Matrix expects a square matrix, shape \(n, n\), got shape \(2, 3\)"):
        Matrix(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"Matrix expects floating-point entries, got torch.int64"):
        Matrix(torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"Function expects size >= 0.*got size=-1"):
        Function(lambda v: v, size=-1, dtype=DOUBLE, device="cpu")
    with pytest.raises(ValueError, match=r"Function expects second_moment of shape \(5,\), got \(4,\)"):
        Function(lambda v: v, size=5, dtype=DOUBLE, device="cpu", second_moment=torch.ones(4))
    with pytest.raises(ValueError, match=r"no transposed product.*Pass rmv="):
        Function(lambda v: v, size=5, dtype=DOUBLE, device="cpu").rmv(VECTOR)
    with pytest.raises(ValueError, match=r"Damped expects a finite damping >= 0, got damping=-1.0"):
        Damped(Matrix(A), -1.0)
    with pytest.raises(ValueError, match=r"Sum expects at least one operator, got none"):
        Sum([])
    with pytest.raises(ValueError, match=r"one size, dtype and device; operator 1 has \(5, torch.float32"):
        Sum([Matrix(A), Matrix(A.float())])
