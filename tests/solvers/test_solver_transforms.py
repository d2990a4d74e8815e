"""Every solver under vmap, whole-graph compile and fake tensors gives what it gives alone."""

from __future__ import annotations

import pytest
import torch
from linear_systems import DOUBLE, matrix
from torch._subclasses.fake_tensor import FakeTensorMode

from hypergrad._result import Result
from hypergrad.operators import Damped, Function, Matrix
from hypergrad.solvers import (
    CG,
    GMRES,
    MINRES,
    Exact,
    HutchinsonDiagonal,
    Neumann,
    Nystrom,
    NystromPreconditioner,
    SecondMoment,
    Solution,
)

N, T = 6, 3
SOLVERS = [
    CG(3),
    CG(2, check_every=None),
    CG(3, preconditioner=HutchinsonDiagonal(2)),
    CG(3, preconditioner=NystromPreconditioner(2)),
    CG(2, preconditioner=NystromPreconditioner(2, damping=0.1)),
    CG(3, preconditioner=SecondMoment()),
    MINRES(3),
    GMRES(3),
    GMRES(3, restart=2),
    Exact(),
    Neumann(3, num_power_steps=2),
    Neumann(3, step_size=0.5),
    Nystrom(2),
]
# One of each kind: a compile takes seconds.
COMPILED = [
    CG(2),
    CG(2, preconditioner=HutchinsonDiagonal(1)),
    CG(1, preconditioner=NystromPreconditioner(1)),
    CG(2, preconditioner=SecondMoment()),
    MINRES(2),
    GMRES(3, restart=2),
    Exact(),
    Neumann(2, num_power_steps=2),
    Nystrom(2),
]
FIELDS = ("x", "result", "num_steps", "num_products", "residual_norm")


def solve(solver, A, b, x0=None, moment=None):
    moment = torch.ones(N, dtype=A.dtype, device=A.device) if moment is None else moment
    op = Function(lambda v: A @ v, size=N, dtype=A.dtype, device=A.device, symmetric=True, second_moment=moment)
    return solver.solve(Damped(op, 0.01), b, x0=x0 if solver.uses_initial else None)


def batch():
    A = torch.stack([matrix(N, 10.0, seed=seed) for seed in range(T)])
    b = torch.randn(T, N, dtype=DOUBLE, generator=torch.Generator().manual_seed(3))
    b[1] = 0.0
    return A, b


def assert_same(got: Solution, want: Solution, tight=1e-9):
    for field in FIELDS:
        if field == "num_products":  # a check lets a solve alone stop early
            continue
        torch.testing.assert_close(getattr(got, field), getattr(want, field), rtol=tight, atol=tight)


@pytest.mark.parametrize("batched", ["both", "matrix", "b"])
@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_vmap_is_a_loop(solver, start, batched):
    A, b = batch()
    if batched == "matrix":
        b = b[2]
    if batched == "b":
        A = A[0]
    dims = (0 if A.ndim == 3 else None, 0 if b.ndim == 2 else None)
    x0 = torch.full((N,), 0.1, dtype=DOUBLE) if start else None
    got = torch.func.vmap(lambda A, b: solve(solver, A, b, x0), in_dims=dims)(A, b)
    for i in range(T):
        want = solve(solver, A[i] if A.ndim == 3 else A, b[i] if b.ndim == 2 else b, x0)
        assert_same(Solution(**{field: getattr(got, field)[i] for field in FIELDS}), want)


@pytest.mark.parametrize("kind", [CG, MINRES, GMRES])
def test_vmap_keeps_breakdowns_apart(kind):
    A = torch.stack([torch.eye(N, dtype=DOUBLE) * s for s in (1.0, -1.0, 0.0, float("nan"), 1.0)])
    b = torch.ones(5, N, dtype=DOUBLE)
    b[4, 0] = float("inf")
    got = torch.func.vmap(lambda A, b: kind(4).solve(Matrix(A, symmetric=True), b))(A, b)
    for i in range(5):
        want = kind(4).solve(Matrix(A[i], symmetric=True), b[i])
        assert got.result[i] == want.result
        torch.testing.assert_close(got.x[i], want.x)
    assert got.result[3] == got.result[4] == Result.NON_FINITE
    assert got.result[1] == (Result.NEGATIVE_CURVATURE if kind is CG else Result.SUCCESS)


@pytest.mark.parametrize("solver", COMPILED, ids=str)
def test_compiled_whole(solver):
    A, b = batch()
    torch.compiler.reset()

    def function(A, b, x0):
        return solve(solver, A, b, x0)

    compiled = torch.compile(function, fullgraph=True, dynamic=False, backend="aot_eager")
    x0 = torch.full((N,), 0.1, dtype=DOUBLE)
    assert_same(compiled(A[0], b[0], x0), function(A[0], b[0], x0), 1e-12)


@pytest.mark.parametrize("solver", [CG(2), GMRES(2)], ids=str)
def test_compiled_vmap(solver):
    A, b = batch()
    torch.compiler.reset()
    function = torch.func.vmap(lambda A, b: solve(solver, A, b).x)
    compiled = torch.compile(function, fullgraph=True, dynamic=False, backend="aot_eager")
    torch.testing.assert_close(compiled(A, b), function(A, b), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_fake_tensors_need_no_value(solver, device):
    # Without gradients: autograd on a fake device of another kind aborts the process.
    with torch.no_grad(), FakeTensorMode():
        A = torch.empty(N, N, dtype=DOUBLE, device=device)
        b = torch.empty(N, dtype=DOUBLE, device=device)
        solution = solve(solver, A, b, b)
    assert solution.x.shape == (N,)
    for field in FIELDS:
        tensor = getattr(solution, field)
        assert tensor.device.type == device
        assert field == "x" or tensor.shape == ()
        assert tensor.dtype == (DOUBLE if field in ("x", "residual_norm") else torch.int64)


def test_solution_is_a_pytree():
    A, b = batch()
    solution = solve(CG(2), A[0], b[0])
    leaves, spec = torch.utils._pytree.tree_flatten(solution)
    assert len(leaves) == 5
    assert torch.equal(torch.utils._pytree.tree_unflatten(leaves, spec).x, solution.x)
