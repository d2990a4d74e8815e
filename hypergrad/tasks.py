"""Many independent copies of a lower problem, run and differentiated together.

Each task is one pure function: run the lower problem from its start, evaluate the reader's loss at its end, pull the
cotangent back by the method. `torch.vmap` runs `chunk` of them at a time; the gradients are averaged. Where the method
allows it the tasks are one lower problem instead (see `stacked_tasks`), which spares the transform's dispatch.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hypergrad._autograd import as_leaves, leaf, slopes
from hypergrad._flat import Params
from hypergrad._random import random_state, restore_random_state
from hypergrad._result import Result
from hypergrad._stacked import leading
from hypergrad._tape import add
from hypergrad.distributed import Ranks, Signals
from hypergrad.losses import Surrounded
from hypergrad.methods import Reptile, ResponseMethod
from hypergrad.network import Network, own
from hypergrad.problem import Problem, loss_value
from hypergrad.runner import Runner
from hypergrad.stacked_tasks import can_stack, stacked_outcome
from hypergrad.trajectory import Trajectory, descend

Outcome = dict[str, Any]
OneTask = Callable[[Params, Params, Any, Any], Outcome]
Together = Callable[[Params, Params, Any, Any, int], Outcome]


def run_tasks(
    network: Network,
    top: Runner,
    members: Sequence[Runner],
    batch: Any,
    lower_batches: dict[str, list[Any]],
    chunk: int | None,
    signals: Signals | None = None,
) -> tuple[Outcome, int]:
    """Return the averaged outcome of all tasks, and the chunk size used (measured once, if `chunk` is None).

    Args:
        network: evaluates losses.
        top: the problem whose loss runs per task.
        members: the problems with tasks that it reads, in order.
        batch: the reader's batch; its tensors lead with the number of tasks, of this rank's where ranks share them.
        lower_batches: for each member one batch per own step, then those that its method draws, likewise.
        chunk: tasks at a time; 1 is a loop.
        signals: of the top level, which travel with its gradient.
    """
    tasks = members[0].problem.tasks
    assert tasks is not None
    ranks = top.ranks
    count = tasks if ranks is None else tasks // ranks.size
    for runner, content in ((top, batch), *((m, lower_batches[m.name]) for m in members)):
        _check_leading(runner.name, content, count)
    upper = network.variables(top.name)
    buffers = _stacked_buffers([top, *members], count)
    one = _one_task(network, top, members)

    together = partial(stacked_outcome, network, top, members) if can_stack(members) else None

    def run(size: int) -> Outcome:
        return _run(one, together, (upper, buffers, batch, lower_batches), count, size)

    if chunk is None:
        chunk = _fastest(run, count, top)
    outcome = run(chunk)
    sent = [] if signals is None else [signals.send(outcome["code"].device)]
    if ranks is None:
        return outcome, chunk
    outcome, received = _over_ranks(ranks, outcome, upper, sent)
    if signals is not None:
        signals.receive(received[0])
    return outcome, chunk


def _over_ranks(ranks: Ranks, outcome: Outcome, upper: Params, sent: list[Tensor]) -> tuple[Outcome, list[Tensor]]:
    """Return the mean outcome and the worst code of all ranks' tasks, by one all-reduce."""
    metrics = outcome["metrics"]
    code: Tensor = outcome["code"]
    kinds = torch.arange(len(Result), device=code.device)
    also = [outcome["value"], (kinds == code).float(), *metrics.values(), *sent]
    grad, (value, codes, *means) = ranks.average_params(outcome["grad"], upper, also)
    averaged = dict(zip(metrics, means, strict=False))
    worst = ((codes > 0) * kinds).max()
    return {"grad": grad, "value": value, "metrics": averaged, "code": worst}, means[len(metrics) :]


