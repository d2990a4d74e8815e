"""Whether a hypergradient means anything: how solved the lower level is, its curvature, and how methods agree on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, overload

import torch
from torch import Tensor

from hypergrad._flat import Params, as_params
from hypergrad._untouched import untouched
from hypergrad.composite import Composite
from hypergrad.diagnosis._advice import Measurements, advise, describe
from hypergrad.diagnosis._comparison import Agreement, Comparison
from hypergrad.diagnosis._rehearsal import rehearse
from hypergrad.engine import Engine
from hypergrad.lanczos import Spectrum, lanczos, singular_values
from hypergrad.methods import Implicit, Method, OneStep, Pulled, Reptile, Unrolled
from hypergrad.methods.base import UpperLoss, partials
from hypergrad.methods.evaluate import check_arguments
from hypergrad.solvers import CG, GMRES, MINRES, Neumann, Solver
from hypergrad.stationarity import Linearization, linearize, stationarity
from hypergrad.trajectory import Trajectory


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found out about one lower problem. `print` it.

    F is the stationarity condition of lower loss and optimizer, H = dF/d(lower), without damping.

    Attributes:
        name: the lower problem.
        reader: the problem above it.
        size: the number of lower scalars that respond.
        stationarity: norm of F at the lower solution.
        relative_stationarity: the same over its value where the run began; None without a full record.
        distance: estimated distance to the exact lower solution over the norm of the parameters: norm(H^-1 F) / norm(w)
            where H is positive definite, else its lower bound norm(F) / (largest norm(w)).
        smallest, largest: extreme eigenvalues of H by Lanczos, or singular values for a root's Jacobian.
        smallest_bound, largest_bound: how far each may lie from an eigenvalue.
        condition: largest / smallest; infinite where H is indefinite or singular.
        negative_curvature: whether H has a negative eigenvalue beyond rounding.
        method: the method asked about, or None.
        solver_residual: the residual of its linear solve, relative to the right-hand side; None without one.
        reference: the name of what methods are compared with: the implicit derivative, solved to convergence, where the
            lower solution is stationary, else `Unrolled` where there is a run.
        reference_residual: relative residual of the converged solve; None where implicit methods are refused.
        agreement: one entry per method.
        predicted_steps: CG steps to `rtol`, by its convergence bound for the recommended damping.
        damping: the damping recommended.
        recommendation: a method to use as it is.
        advice: the reason, in words.
        num_products: Hessian products spent on all this.
    """

    name: str
    reader: str
    size: int
    stationarity: float
    relative_stationarity: float | None
    distance: float
    smallest: float
    largest: float
    smallest_bound: float
    largest_bound: float
    condition: float
    negative_curvature: bool
    method: Method | None
    solver_residual: float | None
    reference: str
    reference_residual: float | None
    agreement: tuple[Agreement, ...]
    predicted_steps: int | None
    damping: float
    recommendation: Method | None
    advice: str
    num_products: int

    def __str__(self) -> str:
        """Return a small table and the advice."""
        began = (
            "" if self.relative_stationarity is None else f", {self.relative_stationarity:.2g} of where the run began"
        )
        lines = [
            f"{self.name}, read by {self.reader}: {self.size} lower parameters respond",
            f"  stationarity  {self.stationarity:.3g}{began}; {100 * self.distance:.2g}% of norm(lower) from the "
            f"solution",
            f"  curvature     {self.smallest:.3g} (+-{self.smallest_bound:.1g}) to {self.largest:.3g} "
            f"(+-{self.largest_bound:.1g}), condition number {self.condition:.3g}",
        ]
        if self.solver_residual is not None and self.method is not None:
            lines.append(f"  solver        {describe(self.method)}: relative residual {self.solver_residual:.2g}")
        width = max([len(self.reference), *(len(a.name) for a in self.agreement)])
        lines.append(f"  {'method':{width}}   cosine  difference  products")
        for a in self.agreement:
            products = "" if a.num_products is None else str(a.num_products)
            note = f"  {a.result.name}" if a.result.is_breakdown else ""
            numbers = f"{a.cosine:7.4f}  {a.difference:10.2g}" if a.name != self.reference else f"{'reference':>19}"
            lines.append(f"  {a.name:{width}}  {numbers}  {products:>8}{note}")
        lines.append(f"  {self.advice}")
        return "\n".join(lines)


