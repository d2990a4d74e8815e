"""One CG step against a hand-written taped product: eager on hyper-cleaning and BiSSL, compiled on hyper-cleaning."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median, quantiles

import torch
from torch import Tensor

from hypergrad.bench.claims.base import Claim
from hypergrad.bench.problems import bissl, hypercleaning
from hypergrad.bench.problems.base import Task
from hypergrad.operators import Function, Operator
from hypergrad.solvers import CG
from hypergrad.stationarity import linearize
from hypergrad.trajectory import solved

STEPS = 8
"""Steps of CG beyond the first two that one repeat times."""


def measure() -> list[Claim]:
    """Return the claims: product and algebra eager, compiled, and the algebra alone."""
    cleaning, step = hypercleaning.build(), bissl.build()
    claims = _eager("hyper-cleaning", cleaning, repeats=40, algebra_bound=None)
    claims += _eager("BiSSL", step, repeats=15, algebra_bound=0.05)
    return [*claims, _compiled("hyper-cleaning", cleaning, repeats=40, bound=0.85)]


def _eager(name: str, task: Task, *, repeats: int, algebra_bound: float | None) -> list[Claim]:
    operator = linearize(solved(task.lower_loss, task.lower, task.lower_batches[0]), task.upper).operator
    times = _interleaved(
        {"hand": by_hand(task), "step": partial(_steps, operator), "algebra": partial(_steps, _idle(operator))}, repeats
    )
    claims = [_ratio(f"{name}: one CG step, eager, over a hand-written taped product", times, "step", 1.10)]
    if algebra_bound is not None:
        claims.append(_ratio(f"{name}: CG's algebra alone over that product", times, "algebra", algebra_bound))
    return claims


def _compiled(name: str, task: Task, *, repeats: int, bound: float) -> Claim:
    record = solved(task.lower_loss, task.lower, task.lower_batches[0])
    began = time.perf_counter()
    operator = linearize(record, task.upper, compile=True).operator
    _steps(operator)
    seconds = time.perf_counter() - began
    eager = linearize(record, task.upper).operator
    times = _interleaved(
        {"hand": by_hand(task), "step": partial(_steps, operator), "eager": partial(_steps, eager)}, repeats
    )
    saved = median(times["eager"]) - median(times["step"])
    pays = f"pays after {seconds / saved:,.0f} products" if saved > 0 else "never pays: eager is faster"
    claim = _ratio(f"{name}: one CG step, compiled, over a hand-written taped product in eager", times, "step", bound)
    detail = f"{claim.detail}; eager step {1e3 * median(times['eager']):.3g} ms; compiled in {seconds:.3g} s, {pays}"
    return Claim(claim.name, claim.measured, claim.spread, claim.bound, claim.holds, detail)


def by_hand(task: Task) -> Callable[[], float]:
    """Return what times one product as one writes it: a second backward pass through a retained lower gradient."""
    lower = {name: w.detach().clone().requires_grad_() for name, w in task.lower.items()}
    leaves = list(lower.values())
    loss = task.lower_loss(lower, task.upper, task.lower_batches[0])
    grads = torch.autograd.grad(loss, leaves, create_graph=True)
    generator = torch.Generator().manual_seed(0)
    vector = [torch.randn(w.shape, generator=generator, dtype=w.dtype) for w in leaves]

    def product() -> float:
        began = time.perf_counter()
        for _ in range(STEPS):
            torch.autograd.grad(grads, leaves, vector, retain_graph=True)
        return (time.perf_counter() - began) / STEPS

    return product


def _steps(operator: Operator) -> float:
    """Return the seconds that one more step of CG takes, from solves of two lengths."""
    generator = torch.Generator().manual_seed(0)
    b = torch.randn(operator.size, generator=generator, dtype=operator.dtype)
    seconds = []
    for max_steps in (2, 2 + STEPS):
        began = time.perf_counter()
        with torch.no_grad():  # as in `Implicit`
            CG(max_steps=max_steps, rtol=0.0).solve(operator, b)
        seconds.append(time.perf_counter() - began)
    return (seconds[1] - seconds[0]) / STEPS


def _idle(operator: Operator) -> Function:
    """Return an operator of that size whose products cost nothing: it hands out vectors made beforehand."""
    generator = torch.Generator().manual_seed(1)
    scale = torch.rand(operator.size, generator=generator, dtype=operator.dtype) + 1
    made: list[Tensor] = []

    def scaled(v: Tensor) -> Tensor:
        made.append(scale * v)
        return made[-1]

    def again(_: Tensor) -> Tensor:
        made.append(made.pop(0))
        return made[-1]

    def function(mv: Callable[[Tensor], Tensor]) -> Function:
        return Function(mv, size=operator.size, dtype=operator.dtype, device=operator.device, symmetric=True)

    b = torch.randn(operator.size, generator=torch.Generator().manual_seed(0), dtype=operator.dtype)
    CG(max_steps=2, rtol=0.0).solve(function(scaled), b)
    CG(max_steps=2 + STEPS, rtol=0.0).solve(function(scaled), b)
    return function(again)


def _interleaved(runs: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(run())
    return times


def _ratio(name: str, times: dict[str, list[float]], ours: str, bound: float) -> Claim:
    ratios = [ours_ / hand for ours_, hand in zip(times[ours], times["hand"], strict=True)]
    lower, _, upper = quantiles(ratios, n=4)
    measured = median(times[ours]) / median(times["hand"])
    return Claim(
        name=name,
        measured=measured,
        spread=(lower, upper),
        bound=f"<= {bound:g}",
        holds=measured <= bound,
        detail=f"{1e3 * median(times[ours]):.3g} ms against {1e3 * median(times['hand']):.3g} ms, medians of "
        f"{len(ratios)} repeats of {STEPS} in turns, {torch.get_num_threads()} threads",
    )
