"""Time to a given error, against hand-written autograd with cold, unpreconditioned CG in eager mode."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from statistics import median, quantiles
from typing import Any

import torch

from hypergrad.bench.claims._walks import Point, bissl_steps, error, flat, hypercleaning_steps
from hypergrad.bench.claims.base import Claim
from hypergrad.bench.problems import logistic
from hypergrad.bench.problems.base import Params, Task
from hypergrad.composite import Composite
from hypergrad.methods import Implicit, hypergradient
from hypergrad.solvers import CG, Exact, PenaltyPreconditioner
from hypergrad.trajectory import Trajectory, solved

Walk = Sequence[Point]
"""Consecutive upper steps, each with its true hypergradient."""
Run = Callable[[Sequence[Task]], Iterator[Params]]
"""Yields the hypergradients of consecutive upper steps, one after the other."""
TOLERANCES = tuple(0.3 * 2 ** (-k / 2) for k in range(44))


def measure() -> list[Claim]:
    """Return the three claims."""
    regression = logistic.build()
    truth = hypergradient(
        regression.upper_loss,
        _record(regression),
        regression.upper,
        method=Implicit(Exact()),
        batch=regression.upper_batch,
    ).grad
    return [
        _claim("logistic regression", [(regression, flat(truth))], _sketched, 1e-6, bound=3.0, repeats=15),
        _compiled_claim("hyper-cleaning", list(hypercleaning_steps(20)), _warm, 1e-3, bound=2.0, repeats=4),
        _compiled_claim("BiSSL", list(bissl_steps(20)), _recycled, 1e-2, bound=1.5, repeats=3),
    ]


def _compiled_claim(
    name: str, walk: Walk, ours_at: Callable[[float, bool], Run], target: float, *, bound: float, repeats: int
) -> Claim:
    """Return the ratio over 20 upper steps on compiled products; eager and alone, and what compiling costs, beside."""
    tasks = [task for task, _ in walk]

    def compiled(rtol: float) -> Run:
        return ours_at(rtol, True)

    def eager(rtol: float) -> Run:
        return ours_at(rtol, False)

    with torch.compiler.config.patch(force_disable_caches=True):  # type: ignore[attr-defined]
        began = time.perf_counter()
        next(compiled(target)(tasks))
        compiling = time.perf_counter() - began
    steps = _claim(f"{name}, 20 upper steps in all", walk, compiled, target, bound=bound, repeats=repeats)
    plain = _claim(f"{name}, eager", walk, eager, target, bound=bound, repeats=repeats)
    single = _claim(f"{name}, one", walk[:1], compiled, target, bound=bound, repeats=2 * repeats)
    return replace(
        steps,
        detail=f"{steps.detail}; the first call, not in these times, compiled for {compiling:.0f} s; "
        f"eager: {plain.measured:.3g} times, {plain.detail}; "
        f"a single cold one, compiled: {single.measured:.3g} times, {single.detail}",
    )


def _claim(
    name: str,
    walk: Walk,
    ours_at: Callable[[float], Run],
    target: float,
    *,
    bound: float,
    repeats: int,
) -> Claim:
    """Return the ratio of the times, each side at the loosest tolerance that keeps every step's error."""
    ours, ours_worst, ours_rtol = _loosest(walk, ours_at, target)
    theirs, theirs_worst, theirs_rtol = _loosest(walk, by_hand, target)
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    tasks = [task for task, _ in walk]
    for _ in range(repeats):
        for side, run in (("ours", ours), ("theirs", theirs)):
            began = time.perf_counter()
            for _grad in run(tasks):
                pass
            times[side].append(time.perf_counter() - began)
    ratios = [b / a for a, b in zip(times["ours"], times["theirs"], strict=True)]
    lower, _, upper = quantiles(ratios, n=4)
    measured = median(times["theirs"]) / median(times["ours"])
    return Claim(
        name=f"{name}: how many times shorter than by hand to an error of {target:g}",
        measured=measured,
        spread=(lower, upper),
        bound=f">= {bound:g}",
        holds=measured >= bound,
        detail=f"{1e3 * median(times['ours']):.4g} ms at rtol {ours_rtol:.2g} (largest error {ours_worst:.2g}) against "
        f"{1e3 * median(times['theirs']):.4g} ms at rtol {theirs_rtol:.2g} ({theirs_worst:.2g}), medians of {repeats} "
        f"in turns, {torch.get_num_threads()} threads",
    )


