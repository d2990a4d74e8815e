"""Our own worker: the methods of `hypergrad`, through its functional interface."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import hypergrad
from hypergrad.bench.contenders import SETTLING, SINGLE_LOOP, ladder
from hypergrad.bench.problems.base import Params, Task
from hypergrad.bench.protocol import Offer
from hypergrad.bench.serving import Contender, Outcome, serve
from hypergrad.composite import Composite
from hypergrad.methods import BOME, SAMA, Hypergradient, Implicit, Method, hypergradient
from hypergrad.optim import SGD, Adam, Optimizer
from hypergrad.trajectory import Trajectory, descend, solved


class Hypergrad(Contender):
    """`hypergrad.methods` as the benchmark sees them."""

    def offers(self, task: Task, size: str) -> list[Offer]:
        """Return the ladder of our methods for a task, and for tasks each under one vmap and as a loop."""
        offers = []
        for name, method in ladder(task, size).items():
            compile = {"compile": True} if isinstance(method, Implicit) and method.compile else {}
            if task.kind == "tasks":
                offers += [Offer(name, {"vmap": True}), Offer(name, {"vmap": False})]
            else:
                offers.append(Offer(name, compile))
        return offers

    def prepare(self, task: Task, method: str, settings: dict[str, Any]) -> Callable[[], Outcome]:
        """Return the function that computes one hypergradient."""
        chosen = _method(task, method)
        if task.kind == "tasks":
            return lambda: _over_tasks(task, chosen, together=settings["vmap"])
        if isinstance(chosen, SINGLE_LOOP):
            return _settled(task, chosen)
        return lambda: _outcome(_differentiate(task, chosen, record(task, chosen)))

    def versions(self) -> dict[str, str]:
        """Return ours and PyTorch's."""
        return {"hypergrad": hypergrad.__version__, "torch": str(torch.__version__)}


def _method(task: Task, name: str) -> Method:
    """Return the method of either size's ladder called `name`, or what "module:attribute" names."""
    if ":" in name:
        module, _, attribute = name.partition(":")
        method = vars(importlib.import_module(module)).get(attribute)
        if not isinstance(method, Method):
            raise ValueError(f"method {name!r} must be an hg.Method, got {method!r}.")
        return method
    known = {**ladder(task, "full"), **ladder(task, "quick")}
    if name not in known:
        raise ValueError(f"there is no method {name!r} for problem {task.name!r}. Known are: {', '.join(known)}.")
    return known[name]


def _loss(task: Task, method: Method) -> Callable[..., Tensor]:
    if isinstance(method, Implicit) and method.curvature == "gauss_newton":
        assert task.outputs is not None and task.criterion is not None
        return Composite(task.outputs, task.criterion, task.penalty)
    return task.lower_loss


def record(task: Task, method: Method) -> Trajectory:
    """Return the lower run of a task, or its solution, as a method wants it."""
    if task.kind == "implicit" and not isinstance(method, SAMA):
        return _solved(task, method)
    return _run(task, method, task.lower_batches)


def _solved(task: Task, method: Method) -> Trajectory:
    return solved(_loss(task, method), task.lower, task.lower_batches[0])


def _run(task: Task, method: Method, batches: list[Any]) -> Trajectory:
    return descend(
        _loss(task, method),
        task.lower,
        task.upper,
        optimizer=_optimizer(task),
        batches=batches,
        hyper=task.hyper,
        recording=method.recording(len(batches)),
    )


def _optimizer(task: Task) -> Optimizer:
    if task.optimizer == "adam":
        return Adam(task.lr, weight_decay=task.weight_decay)
    return SGD(task.lr, momentum=task.momentum, weight_decay=task.weight_decay)


def _differentiate(task: Task, method: Method, trajectory: Trajectory, state: Tensor | None = None) -> Hypergradient:
    return hypergradient(
        task.upper_loss, trajectory, task.upper, method=method, batch=task.upper_batch, state=state, throw=False
    )


def _settled(task: Task, method: Method) -> Callable[[], Outcome]:
    """Return one call of a method with a state, as it is after `SETTLING` calls at this upper level."""

    def call(state: Tensor | None) -> Hypergradient:
        if not isinstance(method, BOME):
            return _differentiate(task, method, _solved(task, method), state)
        begun = task.lower if state is None else _solved(task, method).named(state)
        run = descend(task.lower_loss, begun, task.upper, optimizer=SGD(task.lr or 0.1), batches=task.lower_batches[:1])
        return _differentiate(task, method, run, state)

    state: Tensor | None = None
    for _ in range(SETTLING):
        state = call(state).state
    note = f"in its call number {SETTLING + 1}"
    return lambda: replace(_outcome(call(state)), carried=True, note=note)


def _outcome(h: Hypergradient) -> Outcome:
    products = h.stats.get("num_products")
    code = hypergrad.Result(int(cast(Tensor, h.result)))
    note = code.message if code.is_breakdown else ""
    return Outcome(h.grad, None if products is None else int(products), note=note)


def _over_tasks(task: Task, method: Method, *, together: bool) -> Outcome:
    """Return the mean over tasks of the derivative in where each began, under one vmap or one after the other."""

    def one(upper: Params, lower_batches: list[Any], upper_batch: Any) -> Hypergradient:
        trajectory = descend(
            task.lower_loss,
            upper,
            upper,
            optimizer=_optimizer(task),
            batches=lower_batches,
            start=dict,
            recording=method.recording(len(lower_batches)),
        )
        return hypergradient(task.upper_loss, trajectory, upper, method=method, batch=upper_batch, throw=False)

    tree_map = pytree.tree_map
    if together:
        all_of = torch.func.vmap(one, in_dims=(None, 0, 0), randomness="different")
        stacked = all_of(task.upper, task.lower_batches, task.upper_batch)
        return Outcome({name: g.mean(0) for name, g in stacked.grad.items()})
    count = len(pytree.tree_leaves(task.upper_batch)[0])
    total: Params = {}
    for index in range(count):

        def pick(leaf: Any, at: int = index) -> Any:
            return leaf[at] if isinstance(leaf, Tensor) else leaf

        grad = one(task.upper, tree_map(pick, task.lower_batches), tree_map(pick, task.upper_batch)).grad
        total = {name: g + total[name] if total else g for name, g in grad.items()}
    return Outcome({name: g / count for name, g in total.items()})


if __name__ == "__main__":
    serve(Hypergrad())
