"""Many tasks as one lower problem: their parameters side by side in one vector, their losses added up.

Tasks do not depend on one another, so one run of the sum is the run of each, and one sweep back through it the sum of
their sweeps. That holds for methods that treat every parameter by itself, as unrolling does, and not for those that
take norms or inner products over a task's parameters. Only the losses run under `torch.vmap`; what surrounds them costs
what it does for a single task.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hypergrad._autograd import as_leaves, leaf, slopes
from hypergrad._compiled import to_compile
from hypergrad._compiled_check import same
from hypergrad._flat import Layout, Params
from hypergrad._replayed import Calls, Compiled
from hypergrad._result import Result
from hypergrad._stacked import leading
from hypergrad._tape import add
from hypergrad.losses import Surrounded
from hypergrad.methods import Unrolled
from hypergrad.network import Network, own
from hypergrad.optim import Bound
from hypergrad.problem import loss_value
from hypergrad.runner import Runner
from hypergrad.trajectory import Trajectory, descend

Outcome = dict[str, Any]


def can_stack(members: Sequence[Runner]) -> bool:
    """Return whether the tasks of these problems may be run as one lower problem."""
    problems = [member.problem for member in members]
    return all(p.clip_norm is None and (not p.responds or isinstance(p.method, Unrolled)) for p in problems) and not (
        len(problems) > 1 and any(p.hyper for p in problems)  # values that may differ between tasks
    )


def stacked_outcome(
    network: Network,
    top: Runner,
    members: Sequence[Runner],
    upper: Params,
    buffers: Params,
    batch: Any,
    lower_batches: Mapping[str, list[Any]],
    count: int,
) -> Outcome:
    """Return the gradient summed over `count` tasks, with the values and metrics of each.

    Args:
        network: evaluates losses.
        top: the problem whose loss runs per task.
        members: the problems with tasks that it reads, in order; `can_stack` holds of them.
        upper: the variables of `top`.
        buffers: of all these problems, one for each task.
        batch: the reader's batch.
        lower_batches: for each member one batch per own step.
        count: how many tasks buffers and batches lead with.
    """
    records: dict[str, Trajectory] = {}
    ends: Params = {}
    for member in members:
        records[member.name] = _descend(network, member, upper, buffers | ends, lower_batches[member.name], count)
        ends = ends | own(member.name, records[member.name].end)

    flats = {name: record.end_flat for name, record in records.items()}
    layouts = {name: record.layout for name, record in records.items()}
    values, metrics, found = _judged(network, top, members, layouts, flats, upper, buffers, batch)
    grad = {name: torch.zeros_like(u) if (g := found[name]) is None else g for name, u in upper.items()}
    for member in members:
        method, cotangent = member.problem.method, found.get(member.name)
        if isinstance(method, Unrolled) and cotangent is not None:
            grad = add(grad, method.vjp(records[member.name], upper, cotangent).grad)
    code = Result.SUCCESS.tensor(values.device)
    return {"grad": grad, "value": values.detach(), "metrics": metrics, "code": code}


Judgement = tuple[Tensor, Params, dict[str, Tensor | None]]
"""The values and the metrics of each task, and the derivatives of the sum in ends that respond and upper parameters."""


def _judged(
    network: Network,
    top: Runner,
    members: Sequence[Runner],
    layouts: Mapping[str, Layout],
    flats: Params,
    upper: Params,
    buffers: Params,
    batch: Any,
) -> Judgement:
    """Return the reader's loss at the ends of the runs; compiled where a method compiles, if it can be."""
    respond = [member.name for member in members if member.problem.responds]
    judge = _Judge(network, top, layouts, respond)

    def eagerly() -> Judgement:
        with torch.enable_grad():
            ends, at = {name: leaf(flats[name]) for name in respond}, as_leaves(upper)
            values, metrics = judge.values(flats | ends, at, buffers, batch)
            found = slopes(values.sum(), ends | at)
        return values.detach(), metrics, found

    compile = next((m.problem.method.compile for m in members if isinstance(m.problem.method, Unrolled)), False)
    compile = to_compile("Unrolled", compile)
    if not compile:
        return eagerly()
    key = (compile, tuple(layouts.items()))
    if key not in top.compiled:
        top.compiled[key] = Compiled(lambda *arguments: judge.with_slopes(*arguments), compile)
    compiled = top.compiled[key]
    if compiled is None:
        return eagerly()

    def is_right(found: Any) -> bool:
        expected, other = (_joined(values, derivatives, flats | upper) for values, _, derivatives in (eagerly(), found))
        size = expected.norm()
        return same(other, expected, size=size, noise=torch.zeros_like(size), floor=size, compile=compile)

    try:
        value: Judgement | None = Calls(compiled)(None, list(flats.values()), (upper, buffers, batch), is_right)
    except ValueError:  # it draws random numbers, or cannot be compiled: it was not what was asked for
        top.compiled[key] = value = None
    return eagerly() if value is None else value


