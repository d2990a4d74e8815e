"""BOAT: its operations composed as `boat_torch.Problem` composes them, under higher's `innerloop_ctx`.

    .rivals/boat/bin/python hypergrad/bench/rivals/boat/worker.py < requests

`Problem.run_iter` also takes a lower step, evaluates both losses once more and writes a log; calling the operations
leaves that out, in the library's favour.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import higher
import torch
from boat_torch.gm_ol import NGD
from boat_torch.na_ol import CG, FD, IAD, NS, RAD
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[3]))  # the folder that holds `bench`
from bench.problems.base import Params, Task
from bench.protocol import Offer
from bench.rivals.batches import split
from bench.rivals.curvature import step_size
from bench.rivals.holder import Holder, solved_loss
from bench.serving import Contender, Outcome, serve

OPERATIONS = {"CG": CG, "NS": NS, "FD": FD}


class Boat(Contender):
    """Conjugate gradients, Neumann series and a finite difference; reverse differentiation of runs and of tasks."""

    def offers(self, task: Task, size: str) -> list[Offer]:
        """Return a ladder for each operation."""
        if task.kind == "unrolled":
            return [] if task.hyper else [Offer("NGD+RAD")]
        if task.kind == "tasks":
            return [] if task.converged else [Offer("NGD+IAD")]
        step = step_size(task)
        few = size == "quick"
        return [
            *(
                Offer("CG", {"k": n, "tolerance": 1e-10, "lr": step})
                for n in ((20, 80) if few else (5, 10, 20, 40, 80))
            ),
            *(Offer("NS", {"k": n, "tolerance": 1e-10, "lr": step}) for n in ((20, 160) if few else (10, 40, 160))),
            Offer("FD", {"r": 0.01, "lr": step}),
        ]

    def prepare(self, task: Task, method: str, settings: dict[str, Any]) -> Callable[[], Outcome]:
        """Return the function that is timed."""
        if task.kind == "implicit":
            return _implicit(task, method, settings)
        if task.kind == "tasks":
            return _each_task(task)
        return _unrolled(task)

    def versions(self) -> dict[str, str]:
        """Return those of the library, of higher on which it stands, and of PyTorch."""
        return {"boat-torch": version("boat-torch"), "higher": version("higher"), "torch": torch.__version__}


def _upper_objective(task: Task) -> Callable[..., Tensor]:
    def objective(feed: dict[str, Any], upper: Holder, lower: Any, **_: Any) -> Tensor:
        return lower(task.upper_loss, upper.named(), feed["batch"])

    return objective


def _lower_objective(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the objective; a feed's "batches" is an iterator, so that each step of a run takes its own."""

    def objective(feed: dict[str, Any], upper: Holder, lower: Any, **_: Any) -> Tensor:
        return lower(loss, upper.named(), next(feed["batches"]))

    return objective


def _configuration(optimizer: torch.optim.Optimizer, operation: str, settings: dict[str, Any]) -> dict[str, Any]:
    return {
        "gm_op": ["NGD"],
        "na_op": [operation],
        "lower_level_opt": optimizer,
        "CG": {"k": settings.get("k", 10), "tolerance": settings.get("tolerance", 1e-10)},
        "FD": {"r": settings.get("r", 0.01)},
        "GDA": {"alpha_init": 0.0, "alpha_decay": 0.9},
        "RGT": {"truncate_iter": 0},
    }


def _take(upper: Holder) -> Params:
    """Return the gradients that the operations left, and clear them."""
    found = {name: torch.zeros_like(u) if u.grad is None else u.grad for name, u in upper.named().items()}
    upper.zero_grad(set_to_none=True)
    return found


def _implicit(task: Task, method: str, settings: dict[str, Any]) -> Callable[[], Outcome]:
    """Return an operation's call at the lower solution."""
    lower, upper = Holder(task.lower), Holder(task.upper)
    optimizer = torch.optim.SGD(lower.parameters(), lr=settings["lr"])
    operation = OPERATIONS[method](
        _lower_objective(solved_loss(task)),
        _upper_objective(task),
        lower,
        upper,
        list(lower.parameters()),
        list(upper.parameters()),
        _configuration(optimizer, method, settings),
    )

    def run() -> Outcome:
        lower_feed = {"batches": iter(task.lower_batches[:1] * 2)}
        with higher.innerloop_ctx(lower, optimizer, copy_initial_weights=False, track_higher_grads=False) as (model, _):
            operation.compute_gradients(
                ll_feed_dict=lower_feed, ul_feed_dict={"batch": task.upper_batch}, auxiliary_model=model
            )
        return Outcome(_take(upper), settings.get("k"))

    return run


def _optimizer(task: Task, module: Holder) -> torch.optim.Optimizer:
    if task.optimizer == "adam":
        return torch.optim.Adam(module.parameters(), lr=task.lr, weight_decay=task.weight_decay)
    return torch.optim.SGD(module.parameters(), lr=task.lr, momentum=task.momentum, weight_decay=task.weight_decay)


def _run(task: Task, lower: Holder, upper: Holder, operation: Any, batches: list[Any], upper_batch: Any) -> None:
    """Take the lower steps and add the hypergradient to the upper module's."""
    optimizer = _optimizer(task, lower)
    configuration = _configuration(optimizer, operation.__name__, {})
    objectives = _lower_objective(task.lower_loss), _upper_objective(task)
    mapping = NGD(*objectives, lower, upper, len(batches), configuration)
    reverse = operation(*objectives, lower, upper, list(lower.parameters()), list(upper.parameters()), configuration)
    with higher.innerloop_ctx(lower, optimizer, copy_initial_weights=False, track_higher_grads=True) as (
        model,
        adapting,
    ):
        feeds = {"ll_feed_dict": {"batches": iter(batches)}, "ul_feed_dict": {"batch": upper_batch}}
        mapping.optimize(**feeds, auxiliary_model=model, auxiliary_opt=adapting, current_iter=0)
        reverse.compute_gradients(**feeds, auxiliary_model=model)


def _unrolled(task: Task) -> Callable[[], Outcome]:
    """Return the run and its reverse differentiation."""
    lower, upper = Holder(task.lower), Holder(task.upper)

    def run() -> Outcome:
        _run(task, lower, upper, RAD, task.lower_batches, task.upper_batch)
        return Outcome(_take(upper))

    return run


def _each_task(task: Task) -> Callable[[], Outcome]:
    """Return the loop over tasks, which begin at the upper parameters and differentiate by where they began."""
    names = list(task.lower)
    lower = Holder({name: task.upper[name] for name in names})
    upper = Holder({name: task.upper[name] for name in names})
    runs = [split(batch) for batch in task.lower_batches]
    ends = split(task.upper_batch)

    def run() -> Outcome:
        for number, upper_batch in enumerate(ends):
            _run(task, lower, upper, IAD, [batches[number] for batches in runs], upper_batch)
        return Outcome({name: grad / len(ends) for name, grad in _take(upper).items()})

    return run


if __name__ == "__main__":
    serve(Boat())
