"""What the next upper step would see, computed on copies: an engine's levels run functionally, nothing changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from hypergrad._flat import Params
from hypergrad._random import RandomState, random_state
from hypergrad._untouched import untouched
from hypergrad.engine import Engine
from hypergrad.methods import ResponseMethod, best_response
from hypergrad.methods.base import UpperLoss
from hypergrad.network import own
from hypergrad.optim import Bound, read_state
from hypergrad.problem import loss_value
from hypergrad.runner import Runner
from hypergrad.start import Beginning, StartAgain
from hypergrad.step import Recording, Step, take
from hypergrad.trajectory import Trajectory


@dataclass(frozen=True)
class Rehearsal:
    """A lower problem as functional pieces: what `hypergradient` takes.

    Attributes:
        trajectory: the record of its window, run on copies.
        upper: the problems above on which its solution depends, by "problem.parameter".
        reader: the name of the problem above that reads its solution.
        upper_loss: the reader's loss, (lower, upper, batch) -> scalar.
        batch: the reader's batch.
        ran: whether the window could be run; if not, the record holds the present values alone.
    """

    trajectory: Trajectory
    upper: Params
    reader: str
    upper_loss: UpperLoss
    batch: Any
    ran: bool


def rehearse(engine: Engine, name: str, reader: str) -> Rehearsal:
    """Return problem `name` of an engine with its next window run on copies, and the loss of `reader` on top.

    The window begins where the next one would: at the problem's present parameters and optimizer state, or at its
        start. It
    takes the problem's own steps on the batches and at the learning rate of the last one (before the first, on the
    batch that comes next). Of a problem with tasks, the first task is run. Where the optimizer's rule is not known
    here, nothing is run and the present values count as the solution.

    Args:
        engine: parameters, buffers, gradients, optimizer states, data and random state are left as they are.
        name: the lower problem.
        reader: the problem above that reads it.

    Raises:
        ValueError: for an engine with sharded modules.
    """
    if engine.in_place is not None:
        raise ValueError(
            "diagnose and estimate run losses on copies of the parameters, and modules sharded by fully_shard cannot "
            "be run so. Build the same engine on whole, smaller modules, and look at that."
        )
    runner, top = engine.runners[name], engine.runners[reader]
    upper = _above(engine, name, {})
    with untouched(runner.layout.device):
        trajectory, ran = _run(engine, name, upper)
        values = own(name, trajectory.end) | upper
        between = {
            other: _run(engine, other, _above(engine, other, values))[0] for other in _between(engine, name, reader)
        }

    def upper_loss(lower: Params, above: Params, batch: Any) -> Tensor:
        overrides = own(name, lower) | above
        for other, record in between.items():
            overrides = overrides | own(other, _response(engine, other, record, overrides))
        value: Tensor = engine.network.call(
            lambda models: loss_value(top.problem.loss, models, batch, reader)[0], overrides, reader=reader
        )
        return value

    batch = _batch(engine, top)
    if runner.problem.tasks is not None:
        batch = _first_task(batch)
    return Rehearsal(trajectory, upper, reader, upper_loss, batch, ran)


def _between(engine: Engine, name: str, reader: str) -> list[str]:
    """Return the problems through whose solutions the reader's loss depends on `name` as well, highest level first."""
    graph = engine.graph
    lower = [other for other in graph.reaching(reader) if name in graph.depends(other)]
    return sorted(lower, key=lambda other: -graph.level_of[other])


def _response(engine: Engine, name: str, record: Trajectory, values: Params) -> Params:
    """Return the solution of `name` as a function of `values`, by its method."""
    method = engine.graph.problems[name].method
    targets = engine.graph.depends(name)
    upper = {key: value for key, value in values.items() if key.split(".", 1)[0] in targets}
    if engine.graph.partial_hessian or not isinstance(method, ResponseMethod):
        return record.end
    return best_response(record, upper, method=method, throw=False)


