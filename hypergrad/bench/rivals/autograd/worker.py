"""The floor: hypergradients as one writes them by hand with `torch.autograd`, eager, in one file, of no library.

    python hypergrad/bench/rivals/autograd/worker.py < requests

An implicit problem: the lower gradient is taped once, each Hessian product is a second backward pass through that tape,
and plain conjugate gradients start from zero. A lower run, for one task or for each in turn: its steps stay on the tape
(`create_graph=True`) and one backward pass goes through all of them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[3]))  # the folder that holds `bench`
from bench.problems.base import Params, Task
from bench.protocol import Offer
from bench.rivals.batches import split
from bench.serving import Contender, Outcome, serve

MAX_STEPS = 2000

Solve = Callable[[Callable[[Tensor], Tensor], Tensor], tuple[Tensor, int]]


class Autograd(Contender):
    """Taped double backward and cold conjugate gradients, or the plain taped unroll."""

    def offers(self, task: Task, size: str) -> list[Offer]:
        """Return conjugate gradients to several residuals; for runs the unroll, which has nothing to set."""
        unroll = [] if task.kind == "implicit" else [Offer("unroll")]
        if task.kind == "implicit" or task.converged:
            tolerances = (1e-2, 1e-4, 1e-6) if size == "quick" else (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
            return [*unroll, *(Offer("cg", {"rtol": rtol}) for rtol in tolerances)]
        return unroll

    def prepare(self, task: Task, method: str, settings: dict[str, Any]) -> Callable[[], Outcome]:
        """Return the function that is timed."""
        solve = partial(
            conjugate_gradients, rtol=settings.get("rtol", 0.0), max_steps=settings.get("max_steps", MAX_STEPS)
        )
        if task.kind == "implicit":
            return lambda: implicit(task, task.lower, task.lower_batches[0], task.upper_batch, solve)
        if task.kind == "unrolled":
            return lambda: unrolled(task, task.lower, task.lower_batches, task.upper_batch)
        return lambda: each_task(task, None if method == "unroll" else solve)

    def versions(self) -> dict[str, str]:
        """Return PyTorch's version."""
        return {"torch": torch.__version__}


def implicit(task: Task, start: Params, lower_batch: Any, upper_batch: Any, solve: Solve) -> Outcome:
    """Return the implicit hypergradient at the lower solution `start`."""
    lower, upper = _leaves(start), _leaves(task.upper)
    w, u = list(lower.values()), list(upper.values())
    value = task.upper_loss(lower, upper, upper_batch)
    outer = torch.autograd.grad(value, w + u, materialize_grads=True)
    loss = task.lower_loss(lower, upper, lower_batch)
    if task.weight_decay:
        loss = loss + 0.5 * task.weight_decay * torch.stack([x.square().sum() for x in w]).sum()
    slope = _flat(torch.autograd.grad(loss, w, create_graph=True))

    def product(v: Tensor) -> Tensor:
        return _flat(torch.autograd.grad(slope, w, v, retain_graph=True))

    x, steps = solve(product, _flat(outer[: len(w)]))
    mixed = torch.autograd.grad(slope, u, x, materialize_grads=True)
    grads = [direct - m for direct, m in zip(outer[len(w) :], mixed, strict=True)]
    return Outcome(dict(zip(upper, grads, strict=True)), num_products=steps)


def conjugate_gradients(
    product: Callable[[Tensor], Tensor], b: Tensor, *, rtol: float, max_steps: int
) -> tuple[Tensor, int]:
    """Return x with product(x) = b, from zero until |residual| <= rtol |b|, and the steps taken."""
    x, r, p = torch.zeros_like(b), b.clone(), b.clone()
    rr = r.dot(r)
    enough = rtol**2 * rr
    for step in range(max_steps):
        if rr <= enough:
            return x, step
        q = product(p)
        alpha = float(rr / p.dot(q))
        x.add_(p, alpha=alpha)
        r.sub_(q, alpha=alpha)
        rr, before = r.dot(r), rr
        p = torch.add(r, p, alpha=float(rr / before))
    return x, max_steps


def unrolled(task: Task, start: Params | None, batches: list[Any], upper_batch: Any) -> Outcome:
    """Return the hypergradient of a run, all of it on the tape; without `start` it begins at the upper parameters."""
    upper = _leaves(task.upper)
    end = descend(task, _leaves(start) if start else {n: upper[n] for n in task.lower}, upper, batches, taped=True)
    value = task.upper_loss(end, upper, upper_batch)
    grads = torch.autograd.grad(value, list(upper.values()), materialize_grads=True)
    return Outcome(dict(zip(upper, grads, strict=True)))


def each_task(task: Task, solve: Solve | None) -> Outcome:
    """Return the hypergradient of the tasks' mean upper loss, one task after the other, unrolled unless `solve`."""
    runs = [split(batch) for batch in task.lower_batches]
    found = []
    for number, upper_batch in enumerate(split(task.upper_batch)):
        batches = [batch[number] for batch in runs]
        if solve is None:
            found.append(unrolled(task, None, batches, upper_batch))
        else:
            end = descend(task, _leaves({n: task.upper[n] for n in task.lower}), task.upper, batches, taped=False)
            found.append(implicit(task, end, batches[0], upper_batch, solve))
    products = None if solve is None else sum(outcome.num_products or 0 for outcome in found)
    mean = {name: torch.stack([outcome.gradient[name] for outcome in found]).mean(0) for name in task.upper}
    return Outcome(mean, products)


def descend(task: Task, start: Params, upper: Params, batches: list[Any], *, taped: bool) -> Params:
    """Return the end of a run of gradient descent, with momentum and weight decay, on the tape or off it."""
    if task.optimizer != "sgd":
        raise ValueError(f"by hand there is gradient descent only, {task.name} asks for {task.optimizer!r}")
    names, w = list(start), list(start.values())
    velocity: list[Tensor] | None = None
    for step, batch in enumerate(batches):
        lr = task.hyper["lr"](upper, step) if task.hyper else task.lr
        loss = task.lower_loss(dict(zip(names, w, strict=True)), upper, batch)
        g = list(torch.autograd.grad(loss, w, create_graph=taped))
        if task.weight_decay:
            g = [a + task.weight_decay * x for a, x in zip(g, w, strict=True)]
        if task.momentum:
            velocity = g if velocity is None else [task.momentum * v + a for v, a in zip(velocity, g, strict=True)]
            g = velocity
        w = [x - lr * a for x, a in zip(w, g, strict=True)]
        if not taped:
            w = [x.detach().requires_grad_() for x in w]
    return dict(zip(names, w, strict=True))


def _leaves(params: Params) -> Params:
    return {name: x.detach().clone().requires_grad_() for name, x in params.items()}


def _flat(tensors: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([x.reshape(-1) for x in tensors])


if __name__ == "__main__":
    serve(Autograd())
