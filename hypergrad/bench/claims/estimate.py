"""What `hg.estimate` says beforehand against what is measured, over the quick suite: memory within 25%, time within 2x.

Memory is the peak of what PyTorch's allocator hands out in one call, the figure that `torch.cuda.max_memory_allocated`
gives on an accelerator and what decides whether a problem fits there. Beside it stands the rise of the process's
resident size, without a bound: on the host it holds what no allocator of tensors sees, scratch space of the convolution
and matrix libraries, freed blocks that the C library keeps, pages of code on their first use. Times are ratios: of a
call to a gradient of the lower loss, timed in turn with it.

    python -m hypergrad.bench.claims.estimate ridge logistic
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from hypergrad.bench.claims.base import Claim
from hypergrad.bench.problems import catalogue as problems
from hypergrad.bench.problems.base import Task
from hypergrad.bench.weighing import allocated_bytes, peak_bytes
from hypergrad.bench.worker import record
from hypergrad.costs import estimate
from hypergrad.methods import F2SA, SAMA, FiniteDifference, Implicit, Method, OneStep, Unrolled, hypergradient
from hypergrad.solvers import CG, Neumann
from hypergrad.trajectory import Trajectory

MEMORY, TIME = 1.25, 2.0
REPEATS = 5
SMALL = 2**20
"""Bytes below which pages and first blocks decide the resident size."""


@dataclass(frozen=True)
class Comparison:
    """One method on one problem.

    Attributes:
        problem, method: their names.
        estimated_bytes, allocated_bytes, resident_bytes: the peak: beforehand, by the allocator, of the process.
        estimated_gradients: time beforehand, in gradients of the lower loss, run included.
        gradients: the same as measured, of each repeat.
    """

    problem: str
    method: str
    estimated_bytes: int
    allocated_bytes: int
    resident_bytes: int
    estimated_gradients: float
    gradients: tuple[float, ...]

    @property
    def label(self) -> str:
        """Return both names."""
        return f"{self.problem}, {self.method}"


def measure() -> list[Claim]:
    """Return the claims about memory and time over all problems of the suite with one lower level."""
    found = [comparison for name in problems.names() for comparison in compare(name)]
    large = [c for c in found if c.estimated_bytes >= SMALL]
    return [
        _claim("memory as allocated", MEMORY, [(c.label, c.estimated_bytes / c.allocated_bytes) for c in found]),
        _claim(
            f"memory as resident, from {SMALL // 2**20} MiB on",
            MEMORY,
            [(c.label, c.estimated_bytes / max(c.resident_bytes, 1)) for c in large],
            beside=True,
        ),
        _claim("time", TIME, [(c.label, c.estimated_gradients / median(c.gradients)) for c in found]),
    ]


def compare(name: str) -> list[Comparison]:
    """Return the comparisons on a problem; none on one whose lower levels are many."""
    task = problems.build(name, size="quick", seed=0, dtype=torch.float32)
    if task.kind == "tasks":
        return []
    found = []
    runs = {label: _call(task, method) for label, method in methods(task).items()}
    timed = _times(runs, _gradient(task))
    resident = {label: peak_bytes(run) for label, run in runs.items()}  # before an estimate leaves its own objects
    for label, method in methods(task).items():
        trajectory = record(task, method)
        costs = estimate(task.upper_loss, trajectory, task.upper, methods={label: method}, batch=task.upper_batch)
        row = costs[label]
        found.append(
            Comparison(
                name,
                label,
                row.memory_bytes,
                allocated_bytes(runs[label]),
                resident[label],
                row.gradient_equivalents + (row.run_equivalents if trajectory.steps else 0.0),
                timed[label],
            )
        )
    return found


def methods(task: Task) -> dict[str, Method]:
    """Return what is compared on a problem: of each family one, its solver at a fixed number of steps."""
    step = task.lr or 0.1
    if task.kind == "implicit":
        return {
            "CG 10": Implicit(CG(10, rtol=0.0, check_every=None)),
            "Neumann 10": Implicit(Neumann(10)),
            "OneStep": OneStep(step),
            "FiniteDifference": FiniteDifference(step_size=step),
            "F2SA": F2SA(strength=10.0, step_size=step / 20),
        }
    found: dict[str, Method] = {"Unrolled": Unrolled(), "Unrolled, retain 1": Unrolled(retain=1.0)}
    if task.hyper is None:
        found |= {"OneStep": OneStep(), "SAMA": SAMA()}
    return found


def _call(task: Task, method: Method) -> Callable[[], object]:
    def run() -> object:
        trajectory: Trajectory = record(task, method)
        return hypergradient(
            task.upper_loss, trajectory, task.upper, method=method, batch=task.upper_batch, throw=False
        )

    return run


def _gradient(task: Task) -> Callable[[], object]:
    def run() -> tuple[Tensor, ...]:
        lower = {name: w.detach().requires_grad_() for name, w in task.lower.items()}
        return torch.autograd.grad(task.lower_loss(lower, task.upper, task.lower_batches[0]), list(lower.values()))

    return run


def _times(runs: dict[str, Callable[[], object]], gradient: Callable[[], object]) -> dict[str, tuple[float, ...]]:
    """Return each run's time in gradients at each repeat, all timed in turn, after one call of each."""
    for run in (gradient, *runs.values()):
        run()
    found: dict[str, list[float]] = {label: [] for label in runs}
    for _ in range(REPEATS):
        for label, run in runs.items():
            unit = min(_seconds(gradient) for _ in range(3))
            found[label].append(_seconds(run) / unit)
    return {label: tuple(times) for label, times in found.items()}


def _seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def _claim(what: str, bound: float, ratios: list[tuple[str, float]], *, beside: bool = False) -> Claim:
    """Return the claim that all ratios of estimated to measured lie within a factor; the worst one decides.

    With `beside` nothing is claimed: the ratios are reported, and which of them lie outside.
    """
    low = 2 - bound if what.startswith("memory") else 1 / bound
    worst = max(ratios, key=lambda pair: abs(math.log(max(pair[1], 1e-9))))
    ordered = sorted(ratio for _, ratio in ratios)
    outside = [f"{label} {ratio:.2f}" for label, ratio in ratios if not low <= ratio <= bound]
    quarters = (ordered[len(ordered) // 4], ordered[3 * len(ordered) // 4])
    return Claim(
        f"hg.estimate: {what}, estimated / measured, the worst of {len(ratios)}",
        worst[1],
        quarters,
        "(reported beside)" if beside else f"{low:g} to {bound:g}",
        beside or not outside,
        f"worst: {worst[0]}; median {median(ordered):.2f}, from {ordered[0]:.2f} to {ordered[-1]:.2f}; "
        f"outside {low:g} to {bound:g}: " + ("; ".join(outside) or "none"),
    )


if __name__ == "__main__":
    for asked in sys.argv[1:]:
        for c in compare(asked):
            estimated, allocated, resident = c.estimated_bytes, c.allocated_bytes, c.resident_bytes
            print(
                f"{c.label}: {estimated / 2**20:.3f} MiB estimated, {allocated / 2**20:.3f} allocated "
                f"({estimated / allocated:.2f}), {resident / 2**20:.3f} resident ({estimated / max(resident, 1):.2f}); "
                f"{c.estimated_gradients:.3g} gradients estimated, {median(c.gradients):.3g} measured "
                f"({c.estimated_gradients / median(c.gradients):.2f})",
                flush=True,
            )