def _one_task(network: Network, top: Runner, members: Sequence[Runner]) -> OneTask:
    def one(upper: Params, buffers: Params, batch: Any, lower_batches: Any) -> Outcome:
        records: dict[str, Trajectory] = {}
        ends: Params = {}
        for member in members:
            steps = member.problem.steps
            batches, fresh = lower_batches[member.name][:steps], lower_batches[member.name][steps:]
            record = _descend(network, member, upper, buffers | ends, batches)
            records[member.name] = record.with_fresh([Surrounded(batch, {}, buffers | ends) for batch in fresh])
            ends = ends | own(member.name, records[member.name].end)
        metrics: dict[str, Tensor] = {}

        def upper_loss(at: Mapping[str, Tensor], u: Params) -> Tensor:
            overrides = u | buffers
            for name, record in records.items():
                overrides = overrides | own(name, record.named(at[name]))
            value: Tensor
            value, found = network.call(
                lambda models: loss_value(top.problem.loss, models, batch, top.name), overrides, reader=top.name
            )
            metrics.update({k: torch.as_tensor(m, device=value.device).detach() for k, m in found.items()})
            return value

        with torch.enable_grad():
            flats = {name: record.end_flat for name, record in records.items()}
            respond = {member.name: leaf(flats[member.name]) for member in members if member.problem.responds}
            leaves = as_leaves(upper)
            value = upper_loss(flats | respond, leaves)
            found = slopes(value, respond | leaves)
        value = value.detach()
        direct = {name: torch.zeros_like(u) if (g := found[name]) is None else g for name, u in leaves.items()}
        grad = {name: torch.zeros_like(u) for name, u in upper.items()}
        code = Result.SUCCESS.tensor(value.device)
        for member in members:
            method = member.problem.method
            if not member.problem.responds or method is None:
                continue
            record = records[member.name]
            if isinstance(method, Reptile):
                grad, direct = add(grad, method.direction(record, upper)), {}
                continue
            if isinstance(method, ResponseMethod):
                cotangent = found[member.name]
                if cotangent is None:
                    continue
                pulled = method.vjp(record, upper, cotangent)
                grad = add(grad, pulled.grad)
            else:

                def loss_of_end(lower: Params, u: Params, _: Any, record: Trajectory = record) -> Tensor:
                    (name,) = records
                    return upper_loss({name: record.layout.ravel(lower)}, u)

                pulled = method.total(loss_of_end, record, upper, batch, None)
                grad, direct = add(grad, pulled.grad), {}
            if pulled.result is not None:
                code = torch.maximum(code, pulled.result)
        return {"grad": add(direct, grad), "value": value, "metrics": metrics, "code": code}

    return one


def _descend(network: Network, member: Runner, upper: Params, constants: Params, batches: Sequence[Any]) -> Trajectory:
    """Return the record of one task's run, from its start or from the module's own parameters."""
    problem, begins = member.problem, member.start

    def start(u: Params) -> Params:
        assert begins is not None
        values = begins.values(u | constants)
        return {key: values[key] for key in member.used}

    def function_of(function: Callable[[Any], Any]) -> Callable[[Params], Any]:
        return lambda u: network.call(function, u | constants, reader=problem.name)

    method = problem.method
    record = descend(
        member.pure_loss,
        {key: p.detach() for key, p in member.used.items()},
        upper,
        optimizer=member.template(),
        batches=[Surrounded(batch, {}, constants) for batch in batches],
        start=None if begins is None else start,
        hyper={name: function_of(function) for name, function in problem.hyper.items()},
        clip_norm=problem.clip_norm,
        clip_value=problem.clip_value,
        project=None if problem.project is None else member.project,
        response=member.pure_response,
        recording=None if method is None else method.recording(len(batches)),
    )
    return replace(record, upper_layout=None)