def _loosest(walk: Walk, at: Callable[[float], Run], target: float) -> tuple[Run, float, float]:
    tasks = [task for task, _ in walk]
    for rtol in TOLERANCES:
        run = at(rtol)
        worst = 0.0
        for grad, (_, truth) in zip(run(tasks), walk, strict=False):
            worst = max(worst, error(grad, truth))
            if worst > target:
                break
        if worst <= target:
            return run, worst, rtol
    raise RuntimeError(f"no tolerance down to {TOLERANCES[-1]:g} reaches an error of {target:g}")


def _record(task: Task, loss: Any = None) -> Trajectory:
    return solved(task.lower_loss if loss is None else loss, task.lower, task.lower_batches[0])


def _run(method: Implicit, loss: Any = None) -> Run:
    def run(tasks: Sequence[Task]) -> Iterator[Params]:
        state: torch.Tensor | None = None
        for task in tasks:
            record = _record(task, loss)
            h = hypergradient(task.upper_loss, record, task.upper, method=method, batch=task.upper_batch, state=state)
            state = h.state
            yield h.grad

    return run


def _sketched(rtol: float) -> Run:
    """Return CG preconditioned by the penalties and a sketch, whose products read the images once for all."""
    loss = Composite(logistic.outputs, logistic.criterion, logistic.penalty)
    return _run(Implicit(CG(max_steps=500, rtol=rtol, preconditioner=PenaltyPreconditioner(rank=48))), loss)


def _warm(rtol: float, compile: bool) -> Run:
    """Return CG from the last step's solution and with its directions."""
    return _run(Implicit(CG(max_steps=200, rtol=rtol), warm_start=True, recycle=8, compile=compile))


def _recycled(rtol: float, compile: bool) -> Run:
    """Return CG with the directions of earlier steps."""
    return _run(Implicit(CG(max_steps=200, rtol=rtol), recycle=32, compile=compile))


def by_hand(rtol: float) -> Run:
    """Return the hypergradient as one writes it: taped double backward, conjugate gradients from zero, eager."""

    def solve(task: Task) -> Params:
        task = replace(task, lower=_leaves(task.lower), upper=_leaves(task.upper))
        w, u = list(task.lower.values()), list(task.upper.values())
        value = task.upper_loss(task.lower, task.upper, task.upper_batch)
        outer = torch.autograd.grad(value, w + u, materialize_grads=True)
        loss = task.lower_loss(task.lower, task.upper, task.lower_batches[0])
        slope = torch.autograd.grad(loss, w, create_graph=True)
        sizes = [x.numel() for x in w]

        def split(v: torch.Tensor) -> list[torch.Tensor]:
            return [piece.view_as(x) for piece, x in zip(torch.split(v, sizes), w, strict=True)]

        b = torch.cat([g.reshape(-1) for g in outer[: len(w)]])
        x, r, p = torch.zeros_like(b), b.clone(), b.clone()
        rr = r.dot(r)
        enough = rtol**2 * rr
        while rr > enough:
            q = torch.cat([g.reshape(-1) for g in torch.autograd.grad(slope, w, split(p), retain_graph=True)])
            alpha = float(rr / p.dot(q))
            x.add_(p, alpha=alpha)
            r.sub_(q, alpha=alpha)
            rr, before = r.dot(r), rr
            p = torch.add(r, p, alpha=float(rr / before))
        mixed = torch.autograd.grad(slope, u, split(x), materialize_grads=True)
        return {n: d - m for n, d, m in zip(task.upper, outer[len(w) :], mixed, strict=True)}

    return lambda tasks: map(solve, tasks)


def _leaves(params: Params) -> Params:
    return {name: x.detach().clone().requires_grad_() for name, x in params.items()}
