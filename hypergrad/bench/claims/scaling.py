"""Cost grows linearly: in the number of parameters, from 1e4 to 1e7, and in the number of lower steps K.

The slope of log(cost) against log(size), least squares: 1 is linear. At the small end a constant overhead, at the
large end the cache, bend the line, so the bound is on the slope between the largest sizes, where cost matters; the
slope over all sizes is in the detail. Figures: `scaling.py FILE.svg` draws both lines.

    python -m hypergrad.bench.claims.scaling docs/scaling_cost.svg
"""

from __future__ import annotations

import importlib
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hypergrad.bench.claims.base import Claim
from hypergrad.bench.problems.base import Params
from hypergrad.bench.weighing import peak_bytes
from hypergrad.methods import Implicit, Method, Unrolled, hypergradient
from hypergrad.optim import SGD
from hypergrad.solvers import CG
from hypergrad.trajectory import descend

SIZES = (10_000, 100_000, 1_000_000, 10_000_000)
STEPS = (10, 40, 160, 640)
BOUND = 1.15
BATCH = 64
REPEATS = 7
EXAMPLES = "a perceptron with two hidden layers on batches of 64"


@dataclass(frozen=True)
class Line:
    """Cost against size.

    Attributes:
        name: what was run.
        axis: what grows: "parameters" or "steps".
        sizes: how far.
        seconds: of each repeat at each size.
        peaks: bytes above the start at each size.
    """

    name: str
    axis: str
    sizes: tuple[int, ...]
    seconds: tuple[tuple[float, ...], ...]
    peaks: tuple[int, ...]

    def medians(self) -> list[float]:
        """Return the median time at each size."""
        return [float(np.median(times)) for times in self.seconds]


def measure() -> list[Claim]:
    """Return the claims that time and memory grow linearly."""
    return [claim for line in lines() for claim in _claims(line)]


def lines() -> list[Line]:
    """Return the measured lines: CG in the number of parameters, an unrolled run in parameters and in steps."""
    solve, unrolled = Implicit(CG(10, rtol=0.0)), Unrolled()
    heads = [
        ("Implicit(CG(10))", "parameters", SIZES, [_case(n, 1, solve) for n in SIZES]),
        ("Unrolled(), 10 steps", "parameters", SIZES, [_case(n, 10, unrolled) for n in SIZES]),
        ("Unrolled(), 100,000 parameters", "steps", STEPS, [_case(100_000, k, unrolled) for k in STEPS]),
    ]
    seconds = [_times(runs) for *_, runs in heads]
    peaks = [tuple(map(peak_bytes, runs)) for *_, runs in heads]  # after the times, which weighing changes
    return [Line(name, axis, sizes, s, p) for (name, axis, sizes, _), s, p in zip(heads, seconds, peaks, strict=True)]


def _times(runs: Sequence[Callable[[], object]]) -> tuple[tuple[float, ...], ...]:
    """Return the seconds of each, the repeats interleaved so that a slow minute slows them all.

    Each is called once before it is timed: what the larger one before it has left in memory is not its own cost.
    """
    seconds: list[list[float]] = [[] for _ in runs]
    for _ in range(REPEATS):
        for run, times in zip(runs, seconds, strict=True):
            run()
            began = time.perf_counter()
            run()
            times.append(time.perf_counter() - began)
    return tuple(map(tuple, seconds))


