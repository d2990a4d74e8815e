"""Nothing is read back, and an iteration of CG stays within its budget of operations."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from linear_systems import Operations, Paused, system

from hypergrad.operators import Matrix
from hypergrad.solvers import (
    CG,
    GMRES,
    MINRES,
    Exact,
    HutchinsonDiagonal,
    Neumann,
    Nystrom,
    NystromPreconditioner,
    Solver,
)

NO_CHECKS = [
    CG(3, check_every=None),
    CG(3, check_every=None, preconditioner=HutchinsonDiagonal()),
    CG(3, check_every=None, preconditioner=NystromPreconditioner(2)),
    MINRES(3, check_every=None),
    GMRES(4, restart=2, check_every=None),
    Exact(),
    Neumann(3),
    Nystrom(3),
]


def recorded(solver: Solver, n: int) -> list[tuple[str, bool]]:
    op, b, _ = system(n, 1e3)
    operations = Operations(n)
    with operations:
        solver.solve(Paused(op, operations), b)
    return operations.seen


@pytest.mark.parametrize("n", [16, 100, 257])
@pytest.mark.parametrize("check_every", ["auto", None])
def test_cg_iteration(n, check_every):
    solver = CG(max_steps=4, rtol=0.0, check_every=check_every)
    few, many = recorded(solver, n), recorded(replace(solver, max_steps=7), n)
    assert len(many) - len(few) <= 3 * 16
    assert sum(full for _, full in many) - sum(full for _, full in few) <= 3 * 7


def test_the_recorder_sees_reads():
    seen = [name for name, _ in recorded(CG(2, check_every=1), 8)]
    assert "aten._local_scalar_dense.default" in seen


@pytest.mark.parametrize("solver", NO_CHECKS, ids=str)
def test_no_value_is_read(solver):
    seen = {name for name, _ in recorded(solver, 8)}
    reads = (
        "_local_scalar_dense",
        "is_nonzero",
        "nonzero",
        "equal.default",
        "item",
        "unique",
        "masked_select",
    )
    assert not [name for name in seen if any(read in name for read in reads)]


@pytest.mark.parametrize("solver", NO_CHECKS, ids=str)
def test_checks_are_every_so_many_steps(solver):
    if not isinstance(solver, CG | MINRES | GMRES):
        return
    options = {"restart": None} if isinstance(solver, GMRES) else {}
    checked = replace(solver, max_steps=7, rtol=0.0, check_every=3, **options)
    seen = [name for name, _ in recorded(checked, 40)]
    assert seen.count("aten._local_scalar_dense.default") == 3  # before steps 0, 3 and 6


@pytest.mark.parametrize("solver", NO_CHECKS, ids=str)
def test_no_global_generator_is_touched_and_solves_repeat(solver):
    op, b, _ = system(12, 1e2)
    state = torch.get_rng_state()
    first = solver.solve(op, b)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(7)
    second = solver.solve(op, b)
    torch.set_rng_state(state)
    assert torch.equal(first.x, second.x)


def test_arguments_are_left_as_they_were():
    for solver in NO_CHECKS:
        op, b, x = system(12, 1e2)
        kept = [t.clone() for t in (op.dense, b, x)]
        solver.solve(Matrix(op.dense, symmetric=True), b, **({"x0": x} if solver.uses_initial else {}))
        assert all(torch.equal(a, t) for a, t in zip(kept, (op.dense, b, x), strict=True))
