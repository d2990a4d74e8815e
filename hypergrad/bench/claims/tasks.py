"""Sixteen tasks of MAML, five steps, second order, against a loop over `higher`; MAML and iMAML against our own loop.

What is timed is a whole step of the upper level of an engine over `Problem(..., tasks=16, start=...)`. There
`Unrolled(compile=True)` compiles an inner step of all tasks, each way, and the upper loss; compile times are of an
empty cache. Beside it: `descend` and `hypergradient` inside `torch.func.vmap`, that compiled whole by `torch.compile`,
all five steps in one graph, and the same in a Python loop over the tasks.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from hypergrad.bench.claims._problems import (
    TASKS,
    convolutions,
    convolutions_loss,
    mlp,
    mlp_loss,
    tied_convolutions_loss,
    tied_loss,
)
from hypergrad.bench.claims._rival import Gradient, Rival, difference, milliseconds, quartiles, rival
from hypergrad.bench.claims.base import Claim
from hypergrad.bench.problems._episodes import Batch
from hypergrad.bench.problems.base import Params, Task
from hypergrad.engine import Engine
from hypergrad.methods import Implicit, Method, Unrolled, hypergradient
from hypergrad.optim import SGD
from hypergrad.problem import Problem
from hypergrad.solvers import CG
from hypergrad.trajectory import descend

ROUNDS = 5
AGREE = 1e-3
"""The largest relative distance, in float32, at which two gradients count as the same."""
Run = Callable[[], Gradient]
Loss = Callable[..., Tensor]


def measure() -> list[Claim]:
    """Return the claims about tasks."""
    claims = _loops()
    with rival() as higher:
        claims += _network(higher, "mlp", mlp(), eager=None, whole=20.0)
        claims += _network(higher, "convolutions", convolutions(), eager=4.5, whole=None)
    return claims


def _network(higher: Rival, name: str, task: Task, *, eager: float | None, whole: float | None) -> list[Claim]:
    """Return the ratios of the rival's time to ours; those without a bound are reported beside.

    Args:
        higher: the rival.
        name: of the task, in `_problems`.
        task: the sixteen tasks.
        eager: what the ratio of eager runs must be.
        whole: the same of the run compiled as one graph; None to leave that out, for it takes minutes to compile.
    """
    method, compiling = Unrolled(retain=1.0), Unrolled(compile=True)
    together = f"tasks={TASKS}"
    runs: dict[str, Run] = {
        "vmap": _functional(task, method, task.lower_loss),
        together: _engine(task, method, task.lower_loss, chunk=TASKS),
    }
    compiled: dict[str, Run] = {f"{together}, steps compiled": _engine(task, compiling, task.lower_loss, chunk=TASKS)}
    if whole is not None:
        compiled["vmap, compiled whole"] = _functional(task, Unrolled(), task.lower_loss, compile=True)
    bounds = dict.fromkeys(runs, eager) | dict.fromkeys(compiled) | {"vmap, compiled whole": whole}
    first = {way: _cold_seconds(run) for way, run in compiled.items()}
    runs |= compiled
    gradients = {way: run() for way, run in runs.items()}
    theirs: list[float] = []
    ours: dict[str, list[float]] = {way: [] for way in runs}
    reference: Gradient = {}
    for _ in range(ROUNDS):
        answer = higher.unroll(name, repeats=2)
        theirs.append(median(answer.seconds))
        reference = higher.gradient(answer)
        for way, run in runs.items():
            ours[way].append(median(_seconds(run) for _ in range(3)))
    claims = []
    for way in runs:
        bound = bounds[way]
        ratios = [a / b for a, b in zip(theirs, ours[way], strict=True)]
        error = difference(gradients[way], reference)
        detail = f"higher {milliseconds(theirs)}, ours {milliseconds(ours[way])}; gradients differ by {error:.1e}"
        if way in compiled:
            detail += f"; first call {first[way][0]:.0f} s, {_pays(first[way][0], ours[together], ours[way])}"
        holds = error < AGREE and (bound is None or median(ratios) >= bound)
        wanted = ">= 1 (reported beside)" if bound is None else f">= {bound:g}"
        claims.append(
            Claim(f"{TASKS} MAML tasks, {name}: {way}", median(ratios), quartiles(ratios), wanted, holds, detail)
        )
    for way, (seconds, set_up) in first.items():
        title = f"{TASKS} MAML tasks, {name}: seconds to compile, {way}"
        detail = f"of an empty cache, after {set_up:.0f} s that compiling an addition took in this process"
        claims.append(Claim(title, seconds, None, "<= 60", seconds <= 60, detail))
    return claims


def _pays(compile_seconds: float, eager: list[float], compiled: list[float]) -> str:
    """Return after how many upper steps compiling has saved what it took."""
    saved = median(eager) - median(compiled)
    return f"pays after {compile_seconds / saved:.0f} upper steps" if saved > 0 else "never pays"


def _loops() -> list[Claim]:
    """Return how a default `chunk` compares with one task after the other, and with a plain loop over them."""
    maml, imaml = Unrolled(), Implicit(CG(max_steps=5), damping=5.0)
    cases: list[tuple[str, Task, Method, Loss]] = [
        ("MAML, mlp", mlp(), maml, mlp_loss),
        ("MAML, convolutions", convolutions(), maml, convolutions_loss),
        ("iMAML, mlp", mlp(), imaml, tied_loss),
        ("iMAML, convolutions", convolutions(), imaml, tied_convolutions_loss),
    ]
    claims = []
    for name, task, method, loss in cases:
        default, one, loop = (
            _engine(task, method, loss, chunk=None),
            _engine(task, method, loss, chunk=1),
            _functional(task, method, loss, together=False),
        )
        error = max(difference(default(), one()), difference(default(), loop()))
        ours, ones, loops = [], [], []
        for _ in range(ROUNDS):
            ours.append(_seconds(default))
            ones.append(_seconds(one))
            loops.append(_seconds(loop))
        for what, theirs in (("chunk=1", ones), ("a loop over tasks", loops)):
            ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
            claims.append(
                Claim(
                    f"{name}: default chunk against {what}",
                    median(ratios),
                    quartiles(ratios),
                    "<= 1",
                    error < AGREE and median(ratios) <= 1,
                    f"{milliseconds(ours)} against {milliseconds(theirs)}; gradients differ by {error:.1e}",
                )
            )
    return claims


def _seconds(run: Run) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def _cold_seconds(run: Run) -> tuple[float, float]:
    """Return the time of a first call that finds nothing compiled by earlier processes, and of one before it.

    That one compiles an addition: what the compiler tries out of the machine, once, is in its time.
    """
    with importlib.import_module("torch._inductor.utils").fresh_cache():
        began = time.perf_counter()
        torch.compile(lambda x: x + 1)(torch.ones(64))
        set_up = time.perf_counter() - began
        return _seconds(run), set_up


def _functional(task: Task, method: Method, lower_loss: Loss, *, together: bool = True, compile: bool = False) -> Run:
    """Return the tasks' mean hypergradient written with `descend`, under `vmap` or one after the other."""

    def one(support: Batch, query: Batch) -> Params:
        run = descend(
            lower_loss,
            task.upper,
            task.upper,
            optimizer=SGD(lr=task.lr),
            batches=[support] * task.steps,
            start=dict,
            recording=method.recording(task.steps),
        )
        return hypergradient(task.upper_loss, run, task.upper, method=method, batch=query, throw=False).grad

    def loop(support: Batch, query: Batch) -> Params:
        pairs = zip(zip(*support, strict=True), zip(*query, strict=True), strict=True)
        grads = [one((sx, sy), (qx, qy)) for (sx, sy), (qx, qy) in pairs]
        return {name: torch.stack([grad[name] for grad in grads]) for name in task.upper}

    each = torch.func.vmap(one) if together else loop

    def mean(support: Batch, query: Batch) -> Params:
        return {name: g.mean(0) for name, g in each(support, query).items()}

    run = torch.compile(mean, fullgraph=True, dynamic=False) if compile else mean
    return lambda: run(task.lower_batches[0], task.upper_batch)


