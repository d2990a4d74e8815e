"""Recycled directions: products for an error of 1e-2 over consecutive upper steps, against cold conjugate gradients."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from hypergrad.bench.claims._walks import Point, bissl_steps, error, hypercleaning_steps
from hypergrad.bench.claims.base import Claim
from hypergrad.methods import Implicit, hypergradient
from hypergrad.solvers import CG
from hypergrad.trajectory import solved

ERROR = 1e-2
TOLERANCES = (0.1, 0.05, 0.02, 0.01, 5e-3, 3e-3, 1e-3, 3e-4)


def measure() -> list[Claim]:
    """Return the claims: half the products on hyper-cleaning, no more on BiSSL."""
    return [
        _claim("hyper-cleaning, 50 upper steps", list(hypercleaning_steps(50)), 0.5, warm_start=True),
        _claim("BiSSL, 20 upper steps", list(bissl_steps(20)), 1.0, never=True),
    ]


def _claim(name: str, points: list[Point], bound: float, *, warm_start: bool = False, never: bool = False) -> Claim:
    """Return the ratio of the products; with `never`, no single step may take more than cold CG."""
    cold_tolerance, cold = _fewest(points, lambda rtol: Implicit(CG(max_steps=200, rtol=rtol)))
    warm_tolerance, warm = _fewest(
        points, lambda rtol: Implicit(CG(max_steps=200, rtol=rtol), warm_start=warm_start, recycle=32)
    )
    ratio = sum(warm) / sum(cold)
    worse = sum(w > c for w, c in zip(warm, cold, strict=True))
    return Claim(
        name=f"{name}: products with recycled directions over those of cold CG, error {ERROR:g}"
        + ", never more" * never,
        measured=ratio,
        spread=None,
        bound=f"<= {bound:g}",
        holds=ratio <= bound and not (never and worse),
        detail=f"{sum(warm)} products (residuals counted) at rtol {warm_tolerance:g} against {sum(cold)} at "
        f"{cold_tolerance:g}; in {worse} of {len(points)} steps more than cold; both reach the error at every step",
    )


def _fewest(points: list[Point], method: Callable[[float], Implicit]) -> tuple[float, list[int]]:
    """Return the loosest tolerance that keeps every step's error below the bound, and the products at each step."""
    for rtol in TOLERANCES:
        counts = _products(points, method(rtol))
        if counts is not None:
            return rtol, counts
    raise RuntimeError(f"no tolerance of {TOLERANCES} reaches an error of {ERROR:g} at every step")


def _products(points: list[Point], method: Implicit) -> list[int] | None:
    counts: list[int] = []
    state: Tensor | None = None
    for task, truth in points:
        record = solved(task.lower_loss, task.lower, task.lower_batches[0])
        h = hypergradient(task.upper_loss, record, task.upper, method=method, batch=task.upper_batch, state=state)
        if error(h.grad, truth) > ERROR:
            return None
        state = h.state
        counts.append(int(h.stats.num_products))
    return counts
