"""higher: a lower run under `innerloop_ctx`, for one task or, as its documentation has it, for one after the other.

.rivals/higher/bin/python hypergrad/bench/rivals/higher/worker.py < requests
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import higher
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[3]))  # the folder that holds `bench`
from bench.problems.base import Params, Task
from bench.protocol import Offer
from bench.rivals.batches import split
from bench.rivals.holder import Holder, by_name
from bench.serving import Contender, Outcome, serve


class Higher(Contender):
    """Unrolled differentiation, the only kind it has."""

    def offers(self, task: Task, size: str) -> list[Offer]:  # noqa: ARG002 - one way for each task
        """Return the unroll, which has nothing to set; nothing for solved lower problems."""
        return [] if task.kind == "implicit" else [Offer("unroll")]

    def prepare(self, task: Task, method: str, settings: dict[str, Any]) -> Callable[[], Outcome]:  # noqa: ARG002
        """Return the run and its backward pass."""
        if task.kind == "tasks":
            return lambda: Outcome(_each_task(task))
        return lambda: Outcome(_unrolled(task))

    def versions(self) -> dict[str, str]:
        """Return those of the library and of PyTorch."""
        return {"higher": version("higher"), "torch": torch.__version__}


def _unrolled(task: Task) -> Params:
    """Return the hypergradient of a run."""
    upper = {name: u.detach().clone().requires_grad_() for name, u in task.upper.items()}
    module = Holder(task.lower)
    with higher.innerloop_ctx(module, _optimizer(task, module)) as (model, optimizer):
        for step, batch in enumerate(task.lower_batches):
            override = {name: [value(upper, step)] for name, value in task.hyper.items()} if task.hyper else None
            optimizer.step(model(task.lower_loss, upper, batch), override=override)
        value = model(task.upper_loss, upper, task.upper_batch)
        grads = torch.autograd.grad(value, list(upper.values()), materialize_grads=True)
    return by_name(upper, grads)


def _each_task(task: Task) -> Params:
    """Return the hypergradient of the tasks' mean upper loss; each task's run begins at the module's own parameters."""
    module = Holder({name: task.upper[name] for name in task.lower})
    optimizer = _optimizer(task, module)
    upper = module.named() | {
        n: u.detach().clone().requires_grad_() for n, u in task.upper.items() if n not in task.lower
    }
    runs = [split(batch) for batch in task.lower_batches]
    ends = split(task.upper_batch)
    for number, upper_batch in enumerate(ends):
        with higher.innerloop_ctx(module, optimizer, copy_initial_weights=False) as (model, adapting):
            for batches in runs:
                adapting.step(model(task.lower_loss, upper, batches[number]))
            value: Tensor = model(task.upper_loss, upper, upper_batch) / len(ends)
            value.backward()
    return {name: torch.zeros_like(u) if u.grad is None else u.grad for name, u in upper.items()}


def _optimizer(task: Task, module: Holder) -> torch.optim.Optimizer:
    if task.optimizer == "adam":
        return torch.optim.Adam(module.parameters(), lr=task.lr, weight_decay=task.weight_decay)
    return torch.optim.SGD(module.parameters(), lr=task.lr, momentum=task.momentum, weight_decay=task.weight_decay)


if __name__ == "__main__":
    serve(Higher())
