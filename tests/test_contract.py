"""Every exported method and solver keeps the contract that ships in hypergrad.testing; nothing is left out."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import hypergrad as hg
from hypergrad.testing import check_method, check_solver


def final(module: Any, base: type) -> list[str]:
    exported = [(name, getattr(module, name)) for name in module.__all__]
    return [n for n, c in exported if inspect.isclass(c) and issubclass(c, base) and not inspect.isabstract(c)]


SOLVERS: dict[str, list[tuple[hg.Solver, dict[str, Any]]]] = {
    "CG": [
        (hg.CG(20, rtol=1e-13), {}),
        (hg.CG(20, rtol=1e-13, preconditioner=hg.HutchinsonDiagonal(4)), {}),
        (hg.CG(20, rtol=1e-13, preconditioner=hg.NystromPreconditioner(3)), {}),
    ],
    "Exact": [(hg.Exact(), {})],
    "GMRES": [(hg.GMRES(20, rtol=1e-13), {}), (hg.GMRES(100, restart=4, rtol=1e-12), {})],
    "MINRES": [(hg.MINRES(20, rtol=1e-13), {})],
    "Neumann": [(hg.Neumann(150), {}), (hg.Neumann(3, step_size=0.5), {"exact": False})],
    "Nystrom": [(hg.Nystrom(6, damping=1e-12), {}), (hg.Nystrom(2, damping=0.1), {"exact": False})],
    "SciPy": [
        (hg.SciPy("gmres", rtol=1e-12), {}),
        (hg.SciPy("cg", rtol=1e-12), {}),
        (hg.SciPy("lgmres", rtol=1e-12), {}),
    ],
}
METHODS: dict[str, list[tuple[hg.Method, dict[str, Any]]]] = {
    "Implicit": [
        (hg.Implicit(solver), {"vmap": not isinstance(solver, hg.SciPy)})
        for cases in SOLVERS.values()
        for solver, _ in cases
    ]
    + [(hg.Implicit(hg.CG(20, rtol=1e-13), damping=0.1, batches=3, over=["weight"], warm_start=True), {})],
    "Unrolled": [
        (hg.Unrolled(), {}),
        (hg.Unrolled(truncate=2, checkpoint="sqrt", retain=0.5), {}),
        (hg.Unrolled(truncate=0), {}),
    ],
    "ForwardUnrolled": [(hg.ForwardUnrolled(), {})],
    "OneStep": [(hg.OneStep(), {}), (hg.OneStep(step_size=0.3), {})],
    "FiniteDifference": [(hg.FiniteDifference(), {})],
    "SAMA": [(hg.SAMA(), {})],
    "SOBA": [(hg.SOBA(), {}), (hg.SOBA(step_size=0.3), {})],
    "AmIGO": [(hg.AmIGO(), {}), (hg.AmIGO(3, step_size=0.3, batches=2), {})],
    "StocBiO": [(hg.StocBiO(), {}), (hg.StocBiO(3, step_size=0.3, batches=4), {})],
    "F2SA": [(hg.F2SA(5.0, growth=0.1), {}), (hg.F2SA(2.0, step_size=0.1, steps=3), {})],
    "BOME": [(hg.BOME(), {}), (hg.BOME(step_size=0.1, eta=0.3, barrier="value"), {})],
    "Penalty": [(hg.Penalty(10.0, steps=5), {"tolerance": 1e-6})],
}
NO_GRADIENT = {"Reptile"}  # an update direction; it says so when asked for a hypergradient


def test_every_exported_solver_is_covered() -> None:
    assert set(final(hg.solvers, hg.Solver)) == set(SOLVERS)


def test_every_exported_method_is_covered() -> None:
    assert set(final(hg.methods, hg.Method)) == set(METHODS) | NO_GRADIENT


@pytest.mark.parametrize(("solver", "options"), [c for cs in SOLVERS.values() for c in cs], ids=lambda v: str(v)[:60])
def test_solvers(solver: hg.Solver, options: dict[str, Any]) -> None:
    check_solver(solver, **options)


@pytest.mark.parametrize(("method", "options"), [c for cs in METHODS.values() for c in cs], ids=lambda v: str(v)[:60])
def test_methods(method: hg.Method, options: dict[str, Any]) -> None:
    check_method(method, **options)


class Broken(hg.ResponseMethod):
    """A method that breaks the contract in one way, by name."""

    def __init__(self, how: str) -> None:
        self.how = how

    def vjp(self, trajectory: Any, upper: Any, cotangent: Tensor, state: Any = None) -> hg.Pulled:
        pulled = hg.OneStep().vjp(trajectory, upper, cotangent)
        grad = dict(pulled.grad)
        if self.how == "offset":
            grad["v"] = grad["v"] + 1
        if self.how == "square":
            grad["v"] = grad["v"] * cotangent.norm()
        if self.how == "draws":
            torch.rand(1)
            grad["v"] = grad["v"] * torch.rand(())
        if self.how == "writes":
            upper["v"].mul_(1.0)
        if self.how == "nan":
            grad["v"] = grad["v"] * math.nan
        if self.how == "shape":
            grad["v"] = grad["v"][:1]
        return hg.Pulled(grad)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("offset", "direct term alone"),
        ("square", "linear in the cotangent"),
        ("writes", "left as it was found"),
        ("nan", "no breakdown"),
    ],
)
def test_the_contract_finds_what_breaks_it(how: str, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_method(Broken(how))
