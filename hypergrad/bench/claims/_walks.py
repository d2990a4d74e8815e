"""Consecutive upper steps of a problem, the same ones for whoever is measured on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from hypergrad.bench.problems import bissl, hypercleaning
from hypergrad.bench.problems.base import Params, Task
from hypergrad.bench.problems.images import fashion
from hypergrad.methods import Implicit, hypergradient
from hypergrad.solvers import CG
from hypergrad.trajectory import solved

TIE = 20.0
"""BiSSL's effective lambda along its walk; with 10 the lower Hessian is indefinite on some fresh batches of 64."""
Point = tuple[Task, Tensor]
"""A problem as it is at one upper step, and its hypergradient as one vector."""


def exact(task: Task) -> Params:
    """Return the hypergradient, its linear system solved as far as the dtype goes."""
    record = solved(task.lower_loss, task.lower, task.lower_batches[0])
    method = Implicit(CG(max_steps=200, rtol=2e-6))
    return hypergradient(task.upper_loss, record, task.upper, method=method, batch=task.upper_batch).grad


def hypercleaning_steps(count: int) -> Iterator[Point]:
    """Yield `count` upper steps of Adam on the images' weights, three lower steps between them, on a fixed batch."""
    task = hypercleaning.build()
    weight = task.upper["weight"].clone().requires_grad_()
    optimizer = torch.optim.Adam([weight], lr=0.1)
    for _ in range(count):
        grad = exact(task)
        yield task, flat(grad)
        weight.grad = grad["weight"]
        optimizer.step()
        upper = {"weight": weight.detach().clone()}
        lower = hypercleaning.descended(task.lower, upper, task.lower_batches[0], steps=3)
        batch = (*task.lower_batches[0][:3], lower)
        task = replace(task, lower=lower, upper=upper, lower_batches=[batch])


def bissl_steps(count: int, *, every: int = 8, lower_steps: int = 10) -> Iterator[Point]:
    """Yield `count` upper steps of BiSSL's stage; the lower level runs before every eighth and draws a new batch."""
    task = bissl.build(tie=TIE)
    generator = torch.Generator().manual_seed(1)
    images, labels = fashion("train")
    for step in range(count):
        if step % every == 0:
            task = _lower_run(task, images[1000:, None], generator, lower_steps)
        chosen = torch.randint(1000, (128,), generator=generator)
        task = replace(task, upper_batch=(images[chosen, None], labels[chosen]))
        grad = exact(task)
        yield task, flat(grad)
        task = replace(task, upper={name: u - 0.1 * grad[name] for name, u in task.upper.items()})


def _lower_run(task: Task, images: Tensor, generator: torch.Generator, steps: int) -> Task:
    leaves = {name: w.clone().requires_grad_() for name, w in task.lower.items()}
    optimizer = torch.optim.SGD(leaves.values(), lr=0.01, momentum=0.9)
    for _ in range(steps):
        batch = bissl.views(images[torch.randint(len(images), (64,), generator=generator)], generator)
        loss = task.lower_loss(leaves, task.upper, batch)
        for w, grad in zip(leaves.values(), torch.autograd.grad(loss, list(leaves.values())), strict=True):
            w.grad = grad
        torch.nn.utils.clip_grad_norm_(leaves.values(), 10.0)
        optimizer.step()
    batch = bissl.views(images[torch.randint(len(images), (64,), generator=generator)], generator)
    return replace(task, lower={name: w.detach() for name, w in leaves.items()}, lower_batches=[batch])


def flat(params: Params) -> Tensor:
    """Return the entries as one vector."""
    return torch.cat([p.reshape(-1) for p in params.values()])


def error(found: Params, truth: Tensor) -> float:
    """Return the relative error."""
    return float((flat(found) - truth).norm() / truth.norm())


Steps = Callable[[int], Iterator[Point]]