class Diagnoses(dict[str, Diagnosis]):
    """The diagnoses of an engine's lower problems by name. `print` it."""

    def __str__(self) -> str:
        """Return all tables."""
        return "\n\n".join(str(diagnosis) for diagnosis in self.values())


@overload
def diagnose(engine: Engine, /, *, lanczos_steps: int = 30, max_steps: int = 200, rtol: float = 1e-5) -> Diagnoses: ...


@overload
def diagnose(
    upper_loss: UpperLoss,
    traj: Trajectory,
    upper: Mapping[str, Tensor],
    /,
    *,
    method: Method | None = None,
    batch: Any = None,
    lanczos_steps: int = 30,
    max_steps: int = 200,
    rtol: float = 1e-5,
) -> Diagnosis: ...


def diagnose(
    engine_or_upper_loss: Engine | UpperLoss,
    traj: Trajectory | None = None,
    upper: Mapping[str, Tensor] | None = None,
    /,
    *,
    method: Method | None = None,
    batch: Any = None,
    lanczos_steps: int = 30,
    max_steps: int = 200,
    rtol: float = 1e-5,
) -> Diagnosis | Diagnoses:
    """Return how solved a lower problem is, its curvature, how methods agree on its response, and which one to use.

    `diagnose(engine)` looks at every lower problem that a level above differentiates through, as the next upper step
    would find it: its window of own steps is run on copies, with the batches of the last one. `diagnose(upper_loss,
        traj, upper,
    method=...)` takes what `hypergradient` takes. Both leave everything as they found it.

    Curvature is that of the stationarity condition F of loss and optimizer, weight decay included and damping not. The
    extreme eigenvalues come from Lanczos with full reorthogonalization: they can only be underestimated in size.

    Cost: `lanczos_steps` products, up to 2 `max_steps` for the converged solve and the distance, what the methods
        compared
    take (`Unrolled`: one product per lower step); values are read back. For looking now and then, not for every step.

    Args:
        engine_or_upper_loss: an `Engine`, or a pure function (lower, upper, batch) -> scalar with the next two
            arguments.
        traj: the lower run, from `descend`, `solved` or `solved_root`.
        upper: the upper parameters that the run was made with.
        method: the method whose solve is to be judged; an engine's problems have their own.
        batch: passed to the upper loss as it is.
        lanczos_steps: the most products for the eigenvalues.
        max_steps: the most steps of the solve that counts as converged.
        rtol: the accuracy of a solve that the recommendation aims at.

    Returns:
        Diagnosis, or for an engine a dict of them by problem.

    Raises:
        ValueError: for arguments that do not belong together, or an engine without a lower problem to look at.

    Example:
        >>> import torch, hypergrad as hg
        >>> def lower_loss(lower, upper, batch):
        ...     return 2 * ((lower["w"] - upper["c"]) ** 2).sum()
        >>> def upper_loss(lower, upper, batch):
        ...     return (lower["w"] ** 2).sum()
        >>> upper = {"c": torch.ones(3)}
        >>> d = hg.diagnose(upper_loss, hg.solved(lower_loss, {"w": torch.ones(3)}), upper)
        >>> round(d.condition, 3), d.recommendation
        (1.0, OneStep(step_size=0.25))
    """
    options = _Options(lanczos_steps, max_steps, rtol)
    if isinstance(engine_or_upper_loss, Engine):
        if traj is not None or upper is not None or method is not None or batch is not None:
            raise ValueError("diagnose(engine) takes no run, upper parameters, method or batch: the engine has them.")
        return _diagnose_engine(engine_or_upper_loss, options)
    if traj is None or upper is None:
        raise ValueError("diagnose takes an Engine, or (upper_loss, traj, upper) as hypergradient does.")
    check_arguments(traj, upper, Unrolled() if method is None else method)
    with untouched(traj.layout.device):
        pieces = _Pieces("lower", "upper", engine_or_upper_loss, traj, as_params(upper), method, batch)
        return _examine(pieces, options)