def _run(engine: Engine, name: str, upper: Params) -> tuple[Trajectory, bool]:
    """Return the record of a window of `name` at `upper`, and whether it could be run."""
    runner = engine.runners[name]
    try:
        bound, ran = runner.bind(opaque=False), True
    except ValueError:
        bound, ran = runner.bind(opaque=True), False
    drawn = random_state(bound.layout.device)
    flat, states = _begin(runner, bound, upper, ran=ran)
    recipe = runner.recipe(bound)
    batches = _window(engine, runner) if ran else _window(engine, runner)[-1:]
    steps: list[Step] = []
    for index, batch in enumerate(batches):
        values = own(name, bound.layout.unravel(flat)) | upper
        records = {other: _run(engine, other, _above(engine, other, values))[0] for other in runner.losses.nested}
        step = Step(recipe, runner.surrounded(batch, records), index, random_state(bound.layout.device))
        if ran:
            step, flat, states = take(step, flat, states, upper, Recording(), len(batches))
        steps.append(step)
    begins = ran and runner.problem.start is not None and (runner.problem.restarts or runner.num_steps == 0)
    trajectory = Trajectory(
        layout=bound.layout,
        end_flat=flat,
        names=tuple(runner.used),
        loss=runner.loss,
        steps=tuple(steps),
        end_states=states if ran else (),
        start=_start(runner, drawn) if begins else None,
        response=runner.response,
    )
    return trajectory, ran


def _begin(runner: Runner, bound: Bound, upper: Params, *, ran: bool) -> tuple[Tensor, tuple[Any, ...]]:
    """Return the flat parameters and optimizer states at which the next window would begin."""
    problem = runner.problem
    anew = ran and (problem.restarts or (problem.start is not None and runner.num_steps == 0))
    if not anew:
        flat = bound.layout.ravel({key: p.detach() for key, p in runner.used.items()})
        return flat, read_state(problem.optimizer, bound, runner.used) if ran else ()
    if problem.start is not None:
        params = {key: v.detach() for key, v in _start(runner, None)(upper).items()}
    elif runner.initial is not None:
        params = {key: runner.initial["parameters"][key] for key in runner.used}
    else:
        params = {key: p.detach() for key, p in runner.used.items()}
    flat = bound.layout.ravel(params)
    return flat, bound.fresh(flat)


def _start(runner: Runner, drawn: RandomState | None) -> Callable[[Params], Params]:
    """Return where the problem begins as a function of `upper`, with the random draws that follow `drawn`."""
    assert runner.start is not None
    return StartAgain(runner.start, Beginning(drawn, {}), frozenset(runner.used))


def _above(engine: Engine, name: str, values: Params) -> Params:
    """Return the parameters of the problems on which `name` depends, from `values` where they are given."""
    upper: Params = {}
    for target in engine.graph.depends(name):
        upper.update(engine.network.variables(target))
    return {key: values.get(key, value) for key, value in upper.items()}


def _window(engine: Engine, runner: Runner) -> list[Any]:
    """Return one batch for each own step: those of the last window, or the same one for all."""
    problem = runner.problem
    if len(runner.batches) == problem.steps:
        return list(runner.batches)
    if runner.source is not None:
        batches = [runner.source.recent()] * problem.steps
    else:
        parent = engine.parent(problem)
        batches = [problem.select_from(_batch(engine, parent), index) for index in range(problem.steps)]
    return batches if problem.tasks is None else [_first_task(batch) for batch in batches]


def _batch(engine: Engine, runner: Runner) -> Any:
    """Return the batch that the problem used last, or will use first; nothing is drawn."""
    if runner.source is not None:
        return runner.source.recent()
    return runner.problem.select_from(_batch(engine, engine.parent(runner.problem)), 0)


def _first_task(batch: Any) -> Any:
    return pytree.tree_map(lambda x: x[0] if isinstance(x, Tensor) else x, batch)
