"""Our methods and settings for each kind of problem: a ladder from cheap to exact, named as the tables name them."""

from __future__ import annotations

from hypergrad.bench.problems.base import Task
from hypergrad.methods import (
    BOME,
    F2SA,
    SAMA,
    SOBA,
    AmIGO,
    FiniteDifference,
    ForwardUnrolled,
    Implicit,
    Method,
    OneStep,
    Penalty,
    StocBiO,
    Unrolled,
)
from hypergrad.optim import SGD
from hypergrad.solvers import (
    CG,
    GMRES,
    MINRES,
    Exact,
    HutchinsonDiagonal,
    Neumann,
    Nystrom,
    NystromPreconditioner,
    SciPy,
)

Ladder = dict[str, Method]

SINGLE_LOOP = (SOBA, AmIGO, F2SA, BOME)
"""Methods that move a state by a step a call: they are measured after `SETTLING` calls at a standing upper level."""

SETTLING = 50

TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
"""Relative residuals at which a solve may end; the rivals whose solvers take one are set to the same."""

MAX_STEPS = 2000

_DENSE = 2000
"""The most lower scalars for which a dense solve is offered."""


def ladder(task: Task, size: str) -> Ladder:
    """Return the methods for a task by name.

    Args:
        task: the problem.
        size: "quick" for fewer settings.
    """
    if task.kind == "implicit":
        return _implicit(task, full=size == "full")
    if task.kind == "unrolled":
        return _unrolled(task, full=size == "full")
    return _tasks(task, full=size == "full")


def _implicit(task: Task, *, full: bool) -> Ladder:
    size = sum(w.numel() for w in task.lower.values())
    step = task.lr or 0.1
    found: Ladder = {f"CG {n}": Implicit(CG(max_steps=n, rtol=1e-8)) for n in ([5, 20] if full else [5, 20, 80])}
    if full:
        found |= {f"CG to {rtol:g}": Implicit(CG(max_steps=MAX_STEPS, rtol=rtol)) for rtol in TOLERANCES}
    found |= {f"Neumann {n}": Implicit(Neumann(num_terms=n)) for n in ([5, 20, 100] if full else [20])}
    found |= {f"MINRES {n}": Implicit(MINRES(max_steps=n, rtol=1e-8)) for n in ([20, 100] if full else [20])}
    found["CG 20, Nystrom preconditioner"] = Implicit(
        CG(max_steps=20, rtol=1e-8, preconditioner=NystromPreconditioner(rank=20))
    )
    found["OneStep"] = OneStep(step_size=step)
    if full:
        found["SOBA"] = SOBA(step_size=step)
        found["Nystrom 20"] = Implicit(Nystrom(rank=20))
        found["AmIGO 10"] = AmIGO(steps=10, step_size=step)
        found["StocBiO 20"] = StocBiO(num_products=20, step_size=step)
        found["F2SA"] = F2SA(strength=10.0, step_size=step / 20, steps=5)
        found["BOME"] = BOME()
        found["CG 20, Hutchinson preconditioner"] = Implicit(
            CG(max_steps=20, rtol=1e-8, preconditioner=HutchinsonDiagonal(num_probes=8))
        )
        found["GMRES 20"] = Implicit(GMRES(max_steps=20, rtol=1e-8))
        found["SciPy MINRES 100"] = Implicit(SciPy("minres", max_steps=100, rtol=1e-8))
        found["CG 20, compiled"] = Implicit(CG(max_steps=20, rtol=1e-8), compile=True)
        found["FiniteDifference"] = FiniteDifference(step_size=step)
        found["SAMA"] = SAMA()
        found["Penalty"] = Penalty(strength=100.0, optimizer=SGD(lr=step), steps=20)
    if full and task.outputs is not None:
        found["Gauss-Newton CG 20"] = Implicit(CG(max_steps=20, rtol=1e-8), curvature="gauss_newton")
    if size <= _DENSE:
        found["Exact"] = Implicit(Exact())
    return found


def _unrolled(task: Task, *, full: bool) -> Ladder:
    steps = task.steps
    found: Ladder = {
        "Unrolled": Unrolled(),
        "Unrolled, retain 1": Unrolled(retain=1.0),
    }
    windows = sorted({max(steps // 2, 1), max(steps // 10, 1), 1}, reverse=True) if full else [max(steps // 5, 1)]
    found |= {f"Unrolled, last {n} steps": Unrolled(truncate=n) for n in windows if n < steps}
    if full:
        found["Unrolled, retain 0.5"] = Unrolled(retain=0.5)
        found["Unrolled, sqrt checkpoints"] = Unrolled(checkpoint="sqrt")
        found["Unrolled, compiled"] = Unrolled(compile=True)
    if sum(u.numel() for u in task.upper.values()) <= 20:
        found["ForwardUnrolled"] = ForwardUnrolled()
    if task.hyper is None:
        found["SAMA"] = SAMA()
        if full:
            found["OneStep"] = OneStep()
            found["CG 20, damping 0.1"] = Implicit(CG(max_steps=20), damping=0.1)
            found["FiniteDifference"] = FiniteDifference()
    return found


def _tasks(task: Task, *, full: bool) -> Ladder:
    if task.converged:
        return {f"CG {n}": Implicit(CG(max_steps=n, rtol=1e-8)) for n in ([2, 5, 10, 20] if full else [5, 20])}
    return {"Unrolled": Unrolled(), "first order": Unrolled(truncate=0)}