@dataclass(frozen=True)
class _Options:
    lanczos_steps: int
    max_steps: int
    rtol: float

    def __post_init__(self) -> None:
        for option in ("lanczos_steps", "max_steps"):
            value = self.lanczos_steps if option == "lanczos_steps" else self.max_steps
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"diagnose: {option} must be an int >= 1, got {value!r}.")
        if not 0.0 < self.rtol < 1.0:
            raise ValueError(f"diagnose: rtol must lie between 0 and 1, got {self.rtol!r}.")


@dataclass(frozen=True)
class _Pieces:
    name: str
    reader: str
    upper_loss: UpperLoss
    trajectory: Trajectory
    upper: Params
    method: Method | None
    batch: Any
    ran: bool = True


def _diagnose_engine(engine: Engine, options: _Options) -> Diagnoses:
    found = Diagnoses()
    graph = engine.graph
    for level in graph.levels:
        for problem in level:
            readers = [other for other in graph.problems if problem.name in graph.reaching(other)]
            if not readers or problem.method is None:
                continue
            reader = min(readers, key=lambda name: graph.level_of[name])
            with untouched(engine.runners[problem.name].layout.device):
                scene = rehearse(engine, problem.name, reader)
                pieces = _Pieces(
                    problem.name,
                    reader,
                    scene.upper_loss,
                    scene.trajectory,
                    scene.upper,
                    problem.method,
                    scene.batch,
                    scene.ran,
                )
                found[problem.name] = _examine(pieces, options)
    if not found:
        raise ValueError("diagnose: no level of this engine differentiates through a problem below it.")
    return found


CONVERGED = "Implicit, converged"
"""The name of the implicit derivative solved as far as `max_steps` allows."""


