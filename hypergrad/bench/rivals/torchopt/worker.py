"""TorchOpt: `custom_root` for solved lower problems, its functional and its meta optimizers for runs, vmap over tasks.

.rivals/torchopt/bin/python hypergrad/bench/rivals/torchopt/worker.py < requests
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torchopt
from torch import Tensor
from torchopt import linear_solve
from torchopt.diff.implicit import custom_root

sys.path.append(str(Path(__file__).resolve().parents[3]))  # the folder that holds `bench`
from bench.problems.base import Params, Task
from bench.protocol import Offer
from bench.rivals.batches import split
from bench.rivals.curvature import step_size
from bench.rivals.holder import Holder, by_name, solved_loss
from bench.serving import Contender, Outcome, serve

Tensors = tuple[Tensor, ...]


class TorchOpt(Contender):
    """Implicit differentiation with its linear solvers, unrolled differentiation, and tasks in a loop or vmapped."""

    def offers(self, task: Task, size: str) -> list[Offer]:
        """Return a ladder of tolerances, or each way to differentiate a run."""
        few = size == "quick"
        tolerances = (1e-2, 1e-4, 1e-6) if few else (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
        cg = [Offer("cg", {"rtol": rtol}) for rtol in tolerances]
        if task.kind == "tasks":
            return [Offer("loop"), Offer("vmap"), *(cg if task.converged else [])]
        if task.kind == "unrolled":
            return [] if task.hyper else [Offer("functional"), Offer("meta")]
        step = step_size(task)
        return [
            *cg,
            *(Offer("normal_cg", {"rtol": rtol}) for rtol in ((1e-4,) if few else (1e-2, 1e-4))),
            *(Offer("ns", {"maxiter": n, "alpha": step}) for n in ((20, 160) if few else (10, 40, 160))),
        ]

    def prepare(self, task: Task, method: str, settings: dict[str, Any]) -> Callable[[], Outcome]:
        """Return the function that is timed."""
        if task.kind == "implicit":
            return _implicit(task, method, settings)
        if method == "cg":
            return _each_solution(task, settings)
        if task.kind == "tasks":
            return _each_task(task) if method == "loop" else _vmapped(task)
        return lambda: Outcome(_meta(task) if method == "meta" else _functional(task))

    def versions(self) -> dict[str, str]:
        """Return those of the library and of PyTorch."""
        return {"torchopt": version("torchopt"), "torch": torch.__version__}


def _implicit(task: Task, method: str, settings: dict[str, Any]) -> Callable[[], Outcome]:
    """Return the backward pass of the upper loss through `custom_root`."""
    lower_names, upper_names = list(task.lower), list(task.upper)
    loss, batch = solved_loss(task), task.lower_batches[0]
    count = 0

    def counted(solve: Callable[..., Any]) -> Callable[..., Any]:
        def counting(matvec: Callable[[Any], Any], b: Any) -> Any:
            def product(v: Any) -> Any:
                nonlocal count
                count += 1
                return matvec(v)

            return solve(product, b)

        return counting

    solvers = {
        "cg": linear_solve.solve_cg,
        "normal_cg": linear_solve.solve_normal_cg,
        "ns": lambda **options: linear_solve.solve_inv(ns=True, **options),
    }

    def objective(lower: Tensors, upper: Tensors) -> Tensor:
        return loss(by_name(lower_names, lower), by_name(upper_names, upper), batch)

    @custom_root(torch.func.grad(objective, argnums=0), argnums=1, solve=counted(solvers[method](**settings)))
    def solution(lower: Tensors, upper: Tensors) -> Tensors:  # noqa: ARG001 - what `custom_root` differentiates by
        return lower

    lower = tuple(task.lower.values())
    upper = tuple(u.detach().clone().requires_grad_() for u in task.upper.values())

    def run() -> Outcome:
        nonlocal count
        count = 0
        named = by_name(lower_names, solution(lower, upper)), by_name(upper_names, upper)
        grads = torch.autograd.grad(task.upper_loss(*named, task.upper_batch), upper, materialize_grads=True)
        return Outcome(by_name(upper_names, grads), count)

    return run


def _each_solution(task: Task, settings: dict[str, Any]) -> Callable[[], Outcome]:
    """Return the loop over tasks of an inner solver under `custom_root`."""
    names, upper_names = list(task.lower), list(task.upper)
    runs = [split(batch) for batch in task.lower_batches]
    ends = split(task.upper_batch)
    upper = tuple(u.detach().clone().requires_grad_() for u in task.upper.values())

    def objective(lower: Tensors, upper: Tensors, number: int) -> Tensor:
        return task.lower_loss(by_name(names, lower), by_name(upper_names, upper), runs[0][number])

    @custom_root(torch.func.grad(objective, argnums=0), argnums=1, solve=linear_solve.solve_cg(**settings))
    def solution(lower: Tensors, upper: Tensors, number: int) -> Tensors:
        optimizer = _transformation(task)
        state = optimizer.init(lower)
        with torch.enable_grad():
            for batches in runs:
                loss = task.lower_loss(by_name(names, lower), by_name(upper_names, upper), batches[number])
                updates, state = optimizer.update(torch.autograd.grad(loss, lower), state, params=lower, inplace=True)
                lower = torchopt.apply_updates(lower, updates, inplace=True)
        return lower

    def run() -> Outcome:
        named = by_name(upper_names, upper)
        total = tuple(torch.zeros_like(u) for u in upper)
        for number, upper_batch in enumerate(ends):
            start = tuple(named[name].detach().clone().requires_grad_() for name in names)
            value = task.upper_loss(by_name(names, solution(start, upper, number)), named, upper_batch)
            grads = torch.autograd.grad(value / len(ends), upper, materialize_grads=True)
            total = tuple(a + b for a, b in zip(total, grads, strict=True))
        return Outcome(by_name(upper_names, total))

    return run


def _transformation(task: Task) -> Any:
    if task.optimizer == "adam":
        return torchopt.adam(lr=task.lr, weight_decay=task.weight_decay)
    return torchopt.sgd(lr=task.lr, momentum=task.momentum, weight_decay=task.weight_decay)


def _functional(task: Task) -> Params:
    """Return the hypergradient of a run of a functional optimizer."""
    upper = {name: u.detach().clone().requires_grad_() for name, u in task.upper.items()}
    names = list(task.lower)
    params = tuple(w.detach().clone().requires_grad_() for w in task.lower.values())
    optimizer = _transformation(task)
    state = optimizer.init(params)
    for batch in task.lower_batches:
        loss = task.lower_loss(by_name(names, params), upper, batch)
        grads = torch.autograd.grad(loss, params, create_graph=True)
        updates, state = optimizer.update(grads, state, params=params, inplace=False)
        params = torchopt.apply_updates(params, updates, inplace=False)
    value = task.upper_loss(by_name(names, params), upper, task.upper_batch)
    grads = torch.autograd.grad(value, list(upper.values()), materialize_grads=True)
    return by_name(upper, grads)


def _meta(task: Task) -> Params:
    """Return the hypergradient of a run of a meta optimizer, which steps a module."""
    upper = {name: u.detach().clone().requires_grad_() for name, u in task.upper.items()}
    module = Holder(task.lower)
    if task.optimizer == "adam":
        optimizer = torchopt.MetaAdam(module, lr=task.lr, weight_decay=task.weight_decay)
    else:
        optimizer = torchopt.MetaSGD(module, lr=task.lr, momentum=task.momentum, weight_decay=task.weight_decay)
    for batch in task.lower_batches:
        optimizer.step(module(task.lower_loss, upper, batch))
    value = module(task.upper_loss, upper, task.upper_batch)
    grads = torch.autograd.grad(value, list(upper.values()), materialize_grads=True)
    return by_name(upper, grads)


def _each_task(task: Task) -> Callable[[], Outcome]:
    """Return the loop over tasks: the module adapts by a meta optimizer, then its state is put back."""
    module = Holder({name: task.upper[name] for name in task.lower})
    fixed = module.named()
    upper = fixed | {n: u.detach().clone().requires_grad_() for n, u in task.upper.items() if n not in task.lower}
    runs = [split(batch) for batch in task.lower_batches]
    ends = split(task.upper_batch)

    def run() -> Outcome:
        for u in upper.values():
            u.grad = None
        optimizer = torchopt.MetaSGD(module, lr=task.lr, momentum=task.momentum, weight_decay=task.weight_decay)
        module_state = torchopt.extract_state_dict(module, by="reference")
        optimizer_state = torchopt.extract_state_dict(optimizer, by="reference")
        for number, upper_batch in enumerate(ends):
            for batches in runs:
                optimizer.step(module(task.lower_loss, upper, batches[number]))
            (module(task.upper_loss, upper, upper_batch) / len(ends)).backward()
            torchopt.recover_state_dict(module, module_state)
            torchopt.recover_state_dict(optimizer, optimizer_state)
        return Outcome({name: torch.zeros_like(u) if u.grad is None else u.grad for name, u in upper.items()})

    return run


def _vmapped(task: Task) -> Callable[[], Outcome]:
    """Return all tasks at once: a functional optimizer inside `vmap`, one backward pass for the sum."""
    names = list(task.lower)
    upper = {name: u.detach().clone().requires_grad_() for name, u in task.upper.items()}

    def one(batches: list[Any], upper_batch: Any) -> Tensor:
        optimizer = _transformation(task)
        params = tuple(upper[name] for name in names)
        state = optimizer.init(params)

        def objective(params: Tensors, batch: Any) -> Tensor:
            return task.lower_loss(by_name(names, params), upper, batch)

        for batch in batches:
            grads = torch.func.grad(objective)(params, batch)
            updates, state = optimizer.update(grads, state, params=params, inplace=False)
            params = torchopt.apply_updates(params, updates, inplace=False)
        return task.upper_loss(by_name(names, params), upper, upper_batch)

    def run() -> Outcome:
        value = torch.func.vmap(one)(task.lower_batches, task.upper_batch).mean()
        grads = torch.autograd.grad(value, list(upper.values()), materialize_grads=True)
        return Outcome(by_name(upper, grads))

    return run


if __name__ == "__main__":
    torch.func.vjp(torch.func.grad(torch.sin), torch.zeros(()))  # loads what transforms load at first use, once
    serve(TorchOpt())
