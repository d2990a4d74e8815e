"""moskomule's hypergrad: its approximations on two pure losses; its differentiable SGD for a lower run.

.rivals/moskomule/bin/python hypergrad/bench/rivals/moskomule/worker.py < requests
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# a folder that holds our own `hypergrad`, such as the current one, comes last
sys.path.sort(key=lambda folder: (Path(folder) / "hypergrad" / "bench").is_dir())
sys.path.append(str(Path(__file__).resolve().parents[3]))  # the folder that holds `bench`
from bench.problems.base import Params, Task
from bench.protocol import Offer
from bench.rivals.curvature import step_size
from bench.rivals.holder import by_name, solved_loss
from bench.serving import Contender, Outcome, serve
from hypergrad.approx_hypergrad import conjugate_gradient, neumann, nystrom
from hypergrad.optimizers import diff_sgd

METHODS = {"cg": conjugate_gradient, "neumann": neumann, "nystrom": nystrom}
Tensors = tuple[Tensor, ...]


class Moskomule(Contender):
    """Conjugate gradients, Neumann series and Nystrom's inverse; `diff_sgd` under autograd for a lower run."""

    def offers(self, task: Task, size: str) -> list[Offer]:
        """Return a ladder for each method."""
        if task.kind == "unrolled":
            return [Offer("diff_sgd")] if task.optimizer == "sgd" and not task.hyper else []
        if task.kind == "tasks":
            return []
        step = step_size(task)
        few = size == "quick"
        return [
            *(Offer("cg", {"num_iters": n, "lr": 1.0}) for n in ((20,) if few else (5, 20, 80))),
            *(Offer("neumann", {"num_iters": n, "lr": step}) for n in ((20, 160) if few else (10, 40, 160))),
            *(Offer("nystrom", {"rank": n, "rho": 0.01}) for n in ((20,) if few else (10, 50))),
        ]

    def prepare(self, task: Task, method: str, settings: dict[str, Any]) -> Callable[[], Outcome]:
        """Return a call of the approximation, or the run and its backward pass."""
        if method == "diff_sgd":
            return lambda: Outcome(_unrolled(task))
        lower_names, upper_names = list(task.lower), list(task.upper)
        loss, batch = solved_loss(task), task.lower_batches[0]

        def inner(lower: Tensors, upper: Tensors) -> Tensor:
            return loss(by_name(lower_names, lower), by_name(upper_names, upper), batch)

        def outer(lower: Tensors, upper: Tensors) -> Tensor:
            named = by_name(lower_names, lower), by_name(upper_names, upper)
            return task.upper_loss(*named, task.upper_batch)

        approximation = METHODS[method]
        lower, upper = tuple(task.lower.values()), tuple(task.upper.values())

        def run() -> Outcome:
            grads = approximation(inner, outer, lower, upper, **settings)
            return Outcome(by_name(upper_names, grads), settings.get("num_iters", settings.get("rank")))

        return run

    def versions(self) -> dict[str, str]:
        """Return those of the library and of PyTorch."""
        return {"hypergrad": version("hypergrad"), "torch": torch.__version__}


def _unrolled(task: Task) -> Params:
    """Return the hypergradient through `diff_sgd`."""
    upper = {name: u.detach().clone().requires_grad_() for name, u in task.upper.items()}
    names = list(task.lower)
    params = [w.detach().clone().requires_grad_() for w in task.lower.values()]
    state = None
    for batch in task.lower_batches:
        loss = task.lower_loss(by_name(names, params), upper, batch)
        grads = list(torch.autograd.grad(loss, params, create_graph=True))
        params, state = diff_sgd(
            params, grads, state, weight_decay=task.weight_decay, momentum=task.momentum, lr=task.lr
        )
    value = task.upper_loss(by_name(names, params), upper, task.upper_batch)
    grads = torch.autograd.grad(value, list(upper.values()), materialize_grads=True)
    return by_name(upper, grads)


if __name__ == "__main__":
    torch.func.jvp(torch.func.grad(torch.sin), (torch.zeros(()),), (torch.ones(()),))  # loads what transforms load once
    serve(Moskomule())
