"""What each method will cost on a problem of the user's own: time, memory and communication, before anything runs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, overload

import torch
from torch import Tensor

from hypergrad._flat import Params, as_params
from hypergrad._functional import in_transform, scalar
from hypergrad._random import replaying
from hypergrad._result import Stats
from hypergrad._tape import gradient
from hypergrad._untouched import untouched
from hypergrad.costs._counting import Counting
from hypergrad.costs._meter import Meter, Rates, Reading
from hypergrad.costs._table import Cost, Estimate, Estimates
from hypergrad.costs._without_values import emptied, emptied_run, needs_values, run_again, shapes_only
from hypergrad.costs.communication import hypergradient as sent_by
from hypergrad.costs.communication import total_bytes
from hypergrad.diagnosis._advice import describe
from hypergrad.diagnosis._rehearsal import rehearse
from hypergrad.engine import Engine
from hypergrad.methods import (
    F2SA,
    SAMA,
    SOBA,
    FiniteDifference,
    Implicit,
    Method,
    OneStep,
    Penalty,
    Reptile,
    StocBiO,
    Unrolled,
    hypergradient,
)
from hypergrad.methods.base import UpperLoss
from hypergrad.methods.evaluate import check_arguments
from hypergrad.solvers import CG
from hypergrad.trajectory import Trajectory

Seconds = float | Literal["measure"] | None


Methods = Sequence[Method] | Mapping[str, Method]


@overload
def estimate(
    engine: Engine, /, *, methods: Methods | None = None, ranks: int = 1, gradient_seconds: Seconds = None
) -> Estimates: ...


@overload
def estimate(
    upper_loss: UpperLoss,
    traj: Trajectory,
    upper: Mapping[str, Tensor],
    /,
    *,
    methods: Methods | None = None,
    batch: Any = None,
    ranks: int = 1,
    gradient_seconds: Seconds = None,
) -> Estimate: ...


def estimate(
    engine_or_upper_loss: Engine | UpperLoss,
    traj: Trajectory | None = None,
    upper: Mapping[str, Tensor] | None = None,
    /,
    *,
    methods: Methods | None = None,
    batch: Any = None,
    ranks: int = 1,
    gradient_seconds: Seconds = None,
) -> Estimate | Estimates:
    r"""Return what methods will cost per upper step: time in lower gradients, memory, communication.

    .. math:: \text{time} = \frac{t_1 + \sum_\text{kernels} \big(t_0 + \max(\text{FLOPs} / F,\; \text{bytes} / B)\big)}
        {\text{the sum of one lower gradient}}, \qquad
        \text{communication} = 2\, \frac{R - 1}{R}\, \big(a\, n + b\, m\big)

    with a nominal time t_1 of a call and t_0 of a launch, arithmetic rate F and bandwidth B, n and m the bytes of the
    lower and upper parameters, R the ranks, and the a and b vectors of each that the method's all-reduces hold.
    Each method runs whole, its lower run included, on tensors that have shapes but no values: every kernel of the
    forward and of both derivatives is counted, and each storage is followed from where it is made to where it is freed.
    Nothing is allocated; modules, data, generators and the accelerator are left alone.

    Cost: Python only: about 0.2 ms a kernel, so some tens of milliseconds for each lower step or product.

    Bias: an iterative solver is taken to use all its steps. `compile=True` is estimated as eager. Memory is what
    tensors hold, and on a CPU what convolutions copy; an allocator that rounds and caches holds more, the more so the
    smaller the problem. Ratios of times suppose that kernels of a kind run at one speed.

    Args:
        engine_or_upper_loss: an `Engine`, or a pure function (lower, upper, batch) -> scalar with the next two
            arguments.
        traj: the lower run, from `descend`, `solved` or `solved_root`; its shapes and batches are used, not its values.
        upper: the upper parameters.
        methods: the methods, or these by name. None for the usual ones, in an engine the problem's own first.
        batch: passed to the upper loss as it is.
        ranks: processes that share the data, >= 1.
        gradient_seconds: the time of one gradient of the lower loss, from which the others follow; "measure" runs five
            of them here; None leaves times in gradients.

    Returns:
        Estimate, or for an engine a dict of them by problem.

    Raises:
        ValueError: for arguments that do not belong together; for losses that need values of tensors.

    Example:
        >>> import torch, hypergrad as hg
        >>> def lower_loss(lower, upper, batch):
        ...     return ((batch @ lower["w"] - upper["c"]) ** 2).sum()
        >>> def upper_loss(lower, upper, batch):
        ...     return (lower["w"] ** 2).sum()
        >>> traj = hg.solved(lower_loss, {"w": torch.zeros(100, 10)}, torch.zeros(50, 100))
        >>> costs = hg.estimate(upper_loss, traj, {"c": torch.zeros(10)}, methods={"CG 5": hg.Implicit(hg.CG(5))})
        >>> costs.gradient.flops == 2 * 2 * 50 * 100 * 10, costs["CG 5"].num_products
        (True, 5)
    """
    if not isinstance(ranks, int) or ranks < 1:
        raise ValueError(f"estimate: ranks must be an int >= 1, got {ranks!r}.")
    given = isinstance(gradient_seconds, int | float) and not isinstance(gradient_seconds, bool)
    if not (gradient_seconds is None or gradient_seconds == "measure" or (given and float(gradient_seconds) > 0)):
        raise ValueError(
            f"estimate: gradient_seconds must be None, 'measure' or a number > 0, got {gradient_seconds!r}."
        )
    named = None if methods is None else _named(methods)
    if isinstance(engine_or_upper_loss, Engine):
        if traj is not None or upper is not None or batch is not None:
            raise ValueError("estimate(engine) takes no run, upper parameters or batch: the engine has them.")
        return _estimate_engine(engine_or_upper_loss, named, ranks, gradient_seconds)
    if traj is None or upper is None:
        raise ValueError("estimate takes an Engine, or (upper_loss, traj, upper) as hypergradient does.")
    check_arguments(traj, upper, OneStep())
    if in_transform():
        raise ValueError("estimate counts kernels and cannot run inside torch.func transforms or torch.compile.")
    seconds = _measured(traj, as_params(upper)) if gradient_seconds == "measure" else gradient_seconds
    with shapes_only(traj.layout.device) as mode:
        scene = _Scene(
            "lower",
            "upper",
            engine_or_upper_loss,
            emptied_run(mode, traj),
            emptied(mode, as_params(upper)),
            emptied(mode, batch),
        )
        return _examine(scene, _usual(traj) if named is None else named, ranks, seconds)


@dataclass(frozen=True)
class _Scene:
    """What is estimated: what `hypergradient` takes, without values."""

    name: str
    reader: str
    upper_loss: UpperLoss
    trajectory: Trajectory
    upper: Params
    batch: Any
    tasks: int = 1


def _named(methods: Methods) -> dict[str, Method]:
    named = dict(methods) if isinstance(methods, Mapping) else {}
    if not isinstance(methods, Mapping):
        for method in methods:
            named[describe(method) if isinstance(method, Method) else str(method)] = method
    if not named:
        raise ValueError("estimate: methods is empty; leave it None for the usual ones.")
    for name, method in named.items():
        if not isinstance(method, Method):
            raise ValueError(f"estimate: methods must be hypergradient methods, got {method!r} for {name!r}.")
    return named


def _usual(trajectory: Trajectory) -> dict[str, Method]:
    """Return the methods that one would consider for this record."""
    step = None if trajectory.steps else 1.0
    methods: list[Method] = [
        Implicit(CG(10)),
        OneStep(step),
        FiniteDifference(),
        SOBA(step),
        StocBiO(10, step),
        F2SA(step_size=step),
        Penalty(),
    ]
    if trajectory.steps:
        methods[1:1] = [Unrolled(), Unrolled(checkpoint="sqrt"), SAMA()]
    return _named(methods)


def _estimate_engine(
    engine: Engine, methods: dict[str, Method] | None, ranks: int, gradient_seconds: Seconds
) -> Estimates:
    found = Estimates()
    for name, runner in engine.runners.items():
        readers = [other for other in engine.graph.problems if name in engine.graph.reaching(other)]
        if runner.problem.method is None or not readers:
            continue
        for inner in engine.runners.values():
            if inner.source is not None:
                inner.source.recent()  # drawn here, with its values: it will be used
        seconds = gradient_seconds
        if seconds == "measure":
            real = rehearse(engine, name, readers[0])
            seconds = _measured(real.trajectory, real.upper)
        with shapes_only(runner.layout.device) as mode:
            rehearsed = rehearse(engine, name, readers[0])
            scene = _Scene(
                name,
                readers[0],
                rehearsed.upper_loss,
                emptied_run(mode, rehearsed.trajectory),
                emptied(mode, rehearsed.upper),
                emptied(mode, rehearsed.batch),
                runner.problem.tasks or 1,
            )
            chosen = methods
            if chosen is None:
                chosen = _named([runner.problem.method]) | _usual(rehearsed.trajectory)
            found[name] = _examine(scene, chosen, ranks, seconds)
    if not found:
        raise ValueError("estimate: no level of this engine differentiates through a problem below it.")
    return found


def _examine(scene: _Scene, methods: Mapping[str, Method], ranks: int, seconds: float | None) -> Estimate:
    rates = Rates.of(scene.trajectory.layout.device)
    one = _one_gradient(scene, rates)
    rows: list[Cost] = []
    refusals: dict[str, str] = {}
    for name, method in methods.items():
        if isinstance(method, Reptile):
            refusals[name] = "Reptile takes no derivative beyond the run."
            continue
        try:
            rows.append(_cost(scene, name, method, one, rates, ranks, seconds))
        except ValueError as refusal:
            refusals[name] = str(refusal)
        except (RuntimeError, TypeError, NotImplementedError) as error:
            if not needs_values(error):
                raise
            refusals[name] = f"{type(method).__name__} reads values of tensors, which an estimate has none of: {error}"
    return Estimate(
        name=scene.name,
        reader=scene.reader,
        num_steps=scene.trajectory.num_steps,
        lower_bytes=_bytes(scene.trajectory.end_flat),
        upper_bytes=sum(_bytes(u) for u in scene.upper.values()),
        gradient=one,
        gradient_seconds=seconds,
        ranks=ranks,
        rows=tuple(rows),
        refusals=refusals,
    )


def _one_gradient(scene: _Scene, rates: Rates) -> Reading:
    """Return what one gradient of the lower loss takes, both losses having been seen to run without values."""
    trajectory = scene.trajectory
    lower = trajectory.named(trajectory.end_flat)
    try:
        with untouched(trajectory.layout.device), Meter(rates) as meter:
            _lower_gradient(trajectory, scene.upper)
            found: Reading = meter.total
            scene.upper_loss(lower, scene.upper, scene.batch)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        if not needs_values(error):
            raise
        raise ValueError(
            "estimate runs the losses on tensors that have shapes but no values, and one of them asks for values "
            f"(.item(), an `if` on a tensor, .numpy(), a boolean mask): {error} Move that out of the losses, into the "
            "batch for instance, or measure one hypergradient instead."
        ) from error
    return found


def _lower_gradient(trajectory: Trajectory, upper: Params) -> Tensor:
    ((batch, random),) = trajectory.samples(1)
    loss, root = trajectory.loss, trajectory.root
    if loss is None:
        assert root is not None
        return trajectory.layout.ravel(root(trajectory.named(trajectory.end_flat), upper, batch))
    with replaying(random):
        return gradient(
            lambda w: scalar(loss(trajectory.named(w), upper, batch), "the lower loss"), trajectory.end_flat
        )


def _cost(
    scene: _Scene,
    name: str,
    method: Method,
    one: Reading,
    rates: Rates,
    ranks: int,
    seconds: float | None,
) -> Cost:
    """Return the row of one method, from a whole run and hypergradient under the meter."""
    eager, solver = _eager(method), None
    if isinstance(eager, Implicit):
        solver = Counting(eager.solver)
        eager = replace(eager, solver=solver)
    with untouched(scene.trajectory.layout.device), Meter(rates) as meter, meter.watching():
        trajectory = run_again(scene.trajectory, scene.upper, eager.recording(scene.trajectory.num_steps))
        ran, record = meter.total, meter.live_bytes
        peak, saved = meter.peak_bytes, meter.peak_saved_bytes
        h = hypergradient(scene.upper_loss, trajectory, scene.upper, method=eager, batch=scene.batch, throw=False)
        spent = meter.total - ran
        peak, saved = max((peak, saved), (meter.peak_bytes, meter.peak_saved_bytes))
        count = _count(meter, h.stats, "num_products") if solver is None else solver.num_products
        gradients = _count(meter, h.stats, "num_gradients") or 0
    tasks = scene.tasks
    own_steps = rates.step * scene.trajectory.num_steps
    times = ((spent.seconds * tasks + rates.call) / one.seconds, (ran.seconds * tasks + own_steps) / one.seconds)
    flat, upper = _bytes(scene.trajectory.end_flat), sum(_bytes(u) for u in scene.upper.values())
    taped = min(saved, peak - record)
    messages = sent_by(
        method,
        scene.trajectory.num_steps,
        products=count or 0,
        gradients=gradients,
        linear=all(step.recipe.is_linear() for step in scene.trajectory.steps),
    )
    return Cost(
        name=name,
        method=method,
        gradient_equivalents=times[0],
        run_equivalents=times[1],
        num_products=count,
        flops=spent.flops * tasks,
        seconds=None if seconds is None else sum(times) * seconds,
        record_bytes=record * tasks,
        tape_bytes=taped * tasks,
        work_bytes=(peak - record - taped) * tasks + _generator_bytes(scene.trajectory.layout.device),
        communication_bytes=round(total_bytes(messages, ranks=ranks, lower=flat, upper=upper)),
    )


def _generator_bytes(device: torch.device) -> int:
    """Return what a call keeps of PyTorch's generator to put back: as it was found, at a step, and within a replay."""
    return 3 * _bytes(torch.get_rng_state()) if device.type == "cpu" else 0


def _eager(method: Method) -> Method:
    """Return the method without compilation, which would have to see through tensors without values."""
    return replace(method, compile=False) if isinstance(method, Implicit | Unrolled) else method


def _count(meter: Meter, stats: Stats, name: str) -> int | None:
    """Return the number that a method has stated as a constant; None where it has not."""
    stated = stats.get(name)
    return None if stated is None else meter.constants.get(stated)  # type: ignore[no-untyped-call]


def _measured(trajectory: Trajectory, upper: Params) -> float:
    """Return the median time of five gradients of the lower loss, after one more."""
    seconds = []
    with untouched(trajectory.layout.device):
        for _ in range(6):
            _synchronize(trajectory.layout.device)
            began = time.perf_counter()
            _lower_gradient(trajectory, upper)
            _synchronize(trajectory.layout.device)
            seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