class _Network(nn.Module):
    """Parameters whose names may hold dots."""

    def __init__(self, params: Params) -> None:
        super().__init__()
        self.names = list(params)
        self.values = nn.ParameterList([p.clone() for p in params.values()])

    def forward(self) -> Params:
        return dict(zip(self.names, self.values, strict=True))


def _engine(task: Task, method: Method, of_task: Loss, *, chunk: int | None) -> Run:
    """Return a step of an engine over the same tasks; the upper learning rate of 0 leaves them where they are."""
    learner, meta = _Network(task.upper), _Network(task.upper)
    tied = of_task is not task.lower_loss

    def lower_loss(m: Any, batch: Any) -> Tensor:
        return of_task(m.learner(), m.meta() if tied else {}, batch["support"])

    lower = Problem(
        "learner",
        module=learner,
        loss=lower_loss,
        optimizer=torch.optim.SGD(learner.parameters(), lr=task.lr),
        steps=task.steps,
        tasks=TASKS,
        chunk=chunk,
        start=lambda m: dict(m.meta.named_parameters()),
        method=method,
    )
    upper = Problem(
        "meta",
        module=meta,
        loss=lambda m, batch: task.upper_loss(m.learner(), {}, batch["query"]),
        optimizer=torch.optim.SGD(meta.parameters(), lr=0.0),
        data=[{"support": task.lower_batches[0], "query": task.upper_batch}],
    )
    engine = Engine([lower, upper])

    def run() -> Gradient:
        engine.step()
        return {name: p.grad.clone() for name, p in zip(meta.names, meta.values, strict=True) if p.grad is not None}

    return run