def _case(num_params: int, steps: int, method: Method) -> Callable[[], object]:
    """Return a hypergradient on a perceptron with about `num_params` parameters; each image has a weight above."""
    width = int((-138 + (138**2 + 4 * (num_params - 10)) ** 0.5) / 2)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / math.sqrt(shape[-1])

    lower = {
        "0.weight": draw(width, 126),
        "0.bias": torch.zeros(width),
        "1.weight": draw(width, width),
        "1.bias": torch.zeros(width),
        "2.weight": draw(10, width),
        "2.bias": torch.zeros(10),
    }
    batch = draw(BATCH, 126) * 126**0.5, torch.randint(10, (BATCH,), generator=generator)

    def logits(w: Params, x: Tensor) -> Tensor:
        for layer in range(2):
            x = F.silu(F.linear(x, w[f"{layer}.weight"], w[f"{layer}.bias"]))
        return F.linear(x, w["2.weight"], w["2.bias"])

    def lower_loss(w: Params, u: Params, at: Any) -> Tensor:
        fit = (torch.sigmoid(u["weight"]) * F.cross_entropy(logits(w, at[0]), at[1], reduction="none")).mean()
        return fit + 0.5 * torch.stack([p.square().sum() for p in w.values()]).sum()

    def upper_loss(w: Params, _u: Params, at: Any) -> Tensor:
        return F.cross_entropy(logits(w, at[0]), at[1])

    upper = {"weight": torch.zeros(BATCH)}

    def run() -> object:
        traj = descend(
            lower_loss,
            lower,
            upper,
            optimizer=SGD(0.01),
            batches=[batch] * steps,
            recording=method.recording(steps),
        )
        return hypergradient(upper_loss, traj, upper, method=method, batch=batch, throw=False).grad

    return run


def _claims(line: Line) -> list[Claim]:
    sizes, medians = np.log(line.sizes), np.log(line.medians())
    repeats = np.log(np.array(line.seconds))
    slopes = [float(np.polyfit(sizes[-2:], column[-2:], 1)[0]) for column in repeats.T]
    slope = float(np.polyfit(sizes[-2:], medians[-2:], 1)[0])
    spread = (float(np.quantile(slopes, 0.25)), float(np.quantile(slopes, 0.75)))
    overall = float(np.polyfit(sizes, medians, 1)[0])
    times = ", ".join(f"{n:,}: {1e3 * t:.3g} ms" for n, t in zip(line.sizes, line.medians(), strict=True))
    found = Claim(
        f"{line.name}: time against {line.axis}, slope between the two largest (1 is linear)",
        slope,
        spread,
        f"<= {BOUND}",
        slope <= BOUND,
        f"{times}; slope over all {overall:.2f}; {EXAMPLES}, medians of {REPEATS}",
    )
    peaks = np.log(np.maximum(line.peaks, 1))
    memory = float(np.polyfit(sizes[-2:], peaks[-2:], 1)[0])
    weights = ", ".join(f"{n:,}: {b / 2**20:.3g} MiB" for n, b in zip(line.sizes, line.peaks, strict=True))
    return [
        found,
        replace(
            found,
            name=f"{line.name}: peak memory against {line.axis}, slope between the two largest",
            measured=memory,
            spread=None,
            holds=memory <= BOUND,
            detail=f"{weights}; {EXAMPLES}",
        ),
    ]


def draw(measured: list[Line], path: str) -> None:
    """Write a figure of the lines, time and memory, with a slope of 1 beside each."""
    importlib.import_module("matplotlib").use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    figure, axes = pyplot.subplots(2, 2, figsize=(9.5, 7), layout="constrained")
    for line in measured:
        column = 0 if line.axis == "parameters" else 1
        for row, (values, unit) in enumerate(((line.medians(), "seconds"), ([b / 2**20 for b in line.peaks], "MiB"))):
            axis = axes[row][column]
            (drawn,) = axis.loglog(line.sizes, values, marker="o", label=line.name)
            linear = [values[-1] * n / line.sizes[-1] for n in line.sizes]
            axis.loglog(line.sizes, linear, color=drawn.get_color(), linestyle=":", linewidth=1)
            axis.set_xticks(line.sizes, [f"{n:,}" for n in line.sizes])
            axis.minorticks_off()
            axis.set_xlabel("lower parameters" if column == 0 else "lower steps K")
            axis.set_ylabel(unit if row == 0 else f"{unit} above the start")
            axis.grid(True, color="#eeeeee")
            axis.spines[["top", "right"]].set_visible(False)
            axis.legend(fontsize=8, frameon=False)
    figure.suptitle("Cost of a hypergradient, run included (dotted: exactly linear through the last point)")
    figure.savefig(path)


if __name__ == "__main__":
    found = lines()
    draw(found, sys.argv[1])