def _run(
    one: OneTask, together: Together | None, inputs: tuple[Params, Params, Any, Any], count: int, chunk: int
) -> Outcome:
    """Return the mean outcome, the worst code, over all tasks, `chunk` at a time."""
    upper, *rest = inputs
    outcomes: list[Outcome] = []
    if chunk == 1:
        device = next(iter(upper.values())).device
        for task in range(count):  # a run leaves the generators as it found them, so each task gets a seed of its own
            seed = int(torch.randint(2**62, ()))
            present = random_state(device)
            torch.manual_seed(seed)
            outcomes.append(one(upper, *(_index(part, task) for part in rest)))
            restore_random_state(present)
        return _mean([_summed(pytree.tree_map(lambda *values: torch.stack(values), *outcomes))], count)
    if together is not None and chunk >= count:
        return _mean([together(*inputs, count)], count)
    if together is not None:
        for at in range(0, count, chunk):
            buffers, batch, lower_batches = (_index(part, slice(at, at + chunk)) for part in rest)
            outcomes.append(together(upper, buffers, batch, lower_batches, min(chunk, count - at)))
        return _mean(outcomes, count)
    size = None if chunk >= count else chunk
    each = torch.vmap(one, in_dims=(None, *map(leading, rest)), chunk_size=size, randomness="different")
    return _mean([_summed(each(upper, *rest))], count)


def _summed(stacked: Outcome) -> Outcome:
    """Return the outcome of several tasks with their gradients added up."""
    return stacked | {"grad": {name: g.sum(0) for name, g in stacked["grad"].items()}, "code": stacked["code"].max()}


def _mean(parts: Sequence[Outcome], count: int) -> Outcome:
    """Return the mean over all tasks of the outcomes of parts of them, and the worst code."""
    metrics = {name: torch.cat([part["metrics"][name] for part in parts]) for name in parts[0]["metrics"]}
    return {
        "grad": {name: g / count for name, g in reduce(add, [part["grad"] for part in parts]).items()},
        "value": torch.cat([part["value"] for part in parts]).mean(),
        "metrics": {name: (m if m.is_floating_point() else m.float()).mean() for name, m in metrics.items()},
        "code": torch.stack([part["code"] for part in parts]).max(),
    }


def _fastest(run: Callable[[int], Outcome], count: int, top: Runner) -> int:
    """Return the faster of all tasks under one vmap and one after the other, by running each here.

    Three times in turn, and the best counts: the first warms up, and a machine is not always quiet.
    """
    if count == 1:
        return 1
    device = top.layout.device
    random = random_state(device)
    best = {count: math.inf, 1: math.inf}
    for _ in range(3):
        for chunk in best:
            restore_random_state(random)
            began = time.perf_counter()
            try:
                float(run(chunk)["value"])
            except RuntimeError as error:
                if chunk == 1:
                    raise
                warnings.warn(
                    f"problem {top.name!r}: its tasks cannot run under vmap ({error}); they run one after the other "
                    f"(chunk=1).",
                    RuntimeWarning,
                    stacklevel=2,
                )
                restore_random_state(random)
                return 1
            best[chunk] = min(best[chunk], time.perf_counter() - began)
    restore_random_state(random)
    return min(best, key=best.__getitem__)


def _stacked_buffers(runners: Sequence[Runner], count: int) -> Params:
    """Return a copy of the problems' buffers for each task."""
    return {
        f"{runner.name}.{key}": buffer.detach().expand(count, *buffer.shape).clone()
        for runner in runners
        for key, buffer in runner.problem.module.named_buffers()
    }


def _index(part: Any, task: int | slice[int, int, None]) -> Any:
    return pytree.tree_map(lambda x: x[task] if isinstance(x, Tensor) else x, part)


def first_task(problem: Problem, batch: Any, count: int) -> Any:
    """Return the first task's part of a batch.

    Raises:
        ValueError: if its tensors do not lead with the number of tasks.
    """
    _check_leading(problem.name, batch, count)
    return _index(batch, 0)


def _check_leading(name: str, content: Any, count: int) -> None:
    for tensor in pytree.tree_leaves(content):
        if isinstance(tensor, Tensor) and (tensor.dim() == 0 or tensor.shape[0] != count):
            raise ValueError(
                f"problem {name!r}: a tensor in its batch has shape {tuple(tensor.shape)}; with tasks={count} every "
                f"tensor of a batch must lead with {count}, one slice per task."
            )
