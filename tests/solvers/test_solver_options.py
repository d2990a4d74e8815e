"""Every option is validated where it is given, and every message says what to do."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from linear_systems import DOUBLE, system

from hypergrad import solvers
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
    PenaltyPreconditioner,
    SciPy,
    SecondMoment,
)

BAD = [
    (CG, {"max_steps": 0}, r"CG expects max_steps to be an int >= 1, got max_steps=0"),
    (CG, {"max_steps": True}, r"got max_steps=True"),
    (CG, {"max_steps": 2.5}, r"got max_steps=2.5"),
    (CG, {"rtol": -1.0}, r"CG expects rtol to be a finite number >= 0, got rtol=-1.0"),
    (CG, {"rtol": float("nan")}, r"got rtol=nan"),
    (CG, {"atol": float("inf")}, r"CG expects atol to be a finite number >= 0, got atol=inf"),
    (CG, {"atol": "1"}, r"got atol='1'"),
    (CG, {"check_every": 0}, r"CG expects check_every to be 'auto', None or an int >= 1, got check_every=0"),
    (CG, {"check_every": True}, r"got check_every=True"),
    (CG, {"check_every": "never"}, r"got check_every='never'"),
    (
        CG,
        {"preconditioner": "jacobi"},
        r"preconditioner to be a Preconditioner or None.*'jacobi'.*Hutchinson",
    ),
    (MINRES, {"max_steps": -1}, r"MINRES expects max_steps .* got max_steps=-1"),
    (MINRES, {"rtol": None}, r"MINRES expects rtol .* got rtol=None"),
    (MINRES, {"atol": -1}, r"MINRES expects atol .* got atol=-1"),
    (MINRES, {"check_every": 1.0}, r"MINRES expects check_every .* got check_every=1.0"),
    (GMRES, {"max_steps": 0}, r"GMRES expects max_steps .* got max_steps=0"),
    (GMRES, {"rtol": -1}, r"GMRES expects rtol .* got rtol=-1"),
    (GMRES, {"atol": -1}, r"GMRES expects atol .* got atol=-1"),
    (GMRES, {"check_every": -2}, r"GMRES expects check_every .* got check_every=-2"),
    (GMRES, {"restart": 0}, r"GMRES expects restart .* got restart=0"),
    (
        GMRES,
        {"restart": 11},
        r"GMRES expects restart <= max_steps, got restart=11, max_steps=10. Use restart=None",
    ),
    (Neumann, {"num_terms": 0}, r"Neumann expects num_terms .* got num_terms=0"),
    (Neumann, {"step_size": 0.0}, r"Neumann expects step_size to be a finite number > 0, got step_size=0.0"),
    (Neumann, {"num_power_steps": 0}, r"Neumann expects num_power_steps .* got num_power_steps=0"),
    (Neumann, {"seed": -1}, r"Neumann expects seed to be an int >= 0, got seed=-1"),
    (
        Neumann,
        {"step_size": 0.1, "seed": 3},
        r"seed=3 only to estimate a step size, and step_size=0.1 is given",
    ),
    (Neumann, {"step_size": 0.1, "num_power_steps": 3}, r"num_power_steps=3 only to estimate"),
    (Nystrom, {"rank": 0}, r"Nystrom expects rank .* got rank=0"),
    (Nystrom, {"damping": 0.0}, r"Nystrom expects damping to be a finite number > 0, got damping=0.0"),
    (Nystrom, {"seed": 1.5}, r"Nystrom expects seed .* got seed=1.5"),
    (SciPy, {"name": "sor"}, r"SciPy expects name to be one of \['bicg', .*'tfqmr'\], got name='sor'"),
    (SciPy, {"name": "cg", "max_steps": 0}, r"SciPy expects max_steps .* got max_steps=0"),
    (SciPy, {"name": "cg", "rtol": -1.0}, r"SciPy expects rtol .* got rtol=-1.0"),
    (SciPy, {"name": "cg", "atol": -1.0}, r"SciPy expects atol .* got atol=-1.0"),
    (SciPy, {"name": "minres", "atol": 1.0}, r"minres has no absolute tolerance, got atol=1.0. Use atol=0"),
    (HutchinsonDiagonal, {"num_probes": 0}, r"HutchinsonDiagonal expects num_probes .* got num_probes=0"),
    (HutchinsonDiagonal, {"seed": -1}, r"HutchinsonDiagonal expects seed .* got seed=-1"),
    (HutchinsonDiagonal, {"floor": 0.0}, r"HutchinsonDiagonal expects floor .* > 0, got floor=0.0"),
    (SecondMoment, {"power": 0.0}, r"SecondMoment expects power .* > 0, got power=0.0"),
    (SecondMoment, {"eps": -1.0}, r"SecondMoment expects eps .* > 0, got eps=-1.0"),
    (PenaltyPreconditioner, {"rank": -1}, r"PenaltyPreconditioner expects rank .* got rank=-1"),
    (PenaltyPreconditioner, {"seed": -1}, r"PenaltyPreconditioner expects seed .* got seed=-1"),
    (NystromPreconditioner, {"rank": 0}, r"NystromPreconditioner expects rank .* got rank=0"),
    (NystromPreconditioner, {"seed": -1}, r"NystromPreconditioner expects seed .* got seed=-1"),
    (
        NystromPreconditioner,
        {"damping": 0.0},
        r"NystromPreconditioner expects damping .* > 0, got damping=0.0",
    ),
]


@pytest.mark.parametrize("kind, options, message", BAD)
def test_bad_options(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**options)


EACH = [CG(3), MINRES(3), GMRES(3), Exact(), Neumann(3), Nystrom(3), SciPy("gmres"), SciPy("cg")]


@pytest.mark.parametrize("solver", EACH, ids=str)
def test_bad_systems(solver):
    op, b, x = system(4, 10.0)
    name = type(solver).__name__
    with pytest.raises(ValueError, match=rf"{name} expects b of shape \(4,\), the size of the operator, got \(3,\)"):
        solver.solve(op, b[:3])
    with pytest.raises(
        ValueError, match=rf"{name} expects b of dtype torch.float64, the operator's, got torch.float32"
    ):
        solver.solve(op, b.float())
    if not solver.uses_initial:
        with pytest.raises(ValueError, match=rf"{name} is a direct solver and cannot start from x0.*use CG"):
            solver.solve(op, b, x0=x)
        return
    with pytest.raises(
        ValueError, match=rf"{name} expects x0 like b, shape \(4,\) and dtype torch.float64, got \(2,\)"
    ):
        solver.solve(op, b, x0=x[:2])
    with pytest.raises(ValueError, match=rf"{name} expects x0 like b.*got \(4,\) and torch.float32"):
        solver.solve(op, b, x0=x.float())


@pytest.mark.parametrize("solver", [CG(3), MINRES(3), Nystrom(3), SciPy("cg"), SciPy("minres")], ids=str)
def test_symmetric_solvers_refuse_others(solver):
    op, b, _ = system(4, 10.0)
    with pytest.raises(ValueError, match=r"needs a symmetric operator, and this one is not marked symmetric.*GMRES"):
        solver.solve(Matrix(op.dense), b)


@pytest.mark.parametrize("solver", [CG(3, check_every=2), MINRES(3, check_every=2), GMRES(3, check_every=2)])
def test_explicit_checks_are_refused_in_transforms(solver):
    op, b, _ = system(4, 10.0)
    message = r"\(check_every=2\) reads a value every 2 steps.*Use check_every=None"

    def function(b):
        return solver.solve(op, b).x

    with pytest.raises(ValueError, match=message):
        torch.func.vmap(function)(torch.stack([b, b]))
    with pytest.raises(Exception, match=message):  # the compiler wraps it in an error of its own
        torch.compile(function, fullgraph=True, backend="aot_eager")(b)


def test_scipy_is_refused_in_transforms():
    op, b, _ = system(4, 10.0)
    message = r"SciPy\('cg'\) reads values, which torch.func transforms.*Use GMRES, or CG"

    def function(b):
        return SciPy("cg").solve(op, b).x

    with pytest.raises(ValueError, match=message):
        torch.func.vmap(function)(torch.stack([b, b]))
    with pytest.raises(Exception, match=message):
        torch.compile(function, fullgraph=True, backend="aot_eager")(b)


def test_second_moment_needs_one():
    op, b, _ = system(4, 10.0)
    with pytest.raises(ValueError, match=r"SecondMoment needs an operator with a second moment.*adaptive optimizer"):
        CG(preconditioner=SecondMoment()).solve(op, b)


@pytest.mark.parametrize("name", [n for n in solvers.__all__ if n not in ("Solver", "Preconditioner")])
def test_values_are_frozen(name):
    kind = getattr(solvers, name)
    assert dataclasses.is_dataclass(kind)
    assert kind.__dataclass_params__.frozen


def test_defaults_of_the_contract():
    assert CG(20, 1e-6) == CG(max_steps=20, rtol=1e-6, atol=0.0, preconditioner=None, check_every="auto")
    assert (CG().max_steps, CG().rtol, Neumann().num_terms, Neumann().step_size, Nystrom().rank) == (
        10,
        1e-5,
        10,
        None,
        10,
    )
    assert hash(CG(5)) == hash(CG(5))


@pytest.mark.parametrize("solver", EACH, ids=str)
def test_operator_dtype_is_kept(solver):
    op, b, _ = system(4, 10.0)
    assert solver.solve(op, b).x.dtype == DOUBLE