def _examine(pieces: _Pieces, options: _Options) -> Diagnosis:
    trajectory, upper, method = pieces.trajectory, pieces.upper, pieces.method
    over = method.over if isinstance(method, Implicit) else None
    batches = min(method.batches, len(trajectory.samples(method.batches))) if isinstance(method, Implicit) else 1
    lin = linearize(trajectory, upper, batches=batches, over=over)
    find = lanczos if lin.operator.symmetric else singular_values
    spectrum = find(lin.operator, options.lanczos_steps)
    residual = float(lin.value.norm())
    rounding = 100 * torch.finfo(lin.operator.dtype).eps * max(abs(spectrum.smallest), abs(spectrum.largest))
    definite = lin.operator.symmetric and spectrum.smallest > rounding
    solver = _converged_solver(lin, options, definite=definite)
    distance, spent = _distance(trajectory, lin, spectrum, solver if definite else None)
    ran = trajectory.num_steps > 0 and pieces.ran

    _, cotangent, direct = partials(pieces.upper_loss, trajectory, upper, pieces.batch)
    compared = Comparison(pieces.upper_loss, trajectory, upper, pieces.batch, cotangent, direct)
    decoupled = method.decoupled if isinstance(method, Implicit) else "refuse"
    compared.add(CONVERGED, Implicit(solver, batches=batches, over=over, decoupled=decoupled))
    in_use = "" if method is None else describe(method)
    if method is not None and not isinstance(method, Reptile):
        compared.add(in_use, method)
    compared.add("Implicit(Neumann(10))", Implicit(Neumann(10), batches=batches, over=over, decoupled=decoupled))
    if ran:
        compared.add("OneStep", OneStep())
        compared.add("Unrolled", Unrolled())

    measured = Measurements(
        smallest=spectrum.smallest,
        largest=spectrum.largest,
        smallest_bound=spectrum.smallest_bound,
        rounding=rounding,
        symmetric=lin.operator.symmetric,
        size=lin.responding.layout.size,
        distance=distance,
        has_run=ran,
        composite=isinstance(trajectory.response or trajectory.loss, Composite),
        finite=bool(torch.isfinite(spectrum.values).all()) and compared.finite and residual < float("inf"),
        responds=compared.responds,
        identity_agrees=compared.cosine("OneStep", "Unrolled") > 0.99,
        refusal=compared.refusals.get(CONVERGED),
        configured=method,
        difference=None,
        rtol=options.rtol,
    )
    run_counts = "Unrolled" in compared.vectors and (CONVERGED not in compared.vectors or not measured.stationary)
    reference = "Unrolled" if run_counts else CONVERGED
    if in_use in compared.vectors and reference in compared.vectors:
        measured = replace(measured, difference=compared.difference(in_use, reference))
    advice = advise(measured)
    agreement = compared.against(reference)
    norm = float(lin.responding.select(cotangent).norm())
    return Diagnosis(
        name=pieces.name,
        reader=pieces.reader,
        size=measured.size,
        stationarity=residual,
        relative_stationarity=_since_start(trajectory, lin, upper, batches, residual),
        distance=distance,
        smallest=spectrum.smallest,
        largest=spectrum.largest,
        smallest_bound=spectrum.smallest_bound,
        largest_bound=spectrum.largest_bound,
        condition=measured.condition,
        negative_curvature=measured.indefinite,
        method=method,
        solver_residual=_residual(compared.pulled.get(in_use), norm),
        reference=reference,
        reference_residual=_residual(compared.pulled.get(CONVERGED), norm),
        agreement=agreement,
        predicted_steps=advice.predicted_steps,
        damping=advice.damping,
        recommendation=advice.method,
        advice=advice.text,
        num_products=spectrum.num_products + spent + sum(a.num_products or 0 for a in agreement),
    )


def _converged_solver(lin: Linearization, options: _Options, *, definite: bool) -> Solver:
    rtol = float(torch.finfo(lin.operator.dtype).eps) ** 0.7
    if not lin.operator.symmetric:
        return GMRES(max_steps=min(options.max_steps, lin.operator.size), rtol=rtol)
    return (CG if definite else MINRES)(max_steps=options.max_steps, rtol=rtol)


def _distance(
    trajectory: Trajectory, lin: Linearization, spectrum: Spectrum, solver: Solver | None
) -> tuple[float, int]:
    """Return the relative distance to the lower solution, and the products spent on it."""
    point = lin.responding.select(trajectory.end_flat)
    norm = float(point.norm())
    residual = float(lin.value.norm())
    if residual == 0.0:
        return 0.0, 0
    if solver is not None:
        step = solver.solve(lin.operator, lin.value)
        away, spent = float(step.x.norm()), int(step.num_products)
    else:
        largest = max(abs(spectrum.smallest), abs(spectrum.largest))
        away, spent = (residual / largest if largest > 0 else float("inf")), 0
    return away / max(norm, away), spent


def _since_start(
    trajectory: Trajectory, lin: Linearization, upper: Params, batches: int, residual: float
) -> float | None:
    """Return the norm of F relative to where the run began, on the same batches."""
    if not trajectory.steps or trajectory.steps[0].flat is None:
        return None
    condition = stationarity(trajectory, lin.responding, trajectory.samples(batches))
    began = float(condition(lin.responding.select(trajectory.steps[0].flat), upper).detach().norm())
    return residual / began if began > 0 else None


def _residual(pulled: Pulled | None, norm: float) -> float | None:
    """Return the residual of a method's solve relative to its right-hand side; None where it solved none."""
    if pulled is None or "residual_norm" not in pulled.stats:
        return None
    return float(pulled.stats["residual_norm"]) / norm if norm > 0 else 0.0