def _joined(values: Tensor, derivatives: Mapping[str, Tensor | None], like: Params) -> Tensor:
    """Return values and derivatives as one vector."""
    parts = [torch.zeros_like(like[name]) if d is None else d for name, d in derivatives.items()]
    return torch.cat([part.reshape(-1).to(values.dtype) for part in (values, *parts)])


class _Judge:
    """The reader's loss over stacked tasks."""

    def __init__(self, network: Network, top: Runner, layouts: Mapping[str, Layout], respond: Sequence[str]) -> None:
        """Read the ends of runs by `layouts`; derivatives are asked for in those that `respond`."""
        self._network, self._top, self._layouts, self._respond = network, top, layouts, respond

    def values(self, flats: Params, upper: Params, buffers: Params, batch: Any) -> tuple[Tensor, Params]:
        """Return the loss of each task and its metrics."""
        network, top = self._network, self._top

        def of_one(at: Mapping[str, Params], constants: Params, part: Any) -> tuple[Tensor, Params]:
            overrides = upper | constants
            for name, end in at.items():
                overrides = overrides | own(name, end)
            value, found = network.call(
                lambda models: loss_value(top.problem.loss, models, part, top.name), overrides, reader=top.name
            )
            return value, {k: torch.as_tensor(m, device=value.device).detach() for k, m in found.items()}

        at = {name: self._layouts[name].unravel(flat) for name, flat in flats.items()}
        dims = (0, 0 if buffers else None, leading(batch))
        found: tuple[Tensor, Params] = torch.vmap(of_one, in_dims=dims, randomness="different")(at, buffers, batch)
        return found

    def with_slopes(self, flats: list[Tensor], upper: Params, buffers: Params, batch: Any, _: None) -> Judgement:
        """Return the same with the derivatives of the sum."""
        known = dict(zip(self._layouts, flats, strict=True))

        def total(ends: Params, u: Params) -> tuple[Tensor, tuple[Tensor, Params]]:
            values, metrics = self.values(known | ends, u, buffers, batch)
            return values.sum(), (values, metrics)

        ends = {name: known[name] for name in self._respond}
        found, (values, metrics) = torch.func.grad(total, argnums=(0, 1), has_aux=True)(ends, upper)
        return values, metrics, {**found[0], **found[1]}


def _descend(
    network: Network, member: Runner, upper: Params, constants: Params, batches: Sequence[Any], count: int
) -> Trajectory:
    """Return the record of all tasks' runs, from their start or from the module's own parameters."""
    problem, used, bound, begins = member.problem, member.used, member.template(), member.start
    template = {key: p.detach().expand(count, *p.shape) for key, p in used.items()}

    def start(u: Params) -> Params:
        def of_one(constants: Params) -> Params:
            assert begins is not None
            values = begins.values(u | constants)
            return {key: values[key] for key in used}

        if not constants:  # one by one: vmap refuses draws in place where nothing is batched
            several = [of_one({}) for _ in range(count)]
            return {key: torch.stack([values[key] for values in several]) for key in used}
        begun: Params = torch.vmap(of_one, randomness="different")(constants)
        return begun

    def project(params: Params) -> Params:
        projected: Params = torch.vmap(member.project)(params)
        return projected

    def function_of(function: Callable[[Any], Any]) -> Callable[[Params], Any]:
        def value(u: Params) -> Any:
            found = network.call(function, u, reader=problem.name)
            one_each = isinstance(found, Tensor) and found.numel() > 1
            return bound.layout.unravel(found) if one_each else found  # by name it broadcasts to all tasks

        return value

    method = problem.method
    return descend(
        member.summed_loss,
        template,
        upper,
        optimizer=Bound(bound.groups, Layout.of(template, names=bound.names)),
        batches=_surrounded(batches, constants),
        start=None if begins is None else start,
        hyper={name: function_of(function) for name, function in problem.hyper.items()},
        clip_value=problem.clip_value,
        project=None if problem.project is None else project,
        recording=None if method is None else method.recording(len(batches)),
    )


def _surrounded(batches: Sequence[Any], constants: Params) -> list[Surrounded]:
    """Return the batches with the constants, the same object for the same batch."""
    known = {id(batch): Surrounded(batch, {}, constants) for batch in batches}
    return [known[id(batch)] for batch in batches]
