"""From measurements of a lower problem to a method that fits it, and the reason in words."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hypergrad.methods import Implicit, Method, OneStep, Unrolled
from hypergrad.solvers import CG, GMRES, MINRES

STATIONARY = 1e-2
"""A lower solution nearer to the true one than this fraction of its own norm counts as stationary."""
IDENTITY = 1.2
"""Below this condition number the inverse Hessian is a multiple of the identity to within a tenth."""
ILL_CONDITIONED = 1e4
"""Beyond this condition number CG needs hundreds of steps, and rounding in float32 begins to tell."""
AGREES = 0.05
"""A relative difference from the reference below this counts as agreement."""


@dataclass(frozen=True)
class Measurements:
    """What advice rests on; eigenvalues are those of the undamped stationarity condition's Jacobian.

    Attributes:
        smallest, largest: extreme eigenvalues (singular values where it is not symmetric).
        smallest_bound: how far the smallest may still lie from an eigenvalue.
        rounding: eigenvalues of smaller size count as zero.
        symmetric: whether the condition is a gradient.
        size: the number of responding lower scalars.
        distance: estimated distance to the lower solution, relative to the parameters' norm.
        has_run: whether the solution is the end of a recorded run.
        composite: whether the lower loss shows its outputs, for Gauss-Newton curvature.
        finite: whether all of it is finite.
        responds: whether the response is anything but zero.
        identity_agrees: whether `OneStep` points the way of `Unrolled` (cosine above 0.99).
        refusal: why an implicit method cannot serve here, or None.
        configured: the method in use, if any, and its relative difference from the reference.
        rtol: the accuracy wanted of a solve.
    """

    smallest: float
    largest: float
    smallest_bound: float
    rounding: float
    symmetric: bool
    size: int
    distance: float
    has_run: bool
    composite: bool
    finite: bool
    responds: bool
    identity_agrees: bool
    refusal: str | None
    configured: Method | None
    difference: float | None
    rtol: float

    @property
    def scale(self) -> float:
        """Return the largest eigenvalue in size."""
        return max(abs(self.smallest), abs(self.largest))

    @property
    def indefinite(self) -> bool:
        """Return whether there is negative curvature beyond rounding."""
        return self.symmetric and self.smallest < -self.rounding

    @property
    def singular(self) -> bool:
        """Return whether the smallest eigenvalue is zero within rounding."""
        return abs(self.smallest) <= self.rounding

    @property
    def condition(self) -> float:
        """Return the condition number; infinite where the condition is indefinite or singular."""
        return math.inf if self.indefinite or self.singular else self.largest / self.smallest

    @property
    def stationary(self) -> bool:
        """Return whether the lower solution is one, to `STATIONARY`."""
        return self.distance <= STATIONARY


@dataclass(frozen=True)
class Advice:
    """A method, the damping in it, and why.

    Attributes:
        method: ready to use; None where no method would help.
        damping: what the method adds to the diagonal.
        predicted_steps: CG steps to the tolerance asked for, by its convergence bound; None where that says nothing.
        text: one or a few sentences.
    """

    method: Method | None
    damping: float
    predicted_steps: int | None
    text: str


def cg_steps(condition: float, rtol: float, size: int) -> int:
    r"""Return how many CG steps bring the residual below rtol times the right-hand side, by the Chebyshev bound.

    .. math:: \lVert r_k \rVert / \lVert b \rVert \le 2 \sqrt{c} \Big(\frac{\sqrt{c} - 1}{\sqrt{c} + 1}\Big)^k

    with condition number c; at most 2 `size`: CG ends after `size` steps in exact arithmetic, somewhat later in
    rounding.
    """
    root = math.sqrt(condition)
    if root <= 1.0 + 1e-12:
        return 1
    rate = math.log((root + 1.0) / (root - 1.0))
    return max(1, min(2 * size, math.ceil(math.log(2.0 * root / rtol) / rate)))


def advise(m: Measurements) -> Advice:
    """Return which method and damping fit, by the first of these rules that applies.

    Values that are not finite; a fixed point that implicit methods cannot describe; a response that is zero; negative
    curvature; no stationarity; singular or ill-conditioned curvature; curvature that is a multiple of the identity;
    and else: CG.
    """
    if not m.finite:
        return Advice(None, 0.0, None, "Values that are not finite came up: no method helps until data and losses are.")
    if m.refusal is not None:
        return Advice(
            Unrolled() if m.has_run else None,
            0.0,
            None,
            f"{'Unrolled, since an implicit' if m.has_run else 'An implicit'} method cannot serve here: {m.refusal}",
        )
    if not m.responds:
        return Advice(
            m.configured,
            0.0,
            None,
            "The response is zero: the upper loss does not depend on the lower solution, or that does not move with "
            "the upper parameters. Every method gives the direct derivative alone; check what the losses read.",
        )
    if m.indefinite:
        return _indefinite(m)
    if not m.stationary:
        return _not_stationary(m)
    if not m.symmetric:
        return _root(m)
    if m.singular or m.condition > ILL_CONDITIONED:
        return _ill_conditioned(m)
    if m.condition <= IDENTITY:
        return _identity(m)
    return _cg(m)


def _indefinite(m: Measurements) -> Advice:
    damping = _round_up(1.1 * (abs(m.smallest) + m.smallest_bound))
    steps = cg_steps((m.largest + damping) / (m.smallest + damping), m.rtol, m.size)
    text = (
        f"The lower Hessian has negative curvature, {m.smallest:.3g} against {m.largest:.3g} at the other end: the "
        "lower solution is no minimum, and CG without damping stops there. "
    )
    if m.has_run and not m.stationary:
        text += (
            f"Nor is it stationary ({_distance(m)}). Unrolled needs neither: it differentiates the run that was made. "
            f"For an implicit method add damping of at least {damping:.3g}"
        )
        text += _gauss_newton(m) + "."
        return Advice(Unrolled(), 0.0, None, text)
    text += (
        f"Add damping of at least {damping:.3g} (|smallest eigenvalue| with its uncertainty and a margin of a tenth)"
    )
    text += _gauss_newton(m) + (", differentiate the run with Unrolled" if m.has_run else "") + ", or train on."
    if m.stationary:
        text += " The undamped system at this saddle can be solved by MINRES, but is the derivative of no minimizer."
    return Advice(Implicit(CG(max_steps=steps, rtol=m.rtol), damping=damping), damping, steps, text)


def _gauss_newton(m: Measurements) -> str:
    how = "curvature='gauss_newton'" if m.composite else "curvature='gauss_newton' (the loss written as hg.Composite)"
    return f", use {how}"


def _not_stationary(m: Measurements) -> Advice:
    if not m.has_run:
        return Advice(
            m.configured,
            0.0,
            None,
            f"The lower solution is not stationary ({_distance(m)}), and implicit derivatives are wrong in "
            "proportion. Solve the lower problem further, or record a run with hg.descend and differentiate it with "
            "Unrolled.",
        )
    if m.identity_agrees:
        return Advice(
            OneStep(),
            0.0,
            None,
            f"The lower run stops far from its solution ({_distance(m)}), so short that curvature plays no part: "
            "OneStep points the way that Unrolled does, at the cost of one product. Its length is that of one step "
            "of the run; take more lower steps if the derivative of the solution is wanted.",
        )
    return Advice(
        Unrolled(),
        0.0,
        None,
        f"The lower run is not at its solution ({_distance(m)}), and implicit derivatives are wrong in proportion. "
        "Unrolled differentiates the run that was made; for an implicit method take more lower steps first.",
    )


def _root(m: Measurements) -> Advice:
    steps = min(m.size, 50)
    return Advice(
        Implicit(GMRES(max_steps=steps, rtol=m.rtol)),
        0.0,
        None,
        f"The root's Jacobian is not symmetric; its singular values lie between {m.smallest:.3g} and {m.largest:.3g}. "
        f"GMRES solves it; {'add damping, it is singular' if m.singular else f'condition number {m.condition:.3g}'}.",
    )


def _ill_conditioned(m: Measurements) -> Advice:
    damping = _round_up(m.largest * 1e-3)
    steps = cg_steps((m.largest + damping) / max(m.smallest + damping, damping), m.rtol, m.size)
    what = "is singular" if m.singular else f"has condition number {m.condition:.2g}"
    text = (
        f"The lower Hessian {what}: directions of curvature below {damping:.2g} would dominate the response and take "
        f"CG {'forever' if m.singular else f'about {cg_steps(m.condition, m.rtol, m.size)} steps'}. Damping of "
        f"{damping:.2g} brings that to {steps}, at a bias that is small along curvature well above it. To remove it "
        "instead: a strictly convex penalty in the lower loss, or a preconditioner (NystromPreconditioner) with no "
        "damping."
    )
    return Advice(Implicit(CG(max_steps=steps, rtol=m.rtol), damping=damping), damping, steps, text)


def _identity(m: Measurements) -> Advice:
    step_size = float(f"{2.0 / (m.largest + m.smallest):.4g}")
    error = (m.condition - 1.0) / (m.condition + 1.0)
    return Advice(
        OneStep(step_size=step_size),
        0.0,
        cg_steps(m.condition, m.rtol, m.size),
        f"The lower solution is stationary ({_distance(m)}) and its Hessian is {1 / step_size:.3g} times the identity "
        f"to within {_percent(error)}: an identity-like method suffices, OneStep(step_size={step_size:.3g}), whose "
        "inverse errs by no more "
        f"than that. CG would take {cg_steps(m.condition, m.rtol, m.size)} steps." + _verdict(m),
    )


def _cg(m: Measurements) -> Advice:
    steps = cg_steps(m.condition, m.rtol, m.size)
    least = "at least " if m.smallest_bound > 0.1 * m.smallest else ""
    return Advice(
        Implicit(CG(max_steps=steps, rtol=m.rtol)),
        0.0,
        steps,
        f"The lower solution is stationary ({_distance(m)}) and its Hessian positive definite with condition number "
        f"{least}{m.condition:.3g}: Implicit(CG({steps})) solves to {m.rtol:.0e} within {steps} steps, without "
        "damping." + _verdict(m),
    )


def _verdict(m: Measurements) -> str:
    """Return how the method in use fares."""
    if m.configured is None or m.difference is None:
        return ""
    name = describe(m.configured)
    if m.difference <= AGREES:
        return (
            f" {name}, in use, is within {_percent(max(m.difference, 1e-12))} of the truth: keep it if it is cheaper."
        )
    return f" {name}, in use, is off by {_percent(m.difference)}."


def describe(method: Method) -> str:
    """Return a method's name with its solver and damping, short."""
    if not isinstance(method, Implicit):
        return type(method).__name__
    solver = method.solver
    inner = type(solver).__name__
    if isinstance(solver, (CG, MINRES, GMRES)):
        inner += f"({solver.max_steps})"
    damping = f", damping={float(method.damping):.3g}" if method.damping else ""
    curvature = "" if method.curvature == "hessian" else ", gauss_newton"
    return f"Implicit({inner}{damping}{curvature})"


def _distance(m: Measurements) -> str:
    return f"about {_percent(m.distance)} of the parameters' norm away"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2g}%"


def _round_up(value: float) -> float:
    """Return `value` rounded up to two digits, as a number that one would type."""
    if value <= 0.0 or not math.isfinite(value):
        return value
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{math.ceil(value / unit) * unit:.3g}")
